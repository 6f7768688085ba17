// A threadgroup that reads one row of logits: its size, and reductions over it.
#pragma once

#include "common.h"

namespace metalens {

constexpr constant int ROW_SIMDS = 16;
constexpr constant int ROW_THREADS = ROW_SIMDS * LANES;

// The sum over the threadgroup, in a fixed order, in every thread. `slots` holds a float for each simdgroup.
METAL_FUNC float threadgroup_sum(float mine, threadgroup float* slots, uint simd, uint lane) {
  const float of_simd = simd_sum(mine);
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the slots' last values have been read
  if (lane == 0) {
    slots[simd] = of_simd;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float sum = 0.0f;
  for (int i = 0; i < ROW_SIMDS; ++i) {
    sum += slots[i];
  }
  return sum;
}

METAL_FUNC float threadgroup_max(float mine, threadgroup float* slots, uint simd, uint lane) {
  const float of_simd = simd_max(mine);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0) {
    slots[simd] = of_simd;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float largest = slots[0];
  for (int i = 1; i < ROW_SIMDS; ++i) {
    largest = max(largest, slots[i]);
  }
  return largest;
}

}  // namespace metalens
