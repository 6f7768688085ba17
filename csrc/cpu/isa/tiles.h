// The operations of AMX on tiles of 16 rows of 64 bytes: C += A B, with C 16 x 16 floats, A 16 x 32 bfloat16, and B 32 x 16 bfloat16 as words of two.
//
// With METALENS_SOFTWARE_TILES the operations are plain C++ that follows Intel's definition exactly, so that the code built on them runs on any
// machine. The instructions are assembly instead of intrinsics: GCC 12's intrinsics do not tell the compiler that they read or write memory.
#pragma once

#include "cpu/isa/elements.h"

namespace metalens::cpu::METALENS_ISA {

#ifdef METALENS_SOFTWARE_TILES

// Tiles must be configured before use and released afterward. Here, any other order ends the program.
struct SoftwareTiles {
  bool configured;
  uint32_t words[8][16][16];
};
thread_local SoftwareTiles software_tiles;

inline auto& software_tile(int tile) {
  if (!software_tiles.configured) __builtin_trap();
  return software_tiles.words[tile];
}

inline void configure_tiles() {
  if (software_tiles.configured) __builtin_trap();
  software_tiles.configured = true;
}

inline void release_tiles() {
  if (!software_tiles.configured) __builtin_trap();
  __builtin_memset(&software_tiles, 0, sizeof(software_tiles));
}

template <int tile>
inline void zero_tile() {
  __builtin_memset(software_tile(tile), 0, sizeof(software_tile(tile)));
}

// `stride` is the distance of rows in memory, in bytes.
template <int tile>
inline void load_tile(const void* from, int64_t stride) {
  for (int row = 0; row < 16; ++row) __builtin_memcpy(software_tile(tile)[row], offset(from, row * stride), 64);
}

template <int tile>
inline void store_tile(void* to, int64_t stride) {
  for (int row = 0; row < 16; ++row) __builtin_memcpy(static_cast<char*>(to) + row * stride, software_tile(tile)[row], 64);
}

inline float float_of(uint32_t word) {
  Bits b;
  b.u = word;
  return b.f;
}

inline uint32_t word_of(float f) {
  Bits b;
  b.f = f;
  return b.u;
}

// Subnormal numbers count as zero, as operands and as results.
inline float flushed(float f) {
  return __builtin_fabsf(f) < 0x1p-126f ? __builtin_copysignf(0.0f, f) : f;
}

// The sums of even and of odd terms start at zero; both are added to the result at the end.
template <int result, int left, int right>
inline void dot_tiles() {
  const auto& a = software_tile(left);
  const auto& b = software_tile(right);
  auto& c = software_tile(result);
  for (int m = 0; m < 16; ++m) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < 16; ++k) {
      const float a_even = flushed(float_of(a[m][k] << 16)), a_odd = flushed(float_of(a[m][k] & 0xffff0000u));
      for (int n = 0; n < 16; ++n) {
        even[n] = flushed(__builtin_fmaf(a_even, flushed(float_of(b[k][n] << 16)), even[n]));
        odd[n] = flushed(__builtin_fmaf(a_odd, flushed(float_of(b[k][n] & 0xffff0000u)), odd[n]));
      }
    }
    for (int n = 0; n < 16; ++n) c[m][n] = word_of(flushed(flushed(float_of(c[m][n])) + flushed(even[n] + odd[n])));
  }
}

#else

// The operand of LDTILECFG. All eight tiles have their full size here; rows and columns that are not needed hold zeros.
struct TileConfiguration {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfiguration) == 64);

alignas(64) constexpr TileConfiguration kWholeTiles{
    .palette = 1,
    .start_row = 0,
    .reserved = {},
    .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
    .rows = {16, 16, 16, 16, 16, 16, 16, 16},
};

// Configure the tiles of the calling thread. While they are in use, every task switch saves and restores 8 KB, so release them soon.
inline void configure_tiles() {
  asm volatile("ldtilecfg %0" : : "m"(kWholeTiles) : "memory");
}

inline void release_tiles() {
  asm volatile("tilerelease" : : : "memory");
}

template <int tile>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}

// `stride` is the distance of rows in memory, in bytes.
template <int tile>
inline void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
inline void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(tile) : "memory");
}

template <int result, int left, int right>
inline void dot_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(result), "i"(left), "i"(right));
}

#endif

}  // namespace metalens::cpu::METALENS_ISA
