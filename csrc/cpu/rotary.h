// Rotary position embedding.
#pragma once

#include <memory>
#include <vector>

#include "cpu/strided.h"

namespace metalens::cpu {

// How positions turn into angles: position t has the angles (offset + t) * scale / period[i], i < half.
struct Rotary {
  int64_t dims;  // elements of a row that rotate: an even number; the rest stays
  bool pairs;    // neighbors rotate together; else element i and element i + dims / 2
  float base;    // period[i] = base ^ (2 i / dims), unless there are periods
  float scale;
  int64_t offset;
  std::vector<float> periods;  // dims / 2, or none

  bool operator==(const Rotary&) const = default;
};

// y [x.count(), x.width()]: every row of x turned by the angles of its position, row % positions.
void rotate_rows(const Rotary& rotary, int64_t positions, const StridedRows& x, const Output& y);

}  // namespace metalens::cpu
