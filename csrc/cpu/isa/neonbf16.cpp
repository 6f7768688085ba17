// NEON, with products of 16-bit operands on Arm's dot product of bfloat16 pairs (optional from Armv8.2 on, in every Apple chip from the M2).
#include <arm_neon.h>

#define METALENS_TABLE neonbf16_kernels
#define METALENS_ISA_NAME "neonbf16"
#define METALENS_VECTOR 4
#define METALENS_ROWS 8
#define METALENS_BF16_SOURCE "cpu/isa/neondot.inc"
#define METALENS_BF16 &kNeonDotMultiplier
#include "cpu/isa/kernels.inc"
