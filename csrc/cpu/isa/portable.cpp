// The compiler's baseline for the target, which is SSE2 on x86-64. 64-bit Arm has neon.cpp instead.
#define METALENS_ISA portable
#define METALENS_VECTOR 4
#define METALENS_ROWS 6
#include "cpu/isa/kernel_table.h"
