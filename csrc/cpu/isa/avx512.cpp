#define METALENS_TABLE avx512_kernels
#define METALENS_ISA_NAME "avx512"
#define METALENS_VECTOR 16
#define METALENS_ROWS 12
#include "cpu/isa/kernels.inc"
