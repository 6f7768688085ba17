// The elements of an 8 x 8 matrix that a lane holds: two neighbors of one row. Metal does not document which; MLX's own kernels rely on this layout,
// and no Apple GPU has another.
#pragma once

#include "common.h"

namespace metalens {

METAL_FUNC int fragment_row(uint lane) {
  return int((lane / 4 & 4) + lane / 2 % 4);
}

// The first of the two columns.
METAL_FUNC int fragment_column(uint lane) {
  return int((lane / 4 & 2) * 2 + lane % 2 * 2);
}

METAL_FUNC simdgroup_matrix<float, 8, 8> fragment(float2 elements) {
  simdgroup_matrix<float, 8, 8> matrix;
  matrix.thread_elements()[0] = elements.x;
  matrix.thread_elements()[1] = elements.y;
  return matrix;
}

METAL_FUNC float2 elements(simdgroup_matrix<float, 8, 8> matrix) {
  return float2(matrix.thread_elements()[0], matrix.thread_elements()[1]);
}

}  // namespace metalens
