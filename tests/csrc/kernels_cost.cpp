// Runs one small case of a kernel, named on the command line, in a function of its own: test_instruction_counts.py counts the instructions in it.
#include <functional>
#include <memory>
#include <string>

#include "check_head.h"
#include "cpu/gemm.h"
#include "cpu/lens_kl.h"
#include "cpu/lens_stats.h"
#include "cpu/lens_target.h"
#include "cpu/thread_pool.h"

using namespace check;

extern "C" [[gnu::noinline]] void measured(const std::function<void()>& kernel) {
  kernel();
  asm volatile("" ::: "memory");  // not a tail call, which would leave the function too early
}

namespace {

constexpr int64_t kLayers = 8, kTokens = 8, kWidth = 64, kVocabulary = 1000;

void cost_of_product(int64_t rows) {
  const Frozen w(256, 256, kFourBits);
  const std::vector<float> a = normals(rows * 256, 1);
  std::vector<float> c(rows * 256);
  measured([&] { gemm(a.data(), rows, 256, 256, w.matrix(), true, Precision::float32, c.data()); });
}

void cost_of_head(bool gradient) {
  const TestHead test({kLayers, kTokens, kWidth, kVocabulary, 0, kFourBits, false, 1, 0, 0.5f});
  const Head head = test.head();
  const std::vector<float> model = test.rows(kTokens), n = test.around(model);
  constexpr int64_t rows = kLayers * kTokens;
  std::vector<float> lse(rows), entropy(rows), most(rows), logits(rows), kl(rows), nll(rows), mean(kTokens * kWidth), dn(rows * kWidth);
  std::vector<int32_t> ids(rows), rank(rows), labels(kTokens, 17);
  const std::unique_ptr<bool[]> agrees(new bool[rows]);
  const LensStatsOutput out{lse.data(), entropy.data(), most.data(), ids.data(), logits.data(),
                            kl.data(),  agrees.get(),   nullptr,     nll.data(), rank.data()};
  if (gradient) {
    lens_target(head, model.data(), kTokens, Precision::float32, {lse.data(), entropy.data(), mean.data()});
    const LensKLInput in{kLayers, kTokens, n.data(), model.data(), lse.data(), mean.data()};
    measured([&] { lens_kl(head, in, Precision::float32, kl.data(), dn.data()); });
  } else {
    const LensStatsInput in{kLayers, kTokens, n.data(), model.data(), labels.data(), 1, 1, false};
    measured([&] { lens_stats(head, in, Precision::float32, out); });
  }
}

}  // namespace

int main(int, char** arguments) {
  kernels();  // chosen first, because the detection of the CPU is no part of any case
  num_threads();
  const std::string name = arguments[1] ? arguments[1] : "";
  if (name == "gemm") {
    cost_of_product(64);
  } else if (name == "matvec_rows") {
    cost_of_product(1);
  } else if (name == "lens_stats" || name == "lens_kl") {
    cost_of_head(name == "lens_kl");
  } else {
    std::puts("usage: kernels_cost gemm|matvec_rows|lens_stats|lens_kl");
    return 2;
  }
  return 0;
}
