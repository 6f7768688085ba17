#include "cpu/rotary.h"

#include <cmath>
#include <list>
#include <mutex>

#include "cpu/buffer.h"

namespace metalens::cpu {
namespace {

// Cosines, then sines, of every position.
struct Angles {
  Rotary rotary;
  int64_t positions;
  std::vector<float> values;
};

std::shared_ptr<const Angles> computed(const Rotary& rotary, int64_t positions) {
  const int64_t half = rotary.dims / 2;
  auto angles = std::make_shared<Angles>(Angles{rotary, positions, std::vector<float>(2 * positions * half)});
  parallel_for(positions, [&](int64_t t) {
    float* cosines = angles->values.data() + 2 * t * half;
    for (int64_t i = 0; i < half; ++i) {
      const double period = rotary.periods.empty() ? std::pow(double(rotary.base), double(2 * i) / double(rotary.dims)) : double(rotary.periods[i]);
      const double angle = double(rotary.offset + t) * double(rotary.scale) / period;
      cosines[i] = float(std::cos(angle));
      cosines[half + i] = float(std::sin(angle));
    }
  });
  return angles;
}

// All layers of a model turn by the same angles, or by two kinds of them. The last few tables are kept.
std::shared_ptr<const Angles> angles_of(const Rotary& rotary, int64_t positions) {
  constexpr size_t kKept = 4;
  static std::mutex mutex;
  static auto& kept = *new std::list<std::shared_ptr<const Angles>>;  // never destroyed: a thread may outlive the end of main
  {
    std::lock_guard<std::mutex> lock(mutex);
    for (auto it = kept.begin(); it != kept.end(); ++it) {
      if ((*it)->positions != positions || !((*it)->rotary == rotary)) continue;
      kept.splice(kept.begin(), kept, it);
      return kept.front();
    }
  }
  auto angles = computed(rotary, positions);
  std::lock_guard<std::mutex> lock(mutex);
  kept.push_front(angles);
  if (kept.size() > kKept) kept.pop_back();
  return angles;
}

}  // namespace

void rotate_rows(const Rotary& rotary, int64_t positions, const StridedRows& x, const Output& y) {
  if (x.count() == 0 || x.width() == 0) return;
  const int64_t half = rotary.dims / 2, width = x.width();
  const auto angles = angles_of(rotary, positions);
  const int64_t run = std::max<int64_t>(1, 16384 / width);
  parallel_for((x.count() + run - 1) / run, [&](int64_t task) {
    const Buffer<float> scratch(2 * width);
    for (int64_t row = task * run; row < std::min(x.count(), (task + 1) * run); ++row) {
      const float* from = x.read(row, 0, width, scratch.data());
      float* to = y.at(row * width, scratch.data() + width);
      const float* cosines = angles->values.data() + 2 * (row % positions) * half;
      kernels().rotate(from, cosines, cosines + half, half, rotary.pairs, to);
      std::copy(from + rotary.dims, from + width, to + rotary.dims);
      y.finish(row * width, width, to);
    }
  });
}

}  // namespace metalens::cpu
