// Memory for kernels: aligned to a cache line, not initialized, and kept for the next call of the same thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace metalens::cpu {

// At least this many bytes. What is given back is kept by the thread, up to a few megabytes: fresh pages would be cleared by the system one fault at
// a time, which cost a twelfth of an operation on a small model.
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
