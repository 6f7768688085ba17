#include "cpu/buffer.h"

#include <new>
#include <vector>

namespace metalens::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};
constexpr std::size_t kWorthKeeping = 64 * 1024;
constexpr std::size_t kKept = 24 * 1024 * 1024;  // per thread

struct Block {
  std::byte* memory;
  std::size_t bytes;
};

// The blocks that no buffer uses now, oldest first.
class Spare {
 public:
  ~Spare() {
    for (const Block& block : blocks_) ::operator delete[](block.memory, kAlignment);
  }

  // A block of exactly this size, or null. A task's buffers have the same sizes as those of the task before it.
  std::byte* take(std::size_t bytes) {
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      if (block->bytes != bytes) continue;
      std::byte* memory = block->memory;
      total_ -= bytes;
      blocks_.erase(block);
      return memory;
    }
    return nullptr;
  }

  void give(Block given) {
    blocks_.push_back(given);
    total_ += given.bytes;
    while (total_ > kKept) {
      total_ -= blocks_.front().bytes;
      ::operator delete[](blocks_.front().memory, kAlignment);
      blocks_.erase(blocks_.begin());
    }
  }

 private:
  std::vector<Block> blocks_;
  std::size_t total_ = 0;
};

thread_local Spare spare;

}  // namespace

std::byte* take_memory(std::size_t bytes) {
  std::byte* memory = bytes >= kWorthKeeping ? spare.take(bytes) : nullptr;
  return memory ? memory : static_cast<std::byte*>(::operator new[](bytes, kAlignment));
}

void give_memory(std::byte* memory, std::size_t bytes) {
  if (bytes >= kWorthKeeping) {
    spare.give({memory, bytes});
  } else {
    ::operator delete[](memory, kAlignment);
  }
}

}  // namespace metalens::cpu
