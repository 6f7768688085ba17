#include "ops/symmetric_product.h"

#include <memory>

#include "cpu/symmetric_product.h"
#include "mlx/ops.h"

namespace metalens {
namespace {

class SymmetricProduct : public CpuPrimitive {
 public:
  SymmetricProduct(mx::Stream stream, cpu::Precision precision) : CpuPrimitive(stream), precision_(precision) {
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    dispatch(stream(), inputs, outputs, [precision = precision_](auto& in, auto& out) {
      const int64_t n = in[0].shape(-2), k = in[0].shape(-1);
      const int64_t count = n ? int64_t(out[0].size()) / (n * n) : 0;
      cpu::symmetric_product(
          in[0].template data<void>(), in[1].template data<void>(), element_of(in[0].dtype()), count, n, k, precision, out[0].template data<void>());
    });
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    auto shape = inputs[0].shape();
    shape.back() = inputs[0].shape(-2);
    return {shape};
  }
  const char* name() const override {
    return "metalens::SymmetricProduct";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    return precision_ == static_cast<const SymmetricProduct&>(other).precision_;
  }

 private:
  cpu::Precision precision_;
};

}  // namespace

mx::array symmetric_product(const mx::array& a, const mx::array& b, const std::string& precision, mx::StreamOrDevice s) {
  const auto stream = cpu_stream(s);
  if (a.ndim() < 2 || a.shape() != b.shape() || a.dtype() != b.dtype() || !is_float(a.dtype())) {
    reject(
        "a and b must be matrices [..., N, K] of one shape and one float type; they are ", a.dtype(), " ", a.shape(), " and ", b.dtype(), " ",
        b.shape(), ".");
  }
  auto shape = a.shape();
  shape.back() = a.shape(-2);
  const std::vector<mx::array> inputs{contiguous(a, stream), contiguous(b, stream)};
  return mx::array(shape, a.dtype(), std::make_shared<SymmetricProduct>(stream, precision_named(precision)), inputs);
}

}  // namespace metalens
