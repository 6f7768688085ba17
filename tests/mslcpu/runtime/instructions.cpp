// Instructions of whole simdgroups, put together from the accesses of single lanes: their widths, the cache lines that they touch in device memory,
// and the bank conflicts in threadgroup memory.
//
// Lanes run one after another between two collectives, and each keeps a log. The logs are compared when all lanes wait. Accesses of the same line of
// code that are the n-th ones of their lanes since the last collective form one instruction. This is what a GPU does as long as lanes that leave a
// loop do not come back to it. If lanes skip some passes of a loop, their later passes are put together with earlier ones of other lanes.
#include <algorithm>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "state.h"

namespace mslcpu {

namespace {

// Assumptions; Apple publishes neither. README.md names them.
constexpr uint32_t kBanks = 32, kBankBytes = 4;
constexpr uint64_t kLineBytes = 64;

struct Access {
  const void* pc;
  uint64_t address;  // in threadgroup memory the offset
  uint32_t bytes;
  uint16_t buffer;  // or kThreadgroupMemory
  bool write;
};

std::vector<Access> logs[kSimdWidth];
bool any_access = false;

uint32_t width_index(uint64_t bytes) {
  uint32_t index = 0;
  while (index + 1 < kWidths && (1ull << index) < bytes) index++;
  return index;
}

// Every bank serves one word in a cycle, to all lanes that want it. The lanes' words may be served in any order, so this is the fewest cycles that
// such a memory can take.
void count_banks(const Access* const* lanes, size_t count, Accesses& to) {
  static std::vector<uint64_t> words;
  words.clear();
  for (size_t i = 0; i < count; i++) {
    const Access& access = *lanes[i];
    for (uint64_t w = access.address / kBankBytes; w <= (access.address + access.bytes - 1) / kBankBytes; w++) words.push_back(w);
  }
  std::sort(words.begin(), words.end());
  words.erase(std::unique(words.begin(), words.end()), words.end());
  uint32_t per_bank[kBanks] = {};
  for (uint64_t word : words) per_bank[word % kBanks]++;
  uint64_t cycles = *std::max_element(per_bank, per_bank + kBanks);
  to.cycles += cycles;
  to.conflicts += cycles - (words.size() + kBanks - 1) / kBanks;
}

// Lanes of one instruction may access several buffers, through pointers that differ. Each line belongs to its buffer; the instruction counts for the
// first lane's.
void count_lines(const Access* const* lanes, size_t count) {
  static std::vector<std::pair<uint64_t, uint16_t>> lines;
  lines.clear();
  for (size_t i = 0; i < count; i++) {
    const Access& access = *lanes[i];
    for (uint64_t l = access.address / kLineBytes; l <= (access.address + access.bytes - 1) / kLineBytes; l++) lines.push_back({l, access.buffer});
  }
  std::sort(lines.begin(), lines.end());
  lines.erase(std::unique(lines.begin(), lines.end()), lines.end());
  for (const auto& line : lines) {
    Buffer& buffer = runtime.launch->buffers[line.second];
    (lanes[0]->write ? buffer.stores : buffer.loads).lines++;
  }
}

void count_instruction(const Access* const* lanes, size_t count) {
  const Access& first = *lanes[0];
  if (first.buffer == kThreadgroupMemory) {
    Accesses& to = first.write ? runtime.launch->threadgroup_stores : runtime.launch->threadgroup_loads;
    to.instructions[width_index(first.bytes)]++;
    count_banks(lanes, count, to);
  } else {
    Buffer& buffer = runtime.launch->buffers[first.buffer];
    (first.write ? buffer.stores : buffer.loads).instructions[width_index(first.bytes)]++;
    count_lines(lanes, count);
  }
}

// Where lanes took different paths: match the accesses from `from` on by their code and their number.
void count_divergent(size_t from) {
  struct Numbered {
    const Access* access;
    uint32_t number;
    uint32_t lane;
    bool operator==(const Numbered& other) const {
      return access->pc == other.access->pc && number == other.number;
    }
    bool operator<(const Numbered& other) const {
      return std::tie(access->pc, number, lane) < std::tie(other.access->pc, other.number, other.lane);
    }
  };
  std::vector<Numbered> all;
  for (uint32_t lane = 0; lane < kSimdWidth; lane++) {
    std::unordered_map<const void*, uint32_t> seen;
    const auto& log = logs[lane];
    for (size_t i = from; i < log.size(); i++) all.push_back({&log[i], seen[log[i].pc]++, lane});
  }
  std::sort(all.begin(), all.end());
  const Access* lanes[kSimdWidth];
  for (size_t i = 0; i < all.size();) {
    size_t count = 0;
    for (size_t first = i; i < all.size() && all[i] == all[first]; i++) {
      lanes[count++] = all[i].access;
    }
    count_instruction(lanes, count);
  }
}

}  // namespace

void note_access(uint32_t buffer, uint64_t address, uint64_t bytes, bool write, const void* pc) {
  logs[runtime.current->context.lane].push_back({pc, address, static_cast<uint32_t>(bytes), static_cast<uint16_t>(buffer), write});
  any_access = true;
}

void forget_accesses() {
  for (auto& log : logs) log.clear();
  any_access = false;
}

void count_instructions() {
  if (!any_access) return;
  size_t longest = 0;
  for (const auto& log : logs) longest = std::max(longest, log.size());
  const Access* lanes[kSimdWidth];
  for (size_t i = 0; i < longest; i++) {
    size_t count = 0;
    for (const auto& log : logs) {
      if (i < log.size()) lanes[count++] = &log[i];
    }
    if (!std::all_of(lanes, lanes + count, [&](const Access* a) { return a->pc == lanes[0]->pc; })) {
      count_divergent(i);
      break;
    }
    count_instruction(lanes, count);
  }
  forget_accesses();
}

}  // namespace mslcpu
