#include "ops/compare.h"

#include <memory>

#include "cpu/lens_compare.h"

namespace metalens {
namespace {

// Inputs: a [L, N, D], lse_a [L, N], b, lse_b, the arrays of a's head and, if b has one of its own, those of b's head.
class LensCompare : public CpuPrimitive {
 public:
  LensCompare(mx::Stream stream, HeadSpec head_a, std::optional<HeadSpec> head_b, int arrays_a, cpu::Precision precision)
      : CpuPrimitive(stream), head_a_(head_a), head_b_(head_b), arrays_a_(arrays_a), precision_(precision) {
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return std::vector<mx::Shape>(4, inputs[1].shape());
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    dispatch(stream(), inputs, outputs, [head_a = head_a_, head_b = head_b_, arrays_a = arrays_a_, precision = precision_](auto& in, auto& out) {
      const auto rows = [&](int first) {
        return cpu::LensRows{in[first].shape(0), in[first].template data<float>(), in[first + 1].template data<float>()};
      };
      const cpu::Head of_a = head_a.head(&in[4]);
      const cpu::Head of_b = head_b ? head_b->head(&in[4 + arrays_a]) : cpu::Head{};
      const auto to = [&](int i) { return out[i].template data<float>(); };
      cpu::lens_compare(of_a, head_b ? of_b : of_a, {in[0].shape(1), rows(0), rows(2)}, precision, {to(0), to(1), to(2), to(3)});
    });
  }

  const char* name() const override {
    return "metalens::LensCompare";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const LensCompare&>(other);
    return head_a_ == o.head_a_ && head_b_ == o.head_b_ && precision_ == o.precision_;
  }

 private:
  HeadSpec head_a_;
  std::optional<HeadSpec> head_b_;
  int arrays_a_;  // the number of arrays of a's head
  cpu::Precision precision_;
};

}  // namespace

std::vector<mx::array> lens_compare(
    const mx::array& a,
    const Head& head,
    const mx::array& lse_a,
    const mx::array& b,
    const mx::array& lse_b,
    const Head* head_b,
    const std::string& precision,
    mx::StreamOrDevice s) {
  const auto stream = cpu_stream(s);
  const Head& of_b = head_b ? *head_b : head;
  if (a.ndim() != 3 || b.ndim() != 3) reject("a and b must be [layers, tokens, width], not ", a.shape(), " and ", b.shape(), ".");
  if (b.shape(1) != a.shape(1) || (b.shape(0) != a.shape(0) && b.shape(0) != 1)) {
    reject("b must have the layers of a, or one, and its tokens; a is ", a.shape(), ", b is ", b.shape(), ".");
  }
  if (of_b.spec().vocab != head.spec().vocab) {
    reject("both heads must have one vocabulary; they have ", head.spec().vocab, " and ", of_b.spec().vocab, " tokens.");
  }
  std::vector<mx::array> inputs{
      checked_rows(a, "a", {a.shape(0), a.shape(1), int(head.width())}, stream),
      checked_rows(lse_a, "lse_a", {a.shape(0), a.shape(1)}, stream),
      checked_rows(b, "b", {b.shape(0), b.shape(1), int(of_b.width())}, stream),
      checked_rows(lse_b, "lse_b", {b.shape(0), b.shape(1)}, stream),
  };
  inputs = head.inputs(inputs, stream);
  const int arrays_a = int(inputs.size()) - 4;
  if (head_b) inputs = head_b->inputs(inputs, stream);
  const auto spec_b = head_b ? std::optional(head_b->spec()) : std::nullopt;
  auto primitive = std::make_shared<LensCompare>(stream, head.spec(), spec_b, arrays_a, precision_named(precision));
  return mx::array::make_arrays(primitive->output_shapes(inputs), std::vector<mx::Dtype>(4, mx::float32), primitive, inputs);
}

}  // namespace metalens
