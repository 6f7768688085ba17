// Device memory: bounds, initialization of outputs, races through outputs, and traffic counts.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "state.h"

namespace mslcpu {

namespace {

// The shadow memory of one buffer, mapped lazily: its cost is proportional to the pages that a kernel touches, not to the buffer's size.
struct Shadow {
  uint8_t* flags = nullptr;  // per byte
  size_t flags_bytes = 0;
  Stamp* writer = nullptr;  // per granule, outputs only: the last writer and the last reader
  Stamp* reader = nullptr;
  size_t stamps_bytes = 0;
  uint32_t granule_shift = 0;
};

constexpr uint64_t kRead = 0x0101010101010101ull, kWritten = 0x0202020202020202ull;

Shadow shadows[kMaxBuffers];
uint32_t last_hit = 0;

// A store over bytes that another thread wrote. It is a race only if it changes them, which is known after the store.
struct {
  bool active = false;
  uint8_t* address;
  uint32_t bytes;
  uint8_t before[64];
  uint32_t buffer, other_thread, thread;
  bool other_group;
  Fiber* fiber;  // the fiber that stored
  const void* pc;
} pending;

void* map_lazily(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) abort();
  return memory;
}

inline uint64_t load_bytes(const uint8_t* from, uint64_t count) {
  uint64_t value = 0;
  if (count == 8)
    memcpy(&value, from, 8);
  else if (count == 4)
    memcpy(&value, from, 4);
  else
    memcpy(&value, from, count);
  return value;
}

// Set `bit` in the flags of the bytes, add the number of bytes that did not have it, and return the union and intersection of the flags before.
struct Before {
  uint64_t any, all;
};
inline Before set_flags(uint8_t* flags, uint64_t bytes, uint64_t bit, uint64_t* unique) {
  Before before{0, ~0ull};
  while (bytes) {
    uint64_t count = bytes < 8 ? bytes : 8;
    uint64_t mask = count == 8 ? ~0ull : (1ull << (8 * count)) - 1;
    uint64_t old = load_bytes(flags, count);
    uint64_t added = ~old & bit & mask;
    if (added) {
      *unique += static_cast<uint64_t>(__builtin_popcountll(added));
      uint64_t updated = old | added;
      memcpy(flags, &updated, count);
    }
    before.any |= old;
    before.all &= old | ~mask;
    flags += count;
    bytes -= count;
  }
  return before;
}

inline bool conflicting(Stamp other, Stamp mine, bool* other_group) {
  if (other == 0) return false;
  uint32_t epoch = static_cast<uint32_t>(other >> 32);
  *other_group = epoch < runtime.device_first_epoch;
  if (*other_group) return !(other & mine & kStampAtomic);
  return epoch == runtime.device_epoch && unordered(other, mine);
}

const char* elsewhere(bool other_group) {
  return other_group ? " of another threadgroup" : "";
}

uint32_t thread_of(Stamp stamp) {
  return static_cast<uint32_t>(stamp) & kStampThread;
}

[[noreturn]] void report_out_of_bounds(uint8_t* address, uint64_t bytes, bool write, const void* pc) {
  const Launch& launch = *runtime.launch;
  int64_t nearest = -1, distance = 0;
  for (uint32_t i = 0; i < launch.buffer_count; i++) {
    const Buffer& b = launch.buffers[i];
    int64_t from_start = address - (b.data - b.before);
    int64_t d = from_start < 0 ? -from_start : address - (b.data + b.bytes);
    if (nearest < 0 || d < distance) nearest = i, distance = d;
  }
  if (nearest < 0) MSLCPU_FAIL(pc, "out-of-bounds %s of %lu bytes at address %p", write ? "write" : "read", bytes, static_cast<void*>(address));
  const Buffer& b = launch.buffers[nearest];
  MSLCPU_FAIL(
      pc, "out-of-bounds device %s of %lu bytes at byte %ld of buffer %ld (%lu bytes)", write ? "write" : "read", bytes,
      static_cast<int64_t>(address - b.data), nearest, b.bytes);
}

void check_output_read(uint32_t index, uint64_t at, uint64_t bytes, Before before, Stamp mine, const void* pc) {
  Shadow& shadow = shadows[index];
  const Buffer& buffer = runtime.launch->buffers[index];
  bool all_written = (before.all & kWritten) == kWritten;
  if (!all_written && !(buffer.flags & kInitialized)) {
    MSLCPU_FAIL(pc, "read of uninitialized output: byte %lu of buffer %u", at, index);
  }
  for (uint64_t g = at >> shadow.granule_shift; g <= (at + bytes - 1) >> shadow.granule_shift; g++) {
    bool other_group;
    if ((before.any & kWritten) && conflicting(shadow.writer[g], mine, &other_group)) {
      MSLCPU_FAIL(
          pc, "device data race: thread %u reads byte %lu of buffer %u, which thread %u%s wrote", thread_of(mine), at, index,
          thread_of(shadow.writer[g]), elsewhere(other_group));
    }
    shadow.reader[g] = mine;
  }
}

void check_output_write(uint32_t index, uint64_t at, uint64_t bytes, Before before, Stamp mine, const void* pc) {
  Shadow& shadow = shadows[index];
  const Buffer& buffer = runtime.launch->buffers[index];
  uint64_t first = at >> shadow.granule_shift, last = (at + bytes - 1) >> shadow.granule_shift;
  bool other_group;
  if (before.any & kRead) {
    for (uint64_t g = first; g <= last; g++) {
      if (!conflicting(shadow.reader[g], mine, &other_group)) continue;
      MSLCPU_FAIL(
          pc, "device data race: thread %u writes byte %lu of buffer %u, which thread %u%s has read", thread_of(mine), at, index,
          thread_of(shadow.reader[g]), elsewhere(other_group));
    }
  }
  if (before.any & kWritten) {
    for (uint64_t g = first; g <= last; g++) {
      if (!conflicting(shadow.writer[g], mine, &other_group)) continue;
      pending.active = true;
      pending.address = buffer.data - buffer.before + at;
      pending.bytes = static_cast<uint32_t>(bytes < sizeof pending.before ? bytes : sizeof pending.before);
      memcpy(pending.before, pending.address, pending.bytes);
      pending.buffer = index;
      pending.thread = thread_of(mine);
      pending.other_thread = thread_of(shadow.writer[g]);
      pending.other_group = other_group;
      pending.fiber = runtime.current;
      pending.pc = pc;
      runtime.attention = true;
      break;
    }
  }
  for (uint64_t g = first; g <= last; g++) shadow.writer[g] = mine;
}

}  // namespace

void begin_device_memory() {
  Launch& launch = *runtime.launch;
  for (uint32_t i = 0; i < launch.buffer_count; i++) {
    Buffer& b = launch.buffers[i];
    Shadow& s = shadows[i];
    uint64_t bytes = b.before + b.bytes;
    s = Shadow{};
    s.flags_bytes = bytes + 8;
    s.flags = static_cast<uint8_t*>(map_lazily(s.flags_bytes));
    if (!(b.flags & kWritable)) continue;
    while (s.granule_shift < 3 && (2u << s.granule_shift) <= b.itemsize) s.granule_shift++;
    s.stamps_bytes = ((bytes >> s.granule_shift) + 1) * sizeof(Stamp);
    s.writer = static_cast<Stamp*>(map_lazily(s.stamps_bytes));
    s.reader = static_cast<Stamp*>(map_lazily(s.stamps_bytes));
  }
  last_hit = 0;
  pending.active = false;
  runtime.device_epoch = runtime.device_first_epoch = 1;
}

void end_device_memory() {
  for (Shadow& s : shadows) {
    if (s.flags) munmap(s.flags, s.flags_bytes);
    if (s.writer) munmap(s.writer, s.stamps_bytes);
    if (s.reader) munmap(s.reader, s.stamps_bytes);
    s = Shadow{};
  }
}

void finish_pending_write() {
  if (!pending.active) return;
  pending.active = false;
  if (memcmp(pending.address, pending.before, pending.bytes) == 0) return;
  Fiber* running = runtime.current;
  runtime.current = pending.fiber;
  record_failure(
      pending.pc, "device data race: threads %u%s and %u store different values to the same bytes of buffer %u", pending.other_thread,
      elsewhere(pending.other_group), pending.thread, pending.buffer);
  runtime.current = running;
  if (runtime.current) abandon_thread();
}

void attend() {
  runtime.attention = false;
  finish_pending_write();
  if (runtime.timed_out) {
    record_failure(nullptr, "kernel did not finish within %g s", runtime.launch->timeout);
    if (runtime.current) abandon_thread();
  }
}

void check_device_access(uint8_t* address, uint64_t bytes, bool write, bool atomic, const void* pc) {
  Launch& launch = *runtime.launch;
  uint32_t index = last_hit;
  uint64_t at = 0;
  for (uint32_t tried = 0;; tried++) {
    if (tried == launch.buffer_count) report_out_of_bounds(address, bytes, write, pc);
    if (index >= launch.buffer_count) index = 0;
    const Buffer& b = launch.buffers[index];
    at = static_cast<uint64_t>(address - (b.data - b.before));
    if (at < b.before + b.bytes) {
      if (at + bytes > b.before + b.bytes) report_out_of_bounds(address, bytes, write, pc);
      break;
    }
    index++;
  }
  last_hit = index;
  Buffer& buffer = launch.buffers[index];
  if (bytes == 0) return;
  if (write && !(buffer.flags & kWritable))
    MSLCPU_FAIL(pc, "write to input buffer %u (byte %ld)", index, static_cast<int64_t>(address - buffer.data));
  (write ? buffer.written : buffer.read) += bytes;
  if (launch.instructions) note_access(index, reinterpret_cast<uint64_t>(address), bytes, write, pc);
  Before before = set_flags(shadows[index].flags + at, bytes, write ? kWritten : kRead, write ? &buffer.unique_written : &buffer.unique_read);
  if (!(buffer.flags & kWritable)) return;
  Stamp mine = static_cast<Stamp>(runtime.device_epoch) << 32 | runtime.current->device_low | (atomic ? kStampAtomic : 0);
  if (write)
    check_output_write(index, at, bytes, before, mine, pc);
  else
    check_output_read(index, at, bytes, before, mine, pc);
}

}  // namespace mslcpu
