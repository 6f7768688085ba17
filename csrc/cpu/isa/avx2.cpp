#define METALENS_TABLE avx2_kernels
#define METALENS_ISA_NAME "avx2"
#define METALENS_VECTOR 8
#define METALENS_ROWS 6
#include "cpu/isa/kernels.inc"
