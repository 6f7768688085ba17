// NEON, with products of 16-bit operands on Arm's dot product of bfloat16 pairs (optional from Armv8.2 on, in every Apple chip from the M2).
#include <arm_neon.h>

#define METALENS_ISA neonbf16
#define METALENS_VECTOR 4
#define METALENS_ROWS 8
#define METALENS_BF16 &kNeonDotMultiplier
#include "cpu/isa/dot_neon.h"
#include "cpu/isa/kernel_table.h"
