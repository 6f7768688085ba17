// Memory for kernels: aligned to a cache line, not initialized, and kept for the thread's next call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace metalens::cpu {

// Take at least `bytes` bytes, or give them back. The thread keeps what is given back, up to a few megabytes: the system would clear fresh pages one
// fault at a time, which took a twelfth of the time of an operation on a small model.
std::byte* take_memory(std::size_t bytes);
void give_memory(std::byte* memory, std::size_t bytes);

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size = 0) : bytes_(size * sizeof(T)), memory_(size ? take_memory(bytes_) : nullptr) {
  }
  Buffer(Buffer&& other) noexcept : bytes_(std::exchange(other.bytes_, 0)), memory_(std::exchange(other.memory_, nullptr)) {
  }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    std::swap(memory_, other.memory_);
    return *this;
  }
  ~Buffer() {
    if (memory_) give_memory(memory_, bytes_);
  }

  T* data() const {
    return reinterpret_cast<T*>(memory_);
  }

 private:
  std::size_t bytes_;
  std::byte* memory_;
};

}  // namespace metalens::cpu
