// Subnormal numbers as zero, in a scope: many CPUs take a hundred cycles for an operation on one.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace metalens::cpu {

// While it lives, operations of this thread read and write subnormal numbers, below 1.2e-38 for float, as zero.
class FlushSubnormals {
 public:
  FlushSubnormals() : before_(mode()) {
    set_mode(before_ | kFlush);
  }
  ~FlushSubnormals() {
    set_mode(before_);
  }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
#if defined(__x86_64__)
  using Mode = unsigned;
  static constexpr Mode kFlush = 0x8040;  // flush to zero, and denormals are zero
  static Mode mode() {
    return _mm_getcsr();
  }
  static void set_mode(Mode mode) {
    _mm_setcsr(mode);
  }
#elif defined(__aarch64__)
  using Mode = uint64_t;
  static constexpr Mode kFlush = uint64_t{1} << 24;
  static Mode mode() {
    Mode mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set_mode(Mode mode) {
    asm volatile("msr fpcr, %0" : : "r"(mode) : "memory");
  }
#else
  using Mode = int;
  static constexpr Mode kFlush = 0;
  static Mode mode() {
    return 0;
  }
  static void set_mode(Mode) {
  }
#endif

  Mode before_;
};

}  // namespace metalens::cpu
