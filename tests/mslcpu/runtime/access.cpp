// The callbacks of clang's kernel address sanitizer, which calls them for every load and store of a checked kernel. The handlers of the
// undefined-behavior sanitizer for alignment, array bounds and division are here too.
#include <cstring>

#include "state.h"

namespace mslcpu {

void check_access(uint8_t* address, uint64_t bytes, bool write, bool atomic, const void* pc) {
  if (!runtime.current) return;
  if (runtime.attention) attend();
  uint64_t offset = static_cast<uint64_t>(address - runtime.arena);
  if (offset < kArenaBytes) return check_threadgroup_access(static_cast<uint32_t>(offset), bytes, write, atomic, pc);
  if (static_cast<uint64_t>(address - runtime.stacks) < runtime.stacks_bytes) return;
  if (!write && address >= runtime.image_begin && address < runtime.image_end) return;  // the kernel's constants
  check_device_access(address, bytes, write, atomic, pc);
}

namespace {

// The beginning of the records that clang passes to the undefined-behavior handlers: the fields that are reported.
struct TypeMismatch {
  const char* file;
  uint32_t line, column;
  const void* type;
  uint8_t log_alignment;
  uint8_t check_kind;
};

const char* check_kind_name(uint8_t kind) {
  return kind == 0 ? "load" : kind == 1 ? "store" : "use";
}

}  // namespace

}  // namespace mslcpu

#pragma GCC visibility push(default)
#define MSLCPU_PC __builtin_return_address(0)

using namespace mslcpu;

#define MSLCPU_ACCESS(SIZE)                                        \
  extern "C" void __asan_load##SIZE##_noabort(uint8_t* address) {  \
    check_access(address, SIZE, false, false, MSLCPU_PC);          \
  }                                                                \
  extern "C" void __asan_store##SIZE##_noabort(uint8_t* address) { \
    check_access(address, SIZE, true, false, MSLCPU_PC);           \
  }

MSLCPU_ACCESS(1)
MSLCPU_ACCESS(2)
MSLCPU_ACCESS(4)
MSLCPU_ACCESS(8)
MSLCPU_ACCESS(16)

extern "C" {

void __asan_loadN_noabort(uint8_t* address, uint64_t bytes) {
  check_access(address, bytes, false, false, MSLCPU_PC);
}

void __asan_storeN_noabort(uint8_t* address, uint64_t bytes) {
  check_access(address, bytes, true, false, MSLCPU_PC);
}

void* __asan_memcpy(void* to, const void* from, uint64_t bytes) {
  check_access(static_cast<uint8_t*>(const_cast<void*>(from)), bytes, false, false, MSLCPU_PC);
  check_access(static_cast<uint8_t*>(to), bytes, true, false, MSLCPU_PC);
  return memcpy(to, from, bytes);
}

void* __asan_memmove(void* to, const void* from, uint64_t bytes) {
  check_access(static_cast<uint8_t*>(const_cast<void*>(from)), bytes, false, false, MSLCPU_PC);
  check_access(static_cast<uint8_t*>(to), bytes, true, false, MSLCPU_PC);
  return memmove(to, from, bytes);
}

void* __asan_memset(void* to, int value, uint64_t bytes) {
  check_access(static_cast<uint8_t*>(to), bytes, true, false, MSLCPU_PC);
  return memset(to, value, bytes);
}

void __asan_handle_no_return() {
}

void __ubsan_handle_type_mismatch_v1_abort(const TypeMismatch* data, uint64_t pointer) {
  MSLCPU_FAIL(
      MSLCPU_PC, "misaligned %s: address %#lx is not a multiple of %u", check_kind_name(data->check_kind), pointer, 1u << data->log_alignment);
}

void __ubsan_handle_out_of_bounds_abort(const void*, uint64_t index) {
  MSLCPU_FAIL(MSLCPU_PC, "array index %ld out of bounds", static_cast<int64_t>(index));
}

void __ubsan_handle_divrem_overflow_abort(const void*, uint64_t, uint64_t) {
  MSLCPU_FAIL(MSLCPU_PC, "integer division by zero or overflow");
}

}  // extern "C"
