#include "cpu/norm_rows.h"

#include "cpu/buffer.h"

namespace metalens::cpu {

void norm_rows(const StridedRows& x, const Norm& norm, const Output& n) {
  const int64_t d = x.width();
  if (d == 0) return;
  const int64_t run = std::max<int64_t>(1, 16384 / d);
  parallel_for((x.count() + run - 1) / run, [&](int64_t task) {
    const Buffer<float> scratch(d);
    for (int64_t row = task * run; row < std::min(x.count(), (task + 1) * run); ++row) {
      float* to = n.at(row * d, scratch.data());
      kernels().normalize(x.read(row, 0, d, scratch.data()), norm.gain, norm.bias, d, norm.eps, norm.center, to);
      n.finish(row * d, d, to);
    }
  });
}

}  // namespace metalens::cpu
