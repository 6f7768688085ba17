// Codes of a quantized matrix on AVX-512, as sixteen 32-bit words that hold as many codes each, side by side.
//
// Affine codes of 3 bits or more are not shifted to the low bits of their word: they are masked where they lie and converted, which gives 2^place
// times the code. A product takes x times 2^-place, which is exact. With the product itself that is three instructions for sixteen codes.
#pragma once

#include "cpu/isa/elements.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined operands inside its own intrinsics for ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace metalens::cpu::METALENS_ISA {

inline __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1);
}

// Codes of 2, 4 or 8 bits fill their words as they lie in memory. Of those of 3, 5 and 6 bits a word takes eight or four, which are 24, 20 and 24
// bits: bytes are moved to the word in which their codes lie. Codes of 5 bits begin in the middle of a byte in every other word.
template <int bits>
struct CodeWords {
  static constexpr int codes = bits == 2 ? 16 : bits <= 4 ? 8 : 4;  // in a word
  static constexpr int bytes = 2 * codes * bits;                    // of sixteen words in memory

  // The first bit of a word's code.
  static constexpr int place(int word, int code) {
    return code * bits + (word * codes * bits) % 8;
  }

  constexpr CodeWords() : masks(), factors(), quarters(), moves() {
    for (int word = 0; word < 16; ++word) {
      for (int code = 0; code < codes; ++code) {
        masks[code][word] = ((1u << bits) - 1) << place(word, code);
        factors[code][word] = 1.0f / float(uint64_t(1) << place(word, code));
      }
      // A quarter of the register gets the sixteen bytes, at whole words of memory, that hold the codes of its four words.
      const int first = word / 4 * 4 * codes * bits / 8 / 4;
      quarters[word] = first + word % 4;
      for (int i = 0; i < 4; ++i) moves[4 * word + i] = uint8_t(word * codes * bits / 8 + i - 4 * first);
    }
  }

  uint32_t masks[codes][16];
  float factors[codes][16];  // 2^-place
  int32_t quarters[16];
  uint8_t moves[64];  // beyond a quarter's end only for bits that are masked off
};

template <int bits>
alignas(64) constexpr CodeWords<bits> kCodeWords;

// Bytes ahead. The CPU's own prefetching stops at the end of a page, which is a dozen rows of narrow codes.
constexpr int kPrefetch = 1536;

// Load sixteen words of codes. Reads 64 bytes, whatever the width of a code: a masked load would take as long as dozens of codes.
template <int bits>
inline __m512i load_code_words(const uint8_t* from) {
  __m512i packed = _mm512_loadu_si512(from);
  _mm_prefetch(reinterpret_cast<const char*>(from) + kPrefetch, _MM_HINT_T0);
  asm("" : "+v"(packed));  // or else GCC loads it again for every shift
  if constexpr (CodeWords<bits>::bytes == 64) return packed;
  const __m512i quarters = _mm512_permutexvar_epi32(_mm512_loadu_si512(kCodeWords<bits>.quarters), packed);
  return _mm512_shuffle_epi8(quarters, _mm512_loadu_si512(kCodeWords<bits>.moves));
}

// Turns the i-th code of each word into its number, times 2^place if codes are masked. What it needs stays in registers: a load for each number,
// beside that of x, would bound the speed.
template <Format format, int bits>
struct Numbers {
  // A lookup takes four bits: a code of e2m1, or two affine codes of 2 bits, which need one shift and two tables.
  static constexpr bool looked_up = format != Format::affine || bits == 2;
  static constexpr int count = !looked_up ? CodeWords<bits>::codes : format == Format::affine ? 2 : 1;

  Numbers() {
    for (int i = 0; i < count; ++i) {
      float table[16];
      for (int index = 0; index < 16; ++index) table[index] = format == Format::affine ? float(index >> (i * bits) & 3) : kTables.e2m1[index];
      constants[i] = looked_up ? _mm512_loadu_si512(table) : _mm512_loadu_si512(kCodeWords<bits>.masks[i]);
      asm("" : "+v"(constants[i]));  // or else GCC loads it wherever it is used
    }
  }

  __m512 of(__m512i words, int i) const {
    if constexpr (!looked_up) return _mm512_cvtepu32_ps(_mm512_and_si512(words, constants[i]));
    return _mm512_permutexvar_ps(_mm512_srli_epi32(words, unsigned(i / count * 4)), _mm512_castsi512_ps(constants[i % count]));
  }

  __m512i constants[count];
};

// Rearrange x as the words hold their codes: for every sixteen words [codes in a word][16 words], zeros beyond the last, each times 2^-place if codes
// are masked.
template <Format format, int bits>
inline void spread_row(const float* x, int64_t cols, float* spread) {
  constexpr int codes = CodeWords<bits>::codes;
  const __m512i at = _mm512_mullo_epi32(_mm512_set1_epi32(codes), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (int64_t words = cols / codes; words > 0; words -= 16, x += 16 * codes) {
    for (int i = 0; i < codes; ++i, spread += 16) {
      __m512 values = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), first_lanes(words), at, x + i, 4);
      if constexpr (!Numbers<format, bits>::looked_up) values = _mm512_mul_ps(values, _mm512_loadu_ps(kCodeWords<bits>.factors[i]));
      _mm512_storeu_ps(spread, values);
    }
  }
}

}  // namespace metalens::cpu::METALENS_ISA
