#include "ops/gram.h"

#include <memory>

#include "cpu/gram.h"
#include "mlx/ops.h"

namespace metalens {
namespace {

class Gram : public CpuPrimitive {
 public:
  Gram(mx::Stream stream, cpu::Precision precision) : CpuPrimitive(stream), precision_(precision) {
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    dispatch(stream(), inputs, outputs, [precision = precision_](auto& in, auto& out) {
      const int64_t n = in[0].shape(-2), k = in[0].shape(-1);
      const int64_t count = n ? int64_t(out[0].size()) / (n * n) : 0;
      cpu::gram(in[0].template data<void>(), element_of(in[0].dtype()), count, n, k, precision, out[0].template data<void>());
    });
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    auto shape = inputs[0].shape();
    shape.back() = inputs[0].shape(-2);
    return {shape};
  }
  const char* name() const override {
    return "metalens::Gram";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    return precision_ == static_cast<const Gram&>(other).precision_;
  }

 private:
  cpu::Precision precision_;
};

}  // namespace

mx::array gram(const mx::array& x, const std::string& precision, mx::StreamOrDevice s) {
  const auto stream = cpu_stream(s);
  if (x.ndim() < 2 || !is_float(x.dtype())) reject("x must be matrices [..., N, K] of a float type; it is ", x.dtype(), " ", x.shape(), ".");
  auto shape = x.shape();
  shape.back() = x.shape(-2);
  return mx::array(shape, x.dtype(), std::make_shared<Gram>(stream, precision_named(precision)), std::vector<mx::array>{contiguous(x, stream)});
}

}  // namespace metalens
