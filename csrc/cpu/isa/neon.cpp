// The baseline of every 64-bit Arm CPU: 32 registers of 4 lanes, with fused multiply-add. 8 rows x 2 vectors are 16 accumulators. With the panel's
// two vectors and the 8 rows' broadcast values, at most 26 registers are live, even if all loads of a step come first. Wider vectors, lowered to
// pairs of registers, would load less per product, but gcc keeps them in memory.
#include <arm_neon.h>

#define METALENS_ISA neon
#define METALENS_VECTOR 4
#define METALENS_ROWS 8
#include "cpu/isa/kernel_table.h"
