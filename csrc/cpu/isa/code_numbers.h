// Sixteen codes of a quantized matrix as numbers, on vectors of eight lanes, in two to four instructions for eight of them.
//
// Most codes are not shifted to the low bits of their lane: they are masked where they lie, and converted. That gives 2^e times the code, with an e
// of the lane. A product takes x times 2^-e, which is exact, and needs x in the order of the lanes (see CodeOrder).
#pragma once

#include "cpu/isa/elements.h"

namespace metalens::cpu::METALENS_ISA {

using uvec8 = uint32_t __attribute__((vector_size(32), aligned(4)));

struct Sixteen {
  vec8 first;
  vec8 second;
};

// Lane i of the sixteen holds 2^exponent[i] times the number of column[i].
struct CodeOrder {
  int column[16];
  int exponent[16];
};

// Columns in their order. The exponents of eight columns are `start`, `start` + `step` ... modulo `end`.
constexpr CodeOrder in_order(int start, int step, int end) {
  CodeOrder order{};
  for (int i = 0; i < 16; ++i) {
    order.column[i] = i;
    order.exponent[i] = (start + i % 8 * step) % end;
  }
  return order;
}

template <Format format, int bits>
struct Codes {
  static constexpr CodeOrder order = in_order(0, 0, 1);
  static Sixteen unpack(const uint8_t* p) {
    return {codes8<format, bits>(p), codes8<format, bits>(p + bits)};
  }
};

// Eight codes that lie side by side in a word. None reaches the sign bit.
template <int bits>
inline vec8 masked(uint32_t word) {
  constexpr uint32_t m = (1u << bits) - 1;
  constexpr uvec8 masks = {m, m << bits, m << 2 * bits, m << 3 * bits, m << 4 * bits, m << 5 * bits, m << 6 * bits, m << 7 * bits};
  return floats_of(reinterpret_cast<ivec8>((uvec8{} + word) & masks));
}

template <>
struct Codes<Format::affine, 2> {
  static constexpr CodeOrder order = in_order(0, 2, 32);
  static Sixteen unpack(const uint8_t* p) {
    const uint32_t word = uint32_t(load_as<uint32_t>(p));
    return {masked<2>(word), masked<2>(word >> 16)};
  }
};

template <>
struct Codes<Format::affine, 3> {
  static constexpr CodeOrder order = in_order(0, 3, 32);
  static Sixteen unpack(const uint8_t* p) {
    return {masked<3>(uint32_t(load_as<uint32_t>(p))), masked<3>(uint32_t(load_as<uint32_t>(p + 2) >> 8))};
  }
};

// Lanes hold the two words in turn. Four codes of each are masked, and then, shifted down, the other four.
template <>
struct Codes<Format::affine, 4> {
  static constexpr CodeOrder order = {{0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15}, {0, 0, 4, 4, 8, 8, 12, 12, 0, 0, 4, 4, 8, 8, 12, 12}};
  static Sixteen unpack(const uint8_t* p) {
    using words4 = uint64_t __attribute__((vector_size(32)));
    constexpr uvec8 masks = {15, 15, 15 << 4, 15 << 4, 15 << 8, 15 << 8, 15 << 12, 15 << 12};
    const uvec8 words = reinterpret_cast<uvec8>(words4{} + load_as<uint64_t>(p));
    return {floats_of(reinterpret_cast<ivec8>(words & masks)), floats_of(reinterpret_cast<ivec8>((words >> 16) & masks))};
  }
};

#ifdef __AVX2__

// Eight codes of 5 or 6 bits in `bits` bytes, of which the first is byte `start` of the eight at p. A shuffle brings each code's two bytes to its
// lane.
template <int bits, int start>
inline vec8 from_two_bytes(const uint8_t* p) {
  struct Places {
    constexpr Places() : bytes(), masks() {
      for (int i = 0; i < 8; ++i) {
        const int first = start + i * bits / 8;
        bytes[4 * i] = uint8_t(first);
        bytes[4 * i + 1] = uint8_t(first < 7 ? first + 1 : first);
        bytes[4 * i + 2] = bytes[4 * i + 3] = 0x80;  // zero
        masks[i] = ((1u << bits) - 1) << i * bits % 8;
      }
    }
    alignas(32) uint8_t bytes[32];
    alignas(32) uint32_t masks[8];
  };
  static constexpr Places places;
  const __m256i eight = _mm256_set1_epi64x(int64_t(load_as<uint64_t>(p)));
  const __m256i pairs = _mm256_shuffle_epi8(eight, _mm256_load_si256(reinterpret_cast<const __m256i*>(places.bytes)));
  return vec8(_mm256_cvtepi32_ps(_mm256_and_si256(pairs, _mm256_load_si256(reinterpret_cast<const __m256i*>(places.masks)))));
}

template <>
struct Codes<Format::affine, 5> {
  static constexpr CodeOrder order = in_order(0, 5, 8);
  static Sixteen unpack(const uint8_t* p) {
    return {from_two_bytes<5, 0>(p), from_two_bytes<5, 3>(p + 2)};
  }
};

template <>
struct Codes<Format::affine, 6> {
  static constexpr CodeOrder order = in_order(0, 6, 8);
  static Sixteen unpack(const uint8_t* p) {
    return {from_two_bytes<6, 0>(p), from_two_bytes<6, 2>(p + 4)};
  }
};

template <>
struct Codes<Format::affine, 8> {
  static constexpr CodeOrder order = in_order(0, 0, 1);
  static Sixteen unpack(const uint8_t* p) {
    return {eight(p), eight(p + 8)};
  }

 private:
  static vec8 eight(const uint8_t* p) {
    return vec8(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
  }
};

// e2m1 codes: a table of bytes holds twice their values. Each byte goes to the top of a lane, where its sign is the lane's.
struct FourBitFloats {
  static constexpr CodeOrder order = {
      {0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15}, {25, 25, 25, 25, 25, 25, 25, 25, 25, 25, 25, 25, 25, 25, 25, 25}};
  static Sixteen unpack(const uint8_t* p) {
    constexpr char none = char(0x80);
    const __m256i places = _mm256_setr_epi8(
        none, none, none, 0, none, none, none, 1, none, none, none, 2, none, none, none, 3, none, none, none, 4, none, none, none, 5, none, none,
        none, 6, none, none, none, 7);
    const __m256i top = _mm256_shuffle_epi8(_mm256_set1_epi64x(int64_t(load_as<uint64_t>(p))), places);
    return {numbers(top), numbers(_mm256_srli_epi32(top, 4))};
  }

 private:
  static vec8 numbers(__m256i codes) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
    return vec8(_mm256_cvtepi32_ps(_mm256_shuffle_epi8(table, _mm256_and_si256(codes, _mm256_set1_epi32(15 << 24)))));
  }
};

template <>
struct Codes<Format::mxfp4, 4> : FourBitFloats {};
template <>
struct Codes<Format::nvfp4, 4> : FourBitFloats {};

// e4m3 codes: sign-extended to 16 bits and shifted, they are 2^-8 of their values as float16, also where they are subnormal.
template <>
struct Codes<Format::mxfp8, 8> {
  static constexpr CodeOrder order = in_order(-8, 0, 16);
  static Sixteen unpack(const uint8_t* p) {
    const __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(codes, 7), _mm256_set1_epi16(short(0xbfff)));
    // The largest code is NaN. As float16 its exponent is then all ones.
    const __m256i largest = _mm256_set1_epi16(0x3f80);
    const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi16(_mm256_and_si256(half, largest), largest), _mm256_set1_epi16(0x7e00));
    const __m256i bits = _mm256_or_si256(half, nan);
    return {vec8(_mm256_cvtph_ps(_mm256_castsi256_si128(bits))), vec8(_mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1)))};
  }
};

#elif defined(__ARM_NEON)

// e2m1 codes: a table of bytes holds twice their values.
struct FourBitFloats {
  static constexpr CodeOrder order = {{0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15}, {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}};
  static Sixteen unpack(const uint8_t* p) {
    const uint8x8_t bytes = vld1_u8(p);
    return {numbers(vand_u8(bytes, vdup_n_u8(15))), numbers(vshr_n_u8(bytes, 4))};
  }

 private:
  static vec8 numbers(uint8x8_t codes) {
    alignas(16) static constexpr int8_t doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    const int16x8_t numbers = vmovl_s8(vqtbl1_s8(vld1q_s8(doubled), codes));
    const auto low = vcvtq_f32_s32(vmovl_s16(vget_low_s16(numbers))), high = vcvtq_f32_s32(vmovl_s16(vget_high_s16(numbers)));
    return vec8(__builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7));
  }
};

template <>
struct Codes<Format::mxfp4, 4> : FourBitFloats {};
template <>
struct Codes<Format::nvfp4, 4> : FourBitFloats {};

#endif

}  // namespace metalens::cpu::METALENS_ISA
