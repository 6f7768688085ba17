#include "ops/activation.h"

#include <algorithm>
#include <memory>

#include "cpu/thread_pool.h"
#include "mlx/ops.h"

namespace metalens {
namespace {

constexpr int64_t kRun = 16384;  // elements per task

class SwiGLU : public CpuPrimitive {
 public:
  using CpuPrimitive::CpuPrimitive;

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    dispatch(stream(), inputs, outputs, [](auto& in, auto& out) {
      const int64_t size = int64_t(out[0].size());
      const float *gate = in[0].template data<float>(), *x = in[1].template data<float>();
      float* y = out[0].template data<float>();
      cpu::parallel_for((size + kRun - 1) / kRun, [&](int64_t i) {
        const int64_t first = i * kRun;
        cpu::kernels().swiglu(gate + first, x + first, std::min(kRun, size - first), y + first);
      });
    });
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }
  const char* name() const override {
    return "metalens::SwiGLU";
  }
  bool is_equivalent(const mx::Primitive&) const override {
    return true;
  }
};

}  // namespace

mx::array swiglu(const mx::array& gate, const mx::array& x, mx::StreamOrDevice s) {
  const auto stream = cpu_stream(s);
  if (gate.shape() != x.shape() || gate.dtype() != x.dtype() || !is_float(x.dtype())) {
    reject("gate and x must have one shape and one float type; they are ", gate.dtype(), " ", gate.shape(), " and ", x.dtype(), " ", x.shape(), ".");
  }
  const std::vector<mx::array> inputs{as_rows(gate, stream), as_rows(x, stream)};
  const auto y = mx::array(gate.shape(), mx::float32, std::make_shared<SwiGLU>(stream), inputs);
  return mx::astype(y, x.dtype(), stream);
}

}  // namespace metalens
