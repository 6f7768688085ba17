// The kernels that multiply tiles, with the tile of tensor_tile.h too. A header of its own, because Metal before version 4 does not compile it.
#pragma once

#include "lens_label_logits.h"
#include "lens_stats.h"
#include "linear.h"
#include "tensor_tile.h"
