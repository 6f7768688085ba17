#include "cpu/gram.h"

#include <cstring>

#include "cpu/symmetric_tiles.h"
#include "cpu/thread_pool.h"

namespace metalens::cpu {

void gram(const void* x, Element element, int64_t count, int64_t n, int64_t k, Precision precision, void* c) {
  if (count == 0 || n == 0) return;
  const int64_t size = element_size(element);
  if (k == 0) {
    std::memset(c, 0, count * n * n * size);
    return;
  }
  // bfloat16 elements lose nothing on a multiplier of that type.
  SymmetricTiles tiles(multiplier(element == Element::bf16 ? Precision::bf16 : precision), element, n, k);
  for (int64_t i = 0; i < count; ++i) {
    tiles.pack(static_cast<const std::byte*>(x) + i * n * k * size, false);
    std::byte* result = static_cast<std::byte*>(c) + i * n * n * size;
    parallel_for(int64_t(tiles.tasks().size()), [&](int64_t t) {
      const auto& task = tiles.tasks()[t];
      const Buffer<float> block(SymmetricTiles::kRows * SymmetricTiles::kColumns);
      tiles.multiply(task, block.data());
      tiles.write_mirrored(task, block.data(), result);
    });
  }
}

}  // namespace metalens::cpu
