// The compiler's baseline for the target: SSE2 on x86-64, NEON on arm64.
#define METALENS_TABLE portable_kernels
#define METALENS_ISA_NAME "portable"
#define METALENS_VECTOR 4
#define METALENS_ROWS 6
#include "cpu/gemm_kernels.inc"
