// The k <= 32 largest logits of a row, one in each lane of a simdgroup, in order of falling logit and rising id.
#pragma once

#include "common.h"

namespace metalens {

constexpr constant int NO_ID = 0x7fffffff;

struct TopList {
  float logit;
  int id;
};

METAL_FUNC TopList empty_list() {
  TopList none;
  none.logit = -INFINITY;
  none.id = NO_ID;
  return none;
}

METAL_FUNC bool precedes(float logit, int id, float other, int other_id) {
  return logit > other || (logit == other && id < other_id);
}

// Insert a candidate, the same in every lane, at its position. The last entry drops out.
METAL_FUNC void insert(thread TopList& list, float logit, int id, uint lane) {
  const uint position = simd_sum(precedes(list.logit, list.id, logit, id) ? 1u : 0u);
  const float above = simd_shuffle_up(list.logit, 1);
  const int above_id = simd_shuffle_up(list.id, 1);
  if (lane > position) {
    list.logit = above;
    list.id = above_id;
  } else if (lane == position) {
    list.logit = logit;
    list.id = id;
  }
}

// Offer one candidate from each lane; id NO_ID means no candidate. Once the list has settled, hardly any candidate passes the first test.
METAL_FUNC void offer(thread TopList& list, float logit, int id, int k, uint lane) {
  bool open = id != NO_ID;
  for (;;) {
    const float last = simd_shuffle(list.logit, ushort(k - 1));
    const int last_id = simd_shuffle(list.id, ushort(k - 1));
    open = open && precedes(logit, id, last, last_id);
    const uint first = simd_min(open ? lane : uint(LANES));
    if (first == uint(LANES)) {
      return;
    }
    insert(list, simd_shuffle(logit, ushort(first)), simd_shuffle(id, ushort(first)), lane);
    open = open && lane != first;
  }
}

}  // namespace metalens
