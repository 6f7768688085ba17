// AVX-512, with products of 16-bit operands on its dot product of bfloat16 pairs.
#include <immintrin.h>

#define METALENS_TABLE avx512bf16_kernels
#define METALENS_ISA_NAME "avx512bf16"
#define METALENS_VECTOR 16
#define METALENS_ROWS 12
#define METALENS_BF16_SOURCE "cpu/isa/dot.inc"
#define METALENS_BF16 &kDotMultiplier
#include "cpu/isa/kernels.inc"
