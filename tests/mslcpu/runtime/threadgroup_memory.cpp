// Threadgroup memory: layout, limits, initialization and data races.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "state.h"

namespace mslcpu {

namespace {

// The last write and two reads of a location. Two reads are enough: if threads of two simdgroups have read, any writer conflicts with one of them. If
// all readers are in one simdgroup, the two latest threads are kept.
struct Cell {
  Stamp write, read[2];
};

// Locations are pairs of bytes, because most accesses are of half or float. A pair that is accessed by single bytes is split for the rest of the
// threadgroup's life.
Cell pairs[kArenaBytes / 2];
Cell bytes_of_pairs[kArenaBytes];
uint32_t split_since[kArenaBytes / 2];
uint8_t owner[kArenaBytes];  // index of the variable + 1; 0: red zone

enum Verdict { kFine, kUninitialized, kWriteWrite, kWriteRead, kReadWrite };

inline uint32_t epoch_of(Stamp stamp) {
  return static_cast<uint32_t>(stamp >> 32);
}

inline Verdict note_read(Cell& cell, Stamp mine, Stamp* other) {
  if (epoch_of(cell.write) < runtime.threadgroup_first_epoch) return kUninitialized;
  if (epoch_of(cell.write) == runtime.threadgroup_epoch && unordered(cell.write, mine)) {
    *other = cell.write;
    return kWriteRead;
  }
  if (cell.read[0] == mine || cell.read[1] == mine) return kFine;
  auto replaceable = [&](Stamp old) {  // the old read finds no race that the new one does not find
    if (epoch_of(old) != runtime.threadgroup_epoch) return true;
    uint32_t difference = static_cast<uint32_t>(old ^ mine);
    return (difference & kStampThread) == 0 || ((difference & kStampThread) < kSimdWidth && !unordered(old, mine));
  };
  if (replaceable(cell.read[0]))
    cell.read[0] = mine;
  else if (replaceable(cell.read[1]) || ((cell.read[0] ^ cell.read[1]) & kStampThread) < kSimdWidth)
    cell.read[1] = mine;
  return kFine;
}

inline Verdict note_write(Cell& cell, Stamp mine, Stamp* other) {
  uint32_t epoch = runtime.threadgroup_epoch;
  if (epoch_of(cell.write) == epoch && unordered(cell.write, mine)) {
    *other = cell.write;
    return kWriteWrite;
  }
  for (Stamp read : cell.read) {
    if (epoch_of(read) == epoch && unordered(read, mine)) {
      *other = read;
      return kReadWrite;
    }
  }
  cell.write = mine;
  return kFine;
}

[[noreturn]] void report(Verdict verdict, uint32_t byte, Stamp mine, Stamp other, const void* pc) {
  const ThreadgroupVariable& v = runtime.variables[owner[byte] - 1];
  if (verdict == kUninitialized) MSLCPU_FAIL(pc, "read of uninitialized threadgroup memory: byte %u of '%s'", byte - v.offset, v.name);
  const char* what = verdict == kWriteWrite ? "write-write" : verdict == kWriteRead ? "write-read" : "read-write";
  MSLCPU_FAIL(
      pc, "threadgroup data race (%s, no barrier between): byte %u of '%s', threads %u and %u", what, byte - v.offset, v.name,
      static_cast<uint32_t>(other) & kStampThread, static_cast<uint32_t>(mine) & kStampThread);
}

[[noreturn]] void report_out_of_bounds(uint32_t offset, uint64_t bytes, bool write, const void* pc) {
  const ThreadgroupVariable* nearest = nullptr;
  for (const ThreadgroupVariable& v : runtime.variables) {
    if (v.offset <= offset) nearest = &v;
  }
  if (!nearest && !runtime.variables.empty()) nearest = &runtime.variables[0];
  int64_t byte = nearest ? static_cast<int64_t>(offset) - nearest->offset : offset;
  MSLCPU_FAIL(
      pc, "out-of-bounds threadgroup %s of %lu bytes at byte %ld of '%s' (%u bytes)", write ? "write" : "read", bytes, byte,
      nearest ? nearest->name : "?", nearest ? nearest->bytes : 0);
}

}  // namespace

void reset_threadgroup_epochs_if_used_up() {
  if (runtime.threadgroup_epoch < 1u << 31) return;
  memset(pairs, 0, sizeof pairs);
  memset(bytes_of_pairs, 0, sizeof bytes_of_pairs);
  memset(split_since, 0, sizeof split_since);
  runtime.threadgroup_epoch = runtime.threadgroup_first_epoch = 1;
}

void begin_threadgroup_memory() {
  if (!runtime.arena) {
    void* memory = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) abort();
    runtime.arena = static_cast<uint8_t*>(memory);
  }
  // Every variable is filled with NaNs when it is declared; here only the previous threadgroup's variables are forgotten.
  for (const ThreadgroupVariable& v : runtime.variables) memset(owner + v.offset, 0, v.bytes);
  runtime.arena_used = 0;
  runtime.variables.clear();
  runtime.threadgroup_first_epoch = ++runtime.threadgroup_epoch;
  runtime.launch->threadgroup_bytes = 0;
}

void* declare_threadgroup_variable(int64_t id, uint64_t bytes, const char* name, const void* pc) {
  for (const ThreadgroupVariable& v : runtime.variables) {
    if (v.id == id && v.bytes == bytes) return runtime.arena + v.offset;
  }
  uint64_t total = runtime.launch->threadgroup_bytes + ((bytes + 15) & ~15ull);
  if (bytes > kThreadgroupLimit || total > kThreadgroupLimit) {
    MSLCPU_FAIL(pc, "threadgroup memory limit: %lu bytes with '%s', at most %u", total, name, kThreadgroupLimit);
  }
  uint32_t offset = (runtime.arena_used + kRedZone + 255) & ~255u;
  if (offset + bytes + kRedZone > kArenaBytes) MSLCPU_FAIL(pc, "more than %zu threadgroup variables", runtime.variables.size());
  runtime.variables.push_back({id, name, offset, static_cast<uint32_t>(bytes)});
  memset(owner + offset, static_cast<int>(runtime.variables.size()), bytes);
  memset(runtime.arena + offset, 0xFF, bytes);
  runtime.arena_used = offset + static_cast<uint32_t>(bytes);
  runtime.launch->threadgroup_bytes = static_cast<uint32_t>(total);
  return runtime.arena + offset;
}

void check_threadgroup_access(uint32_t offset, uint64_t bytes, bool write, bool atomic, const void* pc) {
  if (bytes == 0) return;
  if (offset + bytes > kArenaBytes || !owner[offset] || owner[offset] != owner[offset + bytes - 1]) {
    report_out_of_bounds(offset, bytes, write, pc);
  }
  (write ? runtime.launch->threadgroup_written : runtime.launch->threadgroup_read) += bytes;
  if (runtime.launch->instructions) note_access(kThreadgroupMemory, offset, bytes, write, pc);
  Stamp mine = static_cast<Stamp>(runtime.threadgroup_epoch) << 32 | runtime.current->threadgroup_low | (atomic ? kStampAtomic : 0);
  Stamp other = 0;
  uint32_t end = offset + static_cast<uint32_t>(bytes);
  for (uint32_t pair = offset / 2; pair <= (end - 1) / 2; pair++) {
    bool whole = 2 * pair >= offset && 2 * pair + 2 <= end;
    bool split = split_since[pair] == runtime.threadgroup_first_epoch;
    if (whole && !split) {
      Verdict verdict = write ? note_write(pairs[pair], mine, &other) : note_read(pairs[pair], mine, &other);
      if (verdict != kFine) report(verdict, 2 * pair, mine, other, pc);
      continue;
    }
    if (!split) {
      split_since[pair] = runtime.threadgroup_first_epoch;
      bytes_of_pairs[2 * pair] = bytes_of_pairs[2 * pair + 1] = pairs[pair];
    }
    for (uint32_t byte = 2 * pair; byte < 2 * pair + 2; byte++) {
      if (byte < offset || byte >= end) continue;
      Verdict verdict = write ? note_write(bytes_of_pairs[byte], mine, &other) : note_read(bytes_of_pairs[byte], mine, &other);
      if (verdict != kFine) report(verdict, byte, mine, other, pc);
    }
  }
}

}  // namespace mslcpu
