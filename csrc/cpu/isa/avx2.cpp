#include <immintrin.h>

#define METALENS_ISA avx2
#define METALENS_VECTOR 8
#define METALENS_ROWS 6
#include "cpu/isa/kernel_table.h"
