// Metal Shading Language for clang's "C++ for OpenCL 2021": included before the rewritten source. The parts build on one another in this order.
#pragma once
#include "macros.h"
#include "language.h"
#include "traits.h"
#include "runtime.h"
#include "math.h"
#include "integer.h"
#include "atomic.h"
#include "simd.h"
#include "matrix.h"
#include "tensor.h"
#ifdef MSL_MLX_PREAMBLE
#include "builtins.h"
#else
#include "mlx.h"
#endif
#include "keywords.h"
