// <metal_simdgroup> and <metal_quadgroup>. A collective deposits its operand, waits for the other active lanes, and reads their operands.
// The kinds number the collectives for the scheduler; 1 and 2 belong to the scheduler itself.
#pragma once

struct MslOperands {
  const __generic uchar* base;
  ulong stride;
  uint mask;  // lanes that take part
};

template <class T>
MSL_INLINE MslOperands msl_exchange(T operand, uint kind, uint line) {
  MslOperands all;
  all.mask = msl_simd_exchange(&operand, sizeof(T), kind, line, &all.base, &all.stride);
  return all;
}
template <class T>
MSL_UNCHECKED T msl_operand(MslOperands all, uint lane) {
  return *(const __generic T*)(all.base + all.stride * lane);
}
MSL_INLINE bool msl_active(MslOperands all, int lane) { return lane >= 0 && lane < 32 && (all.mask >> lane & 1); }

namespace metal {

// Reductions over the active lanes `first` to `last`.
#define MSL_REDUCTION(NAME, COMBINED)                                                            \
  template <class T> MSL_UNCHECKED T msl_##NAME(MslOperands all, uint first, uint last) {        \
    T a = (T)0;                                                                                  \
    bool any = false;                                                                            \
    for (uint i = first; i <= last; i++) {                                                       \
      if (!(all.mask >> i & 1)) continue;                                                        \
      T b = *(const __generic T*)(all.base + all.stride * i);                                    \
      a = any ? (T)(COMBINED) : b;                                                               \
      any = true;                                                                                \
    }                                                                                            \
    return a;                                                                                    \
  }
MSL_REDUCTION(sum, a + b)
MSL_REDUCTION(product, a * b)
MSL_REDUCTION(max, max(a, b))
MSL_REDUCTION(min, min(a, b))
MSL_REDUCTION(and, a & b)
MSL_REDUCTION(or, a | b)
MSL_REDUCTION(xor, a ^ b)

#define MSL_SIMD_REDUCE(NAME, KIND)                                                              \
  template <class T> MSL_INLINE T simd_##NAME(T x, MSL_LINE) {                                   \
    return msl_##NAME<T>(msl_exchange(x, KIND, msl_line), 0, 31);                                \
  }                                                                                              \
  template <class T> MSL_INLINE T quad_##NAME(T x, MSL_LINE) {                                   \
    uint quad = msl_lane() & ~3u;                                                                \
    return msl_##NAME<T>(msl_exchange(x, KIND + 50, msl_line), quad, quad + 3);                  \
  }
MSL_SIMD_REDUCE(sum, 3)
MSL_SIMD_REDUCE(product, 4)
MSL_SIMD_REDUCE(max, 5)
MSL_SIMD_REDUCE(min, 6)
MSL_SIMD_REDUCE(and, 7)
MSL_SIMD_REDUCE(or, 8)
MSL_SIMD_REDUCE(xor, 9)

// Shuffles: LANE is the lane whose operand the caller receives. In Metal the operand of an inactive lane is undefined; here the caller then
// receives its own operand.
#define MSL_SHUFFLE(NAME, KIND, LANE)                                                            \
  template <class T> MSL_INLINE T NAME(T x, ushort delta, MSL_LINE) {                            \
    MslOperands all = msl_exchange(x, KIND, msl_line);                                           \
    int lane = (int)msl_lane(), d = (int)delta, from = LANE; (void)lane;                                     \
    return msl_active(all, from) ? msl_operand<T>(all, from) : x;                                \
  }
MSL_SHUFFLE(simd_shuffle, 10, d)
MSL_SHUFFLE(simd_broadcast, 11, d)
MSL_SHUFFLE(simd_shuffle_down, 12, lane + d)
MSL_SHUFFLE(simd_shuffle_up, 13, lane - d)
MSL_SHUFFLE(simd_shuffle_xor, 14, lane ^ d)
MSL_SHUFFLE(simd_shuffle_rotate_down, 15, (lane + d) & 31)
MSL_SHUFFLE(simd_shuffle_rotate_up, 16, (lane - d) & 31)
MSL_SHUFFLE(quad_shuffle, 17, (lane & ~3) + (d & 3))
MSL_SHUFFLE(quad_broadcast, 18, (lane & ~3) + (d & 3))
MSL_SHUFFLE(quad_shuffle_down, 19, ((lane & 3) + d < 4 ? lane + d : -1))
MSL_SHUFFLE(quad_shuffle_up, 20, ((lane & 3) - d >= 0 ? lane - d : -1))
MSL_SHUFFLE(quad_shuffle_xor, 21, lane ^ (d & 3))

template <class T> MSL_INLINE T simd_broadcast_first(T x, MSL_LINE) {
  MslOperands all = msl_exchange(x, 22, msl_line);
  return msl_operand<T>(all, (uint)__builtin_ctz(all.mask));
}
// The operands of the lanes, followed by those of `fill`: lanes beyond the end receive a fill operand.
template <class T> struct MslPair { T x, fill; };
template <class T> MSL_INLINE T simd_shuffle_and_fill_down(T x, T fill, ushort delta, MSL_LINE) {
  MslPair<T> own = {x, fill};
  MslOperands all = msl_exchange(own, 23, msl_line);
  uint from = msl_lane() + delta;
  return from < 32 ? msl_operand<MslPair<T>>(all, from).x : msl_operand<MslPair<T>>(all, from & 31).fill;
}
template <class T> MSL_INLINE T simd_shuffle_and_fill_up(T x, T fill, ushort delta, MSL_LINE) {
  MslPair<T> own = {x, fill};
  MslOperands all = msl_exchange(own, 24, msl_line);
  uint lane = msl_lane();
  return lane >= delta ? msl_operand<MslPair<T>>(all, lane - delta).x : msl_operand<MslPair<T>>(all, (lane - delta) & 31).fill;
}

#define MSL_SCAN(NAME, KIND, UP_TO, START, COMBINED)                                             \
  template <class T> MSL_UNCHECKED T msl_##NAME(MslOperands all, uint lane) {                    \
    T a = (T)START;                                                                              \
    for (uint i = 0; i UP_TO lane; i++) {                                                        \
      if (!(all.mask >> i & 1)) continue;                                                        \
      T b = *(const __generic T*)(all.base + all.stride * i);                                    \
      a = (T)(COMBINED);                                                                         \
    }                                                                                            \
    return a;                                                                                    \
  }                                                                                              \
  template <class T> MSL_INLINE T NAME(T x, MSL_LINE) { return msl_##NAME<T>(msl_exchange(x, KIND, msl_line), msl_lane()); }
MSL_SCAN(simd_prefix_inclusive_sum, 25, <=, 0, a + b)
MSL_SCAN(simd_prefix_exclusive_sum, 26, <, 0, a + b)
MSL_SCAN(simd_prefix_inclusive_product, 27, <=, 1, a * b)
MSL_SCAN(simd_prefix_exclusive_product, 28, <, 1, a * b)

struct simd_vote {
  typedef ulong vote_t;
  vote_t votes;
  explicit constexpr simd_vote(vote_t v) : votes(v) {}
  explicit constexpr operator vote_t() const { return votes; }
  bool all() const { return (votes & 0xffffffff) == 0xffffffff; }
  bool any() const { return votes != 0; }
};

MSL_UNCHECKED inline ulong msl_votes(MslOperands all) {
  ulong votes = 0;
  for (uint i = 0; i < 32; i++) {
    if ((all.mask >> i & 1) && *(const __generic uint*)(all.base + all.stride * i)) votes |= 1ul << i;
  }
  return votes;
}
MSL_INLINE simd_vote simd_ballot(bool x, MSL_LINE) { return simd_vote(msl_votes(msl_exchange((uint)x, 29, msl_line))); }
MSL_INLINE bool simd_any(bool x, MSL_LINE) { return msl_votes(msl_exchange((uint)x, 30, msl_line)) != 0; }
MSL_INLINE bool simd_all(bool x, MSL_LINE) { return msl_votes(msl_exchange((uint)!x, 31, msl_line)) == 0; }
MSL_INLINE simd_vote simd_active_threads_mask(MSL_LINE) { return simd_vote((ulong)msl_exchange(0u, 32, msl_line).mask); }
MSL_INLINE bool simd_is_first(MSL_LINE) { return msl_lane() == (uint)__builtin_ctz(msl_exchange(0u, 33, msl_line).mask); }

}  // namespace metal
