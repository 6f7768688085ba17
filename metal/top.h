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

// The k-th entry, in every lane.
METAL_FUNC TopList last_entry(TopList list, int k) {
  TopList last;
  last.logit = simd_broadcast(list.logit, ushort(k - 1));
  last.id = simd_broadcast(list.id, ushort(k - 1));
  return last;
}

// Offer one candidate from each lane; id NO_ID means no candidate. Equal candidates must lie in order of their ids. The largest is inserted first, so
// that no candidate is inserted that another one of the same offer pushes out.
METAL_FUNC void offer(thread TopList& list, float logit, int id, int k, uint lane) {
  bool open = id != NO_ID;
  for (;;) {
    const TopList last = last_entry(list, k);
    open = open && precedes(logit, id, last.logit, last.id);
    const float largest = simd_max(open ? logit : -INFINITY);
    const uint first = simd_min(open && logit == largest ? lane : uint(LANES));
    if (first == uint(LANES)) {
      return;
    }
    insert(list, simd_broadcast(logit, ushort(first)), simd_broadcast(id, ushort(first)), lane);
    open = open && lane != first;
  }
}

// Read and write the list of row `row` of [rows, k]. Each lane reads only what it wrote itself, so no barrier is needed.
METAL_FUNC TopList read_list(const device float* logits, const device int* ids, long row, int k, uint lane) {
  TopList list = empty_list();
  if (int(lane) < k) {
    list.logit = logits[row * k + lane];
    list.id = ids[row * k + lane];
  }
  return list;
}

METAL_FUNC void write_list(TopList list, device float* logits, device int* ids, long row, int k, uint lane) {
  if (int(lane) < k) {
    logits[row * k + lane] = list.logit;
    ids[row * k + lane] = list.id;
  }
}

}  // namespace metalens
