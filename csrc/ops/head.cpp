#include "ops/head.h"

#include <initializer_list>
#include <memory>
#include <utility>

#include "cpu/lens_kl.h"
#include "cpu/lens_stats.h"
#include "cpu/lens_target.h"
#include "mlx/ops.h"

namespace metalens {
namespace {

// The inputs of these primitives, without those of the head.
enum class Slot { n, n_model, labels, lse, mean };

// The slots that a primitive uses, in the order of its inputs. The head's arrays follow them.
class InputSlots {
 public:
  InputSlots(std::initializer_list<std::pair<Slot, bool>> slots) {
    for (const auto& [slot, used] : slots) {
      if (used) used_.push_back(slot);
    }
  }
  bool operator==(const InputSlots&) const = default;

  // The data in a slot, or null if the primitive does not use it.
  template <typename T>
  const T* data(const std::vector<mx::array>& inputs, Slot slot) const {
    for (size_t i = 0; i < used_.size(); ++i) {
      if (used_[i] == slot) return inputs[i].data<T>();
    }
    return nullptr;
  }
  // The first of the head's arrays.
  const mx::array* head(const std::vector<mx::array>& inputs) const {
    return &inputs[used_.size()];
  }

 private:
  std::vector<Slot> used_;
};

// A primitive over rows and a head. Its first input is the rows, n or n_model.
class HeadPrimitive : public CpuPrimitive {
 public:
  HeadPrimitive(mx::Stream stream, HeadSpec head, cpu::Precision precision, InputSlots slots)
      : CpuPrimitive(stream), head_(head), precision_(precision), slots_(std::move(slots)) {
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const HeadPrimitive&>(other);
    return head_ == o.head_ && precision_ == o.precision_ && slots_ == o.slots_;
  }

 protected:
  // The inputs of a call under vmap, which maps n only: a mapped axis is just more layers.
  std::vector<mx::array> as_layers(const std::vector<mx::array>& inputs, const std::vector<int>& axes) {
    for (size_t i = 1; i < axes.size(); ++i) {
      if (axes[i] >= 0) reject("vmap is supported over n alone, not over the model's rows, labels or the head.");
    }
    auto mapped = inputs;
    const auto moved = mx::moveaxis(inputs[0], axes[0], 0, stream());
    mapped[0] = mx::contiguous(mx::flatten(moved, 0, 1, stream()), false, stream());
    return mapped;
  }

  // Reshape the outputs of a call with more layers from [B * L, ...] to [B, L, ...].
  std::pair<std::vector<mx::array>, std::vector<int>> from_layers(const std::vector<mx::array>& outputs, int layers) {
    std::vector<mx::array> split;
    for (const auto& output : outputs) split.push_back(mx::unflatten(output, 0, {-1, layers}, stream()));
    return {split, std::vector<int>(split.size(), 0)};
  }

  HeadSpec head_;
  cpu::Precision precision_;
  InputSlots slots_;
};

// The number of layers of n when `axis` of it is mapped.
int layers_of_mapped(const mx::array& n, int axis) {
  return n.shape(axis == 0 ? 1 : 0);
}

// Inputs: n [L, N, D], n_model [N, D] and labels [N] if given, the head's. Outputs: see lens_stats in head.h.
class LensStats : public HeadPrimitive {
 public:
  // `of_label`: the shape of the labels after [N].
  LensStats(mx::Stream stream, HeadSpec head, cpu::Precision precision, int k, bool with_model, std::optional<mx::Shape> of_label, bool reverse)
      : HeadPrimitive(stream, head, precision, {{Slot::n, true}, {Slot::n_model, with_model}, {Slot::labels, of_label.has_value()}}),
        k_(k),
        with_model_(with_model),
        of_label_(std::move(of_label)),
        reverse_(reverse) {
  }

  std::vector<mx::Dtype> dtypes() const {
    std::vector<mx::Dtype> types{mx::float32, mx::float32, mx::float32, mx::int32, mx::float32};
    if (with_model_) types.insert(types.end(), {mx::float32, mx::bool_});
    if (of_label_) types.insert(types.end(), {mx::float32, mx::int32});
    if (reverse_) types.push_back(mx::float32);
    return types;
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    const int layers = inputs[0].shape(0), tokens = inputs[0].shape(1);
    std::vector<mx::Shape> shapes(dtypes().size(), {layers, tokens});
    shapes[3] = shapes[4] = {layers, tokens, k_};
    if (of_label_) {
      auto& shape = shapes[first_of_labels()];
      shape.insert(shape.end(), of_label_->begin(), of_label_->end());
      shapes[first_of_labels() + 1] = shape;
    }
    return shapes;
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const int nll = first_of_labels();
    const int64_t per_token = of_label_ && !of_label_->empty() ? of_label_->at(0) : 1;
    dispatch(
        stream(), inputs, outputs,
        [head = head_, precision = precision_, slots = slots_, k = k_, reverse = reverse_, nll, per_token](auto& in, auto& out) {
          cpu::LensStatsInput input{};
          input.layers = in[0].shape(0);
          input.tokens = in[0].shape(1);
          input.n = slots.data<float>(in, Slot::n);
          input.n_model = slots.data<float>(in, Slot::n_model);
          input.labels = slots.data<int32_t>(in, Slot::labels);
          input.labels_per_token = per_token;
          input.k = k;
          input.reverse_kl = reverse;
          cpu::LensStatsOutput output{};
          output.lse = out[0].template data<float>();
          output.entropy = out[1].template data<float>();
          output.max_probability = out[2].template data<float>();
          output.top_ids = out[3].template data<int32_t>();
          output.top_logits = out[4].template data<float>();
          if (input.n_model) {
            output.kl = out[5].template data<float>();
            output.agrees = out[6].template data<bool>();
          }
          if (input.labels) {
            output.nll = out[nll].template data<float>();
            output.rank = out[nll + 1].template data<int32_t>();
          }
          if (reverse) output.reverse_kl = out.back().template data<float>();
          cpu::lens_stats(head.head(slots.head(in)), input, precision, output);
        });
  }

  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs, const std::vector<int>& axes) override {
    const auto mapped = as_layers(inputs, axes);
    auto self = std::make_shared<LensStats>(stream(), head_, precision_, k_, with_model_, of_label_, reverse_);
    return from_layers(mx::array::make_arrays(self->output_shapes(mapped), dtypes(), self, mapped), layers_of_mapped(inputs[0], axes[0]));
  }

  const char* name() const override {
    return "metalens::LensStats";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const LensStats&>(other);
    return HeadPrimitive::is_equivalent(other) && k_ == o.k_ && with_model_ == o.with_model_ && of_label_ == o.of_label_ && reverse_ == o.reverse_;
  }

 private:
  // The output nll; rank follows it.
  int first_of_labels() const {
    return with_model_ ? 7 : 5;
  }

  int k_;
  bool with_model_;
  std::optional<mx::Shape> of_label_;
  bool reverse_;
};

// Inputs: n_model [N, D], the head's. Outputs: lse, entropy and, with_mean, the mean.
class LensTarget : public HeadPrimitive {
 public:
  LensTarget(mx::Stream stream, HeadSpec head, cpu::Precision precision, bool with_mean)
      : HeadPrimitive(stream, head, precision, {{Slot::n_model, true}}), with_mean_(with_mean) {
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    const int tokens = inputs[0].shape(0);
    std::vector<mx::Shape> shapes{{tokens}, {tokens}};
    if (with_mean_) shapes.push_back(inputs[0].shape());
    return shapes;
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    dispatch(stream(), inputs, outputs, [head = head_, precision = precision_, slots = slots_](auto& in, auto& out) {
      float* mean = out.size() > 2 ? out[2].template data<float>() : nullptr;
      cpu::lens_target(
          head.head(slots.head(in)), slots.data<float>(in, Slot::n_model), in[0].shape(0), precision,
          {out[0].template data<float>(), out[1].template data<float>(), mean});
    });
  }

  const char* name() const override {
    return "metalens::LensTarget";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    return HeadPrimitive::is_equivalent(other) && with_mean_ == static_cast<const LensTarget&>(other).with_mean_;
  }

 private:
  bool with_mean_;
};

// Inputs: n [L, N, D], n_model [N, D], lse [N], mean [N, D] if the head is linear, the head's. Outputs: kl and, with_gradient, dn.
class LensKL : public HeadPrimitive {
 public:
  LensKL(mx::Stream stream, HeadSpec head, cpu::Precision precision, bool with_gradient)
      : HeadPrimitive(stream, head, precision, {{Slot::n, true}, {Slot::n_model, true}, {Slot::lse, true}, {Slot::mean, head.softcap == 0}}),
        with_gradient_(with_gradient) {
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    std::vector<mx::Shape> shapes{{inputs[0].shape(0), inputs[0].shape(1)}};
    if (with_gradient_) shapes.push_back(inputs[0].shape());
    return shapes;
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    dispatch(stream(), inputs, outputs, [head = head_, precision = precision_, slots = slots_](auto& in, auto& out) {
      cpu::LensKLInput input{};
      input.layers = in[0].shape(0);
      input.tokens = in[0].shape(1);
      input.n = slots.data<float>(in, Slot::n);
      input.n_model = slots.data<float>(in, Slot::n_model);
      input.lse = slots.data<float>(in, Slot::lse);
      input.mean = slots.data<float>(in, Slot::mean);
      float* dn = out.size() > 1 ? out[1].template data<float>() : nullptr;
      cpu::lens_kl(head.head(slots.head(in)), input, precision, out[0].template data<float>(), dn);
    });
  }

  // The forward pass computed the gradient: the backward pass is one multiplication.
  std::vector<mx::array> vjp(
      const std::vector<mx::array>&,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override {
    require_only_n(argnums);
    return {mx::multiply(mx::expand_dims(cotangents[0], -1, stream()), outputs[1], stream())};
  }

  std::vector<mx::array> jvp(
      const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents, const std::vector<int>& argnums) override {
    require_only_n(argnums);
    auto self = std::make_shared<LensKL>(stream(), head_, precision_, true);
    const auto outputs = mx::array::make_arrays(self->output_shapes(primals), {mx::float32, mx::float32}, self, primals);
    return {mx::sum(mx::multiply(tangents[0], outputs[1], stream()), -1, false, stream()), mx::zeros_like(outputs[1], stream())};
  }

  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs, const std::vector<int>& axes) override {
    const auto mapped = as_layers(inputs, axes);
    auto self = std::make_shared<LensKL>(stream(), head_, precision_, with_gradient_);
    const std::vector<mx::Dtype> types(with_gradient_ ? 2 : 1, mx::float32);
    return from_layers(mx::array::make_arrays(self->output_shapes(mapped), types, self, mapped), layers_of_mapped(inputs[0], axes[0]));
  }

  const char* name() const override {
    return "metalens::LensKL";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    return HeadPrimitive::is_equivalent(other) && with_gradient_ == static_cast<const LensKL&>(other).with_gradient_;
  }

 private:
  void require_only_n(const std::vector<int>& argnums) const {
    for (int argnum : argnums) {
      if (argnum != 0) reject("lens_kl is differentiable in n alone: the model, its rows and its head are frozen. Use mx.stop_gradient on them.");
    }
    if (!with_gradient_) reject("this lens_kl was asked for no gradient.");
  }

  bool with_gradient_;
};

mx::array lens_rows(const mx::array& n, const Head& head, mx::Stream stream) {
  if (n.ndim() != 3 || n.shape(-1) != head.width()) reject("n must be [layers, tokens, ", head.width(), "], not ", n.shape(), ".");
  return checked_rows(n, "n", n.shape(), stream);
}

}  // namespace

cpu::Head HeadSpec::head(const mx::array* first) const {
  cpu::Head h{};
  h.u = weight.matrix(first);
  h.bias = has_bias ? first[weight.arrays()].data<float>() : nullptr;
  h.scale = scale;
  h.softcap = softcap;
  h.vocab = vocab;
  h.offset = has_offset ? first[weight.arrays() + int(has_bias)].data<float>() : nullptr;
  return h;
}

Head::Head(
    const mx::array& values,
    const std::optional<mx::array>& scales,
    const std::optional<mx::array>& biases,
    int group_size,
    int bits,
    const std::string& mode,
    const std::optional<mx::array>& bias,
    float scale,
    std::optional<float> softcap,
    std::optional<int> vocab,
    const std::optional<mx::array>& offset)
    : weight_(make_weight(values, scales, biases, group_size, bits, mode)), bias_(bias), offset_(offset) {
  const int rows = int(weight_.rows());
  spec_ = {weight_.spec, bias.has_value(), offset.has_value(), scale, softcap.value_or(0.0f), vocab.value_or(rows)};
  if (rows == 0 || weight_.columns() == 0) reject("a head needs at least one row and one column; its weight is [", rows, ", ", width(), "].");
  if (spec_.vocab < 1 || spec_.vocab > rows) reject("vocab must be from 1 to the head's ", rows, " rows, not ", spec_.vocab, ".");
  const auto check_row = [&](const std::optional<mx::array>& row, const char* name) {
    if (!row || (row->shape() == mx::Shape{rows} && is_float(row->dtype()))) return;
    reject("the head's ", name, " must be ", mx::Shape{rows}, " floats, not ", row->dtype(), " ", row->shape(), ".");
  };
  check_row(bias, "bias");
  check_row(offset, "offset");
  if (softcap && !(*softcap > 0)) reject("softcap must be positive, not ", *softcap, ".");
}

std::vector<mx::array> Head::inputs(std::vector<mx::array> rows, mx::Stream stream) const {
  for (const auto& a : weight_.inputs(stream)) rows.push_back(a);
  if (bias_) rows.push_back(as_rows(*bias_, stream));
  if (offset_) rows.push_back(as_rows(*offset_, stream));
  return rows;
}

std::vector<mx::array> lens_stats(
    const mx::array& n,
    const Head& head,
    int k,
    const std::optional<mx::array>& n_model,
    const std::optional<mx::array>& labels,
    const std::string& precision,
    bool reverse,
    mx::StreamOrDevice s) {
  const auto stream = cpu_stream(s);
  if (reverse && !n_model) reject("the reverse KL needs n_model.");
  if (k < 1 || k > head.spec().vocab) reject("k must be from 1 to ", head.spec().vocab, " (the vocabulary), not ", k, ".");
  std::vector<mx::array> rows{lens_rows(n, head, stream)};
  std::optional<mx::Shape> of_label;
  if (n_model) rows.push_back(checked_rows(*n_model, "n_model", {n.shape(1), n.shape(2)}, stream));
  if (labels) {
    const bool fits = (labels->ndim() == 1 || labels->ndim() == 2) && labels->shape(0) == n.shape(1) && mx::issubdtype(labels->dtype(), mx::integer);
    if (!fits)
      reject("labels must be ", mx::Shape{n.shape(1)}, " token ids, or several for each token, not ", labels->dtype(), " ", labels->shape(), ".");
    of_label = mx::Shape(labels->shape().begin() + 1, labels->shape().end());
    // Compare in 64 bits: an id that wraps around in 32 bits is no token either.
    const auto ids = mx::astype(*labels, mx::int64, stream);
    const auto known =
        mx::logical_and(mx::greater_equal(ids, mx::array(int64_t(0)), stream), mx::less(ids, mx::array(int64_t(head.spec().vocab)), stream), stream);
    rows.push_back(mx::contiguous(mx::astype(mx::where(known, ids, mx::array(int64_t(-1)), stream), mx::int32, stream), false, stream));
  }
  auto primitive = std::make_shared<LensStats>(stream, head.spec(), precision_named(precision), k, n_model.has_value(), of_label, reverse);
  const auto inputs = head.inputs(rows, stream);
  return mx::array::make_arrays(primitive->output_shapes(inputs), primitive->dtypes(), primitive, inputs);
}

std::vector<mx::array> lens_target(const mx::array& n_model, const Head& head, bool with_mean, const std::string& precision, mx::StreamOrDevice s) {
  const auto stream = cpu_stream(s);
  if (n_model.ndim() != 2) reject("n_model must be [tokens, ", head.width(), "], not ", n_model.shape(), ".");
  const auto rows = checked_rows(n_model, "n_model", {n_model.shape(0), int(head.width())}, stream);
  auto primitive = std::make_shared<LensTarget>(stream, head.spec(), precision_named(precision), with_mean && head.spec().softcap == 0);
  const auto inputs = head.inputs({rows}, stream);
  const auto shapes = primitive->output_shapes(inputs);
  return mx::array::make_arrays(shapes, std::vector<mx::Dtype>(shapes.size(), mx::float32), primitive, inputs);
}

std::vector<mx::array> lens_kl(
    const mx::array& n,
    const Head& head,
    const mx::array& n_model,
    const mx::array& lse,
    const std::optional<mx::array>& mean,
    bool with_gradient,
    const std::string& precision,
    mx::StreamOrDevice s) {
  const auto stream = cpu_stream(s);
  std::vector<mx::array> rows{lens_rows(n, head, stream)};
  const mx::Shape of_model{n.shape(1), n.shape(2)};
  rows.push_back(checked_rows(n_model, "n_model", of_model, stream));
  rows.push_back(checked_rows(lse, "lse", {n.shape(1)}, stream));
  if (head.spec().softcap == 0) {
    if (!mean) reject("a linear head needs the mean of lens_target.");
    rows.push_back(checked_rows(*mean, "mean", of_model, stream));
  }
  auto primitive = std::make_shared<LensKL>(stream, head.spec(), precision_named(precision), with_gradient);
  const auto inputs = head.inputs(rows, stream);
  const auto shapes = primitive->output_shapes(inputs);
  return mx::array::make_arrays(shapes, std::vector<mx::Dtype>(shapes.size(), mx::float32), primitive, inputs);
}

}  // namespace metalens
