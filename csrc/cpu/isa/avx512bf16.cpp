// AVX-512, with products of 16-bit operands on its dot product of bfloat16 pairs.
#include <immintrin.h>

#define METALENS_ISA avx512bf16
#define METALENS_VECTOR 16
#define METALENS_ROWS 12
#define METALENS_BF16 &kDotMultiplier
#include "cpu/isa/dot_avx512.h"
#include "cpu/isa/kernel_table.h"
