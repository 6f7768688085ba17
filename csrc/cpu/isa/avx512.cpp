#include <immintrin.h>

#define METALENS_ISA avx512
#define METALENS_VECTOR 16
#define METALENS_ROWS 12
#include "cpu/isa/kernel_table.h"
