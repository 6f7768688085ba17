#include "ops/muon.h"

#include <memory>

#include "cpu/muon.h"

namespace metalens {
namespace {

// Inputs: gradient, momentum, the scales that there are.
class MuonDirection : public CpuPrimitive {
 public:
  MuonDirection(
      mx::Stream stream,
      float beta,
      float slack,
      std::vector<cpu::OddPolynomial> polynomials,
      bool has_rows,
      bool has_columns,
      cpu::Precision precision)
      : CpuPrimitive(stream),
        beta_(beta),
        slack_(slack),
        polynomials_(std::move(polynomials)),
        has_rows_(has_rows),
        has_columns_(has_columns),
        precision_(precision) {
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    // V may take the place of the momentum, which an optimizer needs no longer.
    const auto& before = inputs[1];
    const bool reused = before.is_donatable() && before.flags().row_contiguous && before.data_size() == before.size();
    dispatch(
        stream(), inputs, outputs,
        [beta = beta_, slack = slack_, polynomials = polynomials_, has_rows = has_rows_, has_columns = has_columns_, precision = precision_](
            auto& in, auto& out) {
          const cpu::MuonInput from{
              .gradient = in[0].template data<float>(),
              .momentum = in[1].template data<float>(),
              .row_scale = has_rows ? in[2].template data<float>() : nullptr,
              .column_scale = has_columns ? in[2 + has_rows].template data<float>() : nullptr,
              .rows = in[0].shape(0),
              .columns = in[0].shape(1),
              .beta = beta,
              .slack = slack,
              .polynomials = polynomials,
          };
          cpu::muon_direction(from, precision, {out[0].template data<float>(), out[1].template data<float>(), out[2].template data<float>()});
        },
        reused ? &before : nullptr);
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape(), inputs[0].shape(), {2}};
  }
  const char* name() const override {
    return "metalens::MuonDirection";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const MuonDirection&>(other);
    return beta_ == o.beta_ && slack_ == o.slack_ && polynomials_ == o.polynomials_ && has_rows_ == o.has_rows_ && has_columns_ == o.has_columns_ &&
           precision_ == o.precision_;
  }

 private:
  float beta_, slack_;
  std::vector<cpu::OddPolynomial> polynomials_;
  bool has_rows_, has_columns_;
  cpu::Precision precision_;
};

}  // namespace

std::vector<mx::array> muon_direction(
    const mx::array& gradient,
    const mx::array& momentum,
    float beta,
    const std::vector<std::vector<float>>& polynomials,
    float slack,
    const std::optional<mx::array>& row_scale,
    const std::optional<mx::array>& column_scale,
    const std::string& precision,
    mx::StreamOrDevice s) {
  const auto stream = cpu_stream(s);
  if (gradient.ndim() != 2) reject("gradient must be a matrix [N, K]; its shape is ", gradient.shape(), ".");
  const auto shape = gradient.shape();
  std::vector<mx::array> inputs{checked_rows(gradient, "gradient", shape, stream), checked_rows(momentum, "momentum", shape, stream)};
  if (row_scale) inputs.push_back(checked_rows(*row_scale, "row_scale", {shape[0]}, stream));
  if (column_scale) inputs.push_back(checked_rows(*column_scale, "column_scale", {shape[1]}, stream));
  std::vector<cpu::OddPolynomial> odd;
  for (const auto& p : polynomials) {
    if (p.size() != 3) reject("a polynomial must have 3 coefficients, not ", p.size(), ".");
    odd.push_back({p[0], p[1], p[2]});
  }
  auto primitive = std::make_shared<MuonDirection>(
      stream, beta, slack, std::move(odd), row_scale.has_value(), column_scale.has_value(), precision_named(precision));
  return mx::array::make_arrays(primitive->output_shapes(inputs), {mx::float32, mx::float32, mx::float32}, primitive, inputs);
}

}  // namespace metalens
