#include "ops/weight.h"

#include "mlx/ops.h"

namespace metalens {
namespace {

cpu::Format format_named(const std::string& mode) {
  if (mode == "affine") return cpu::Format::affine;
  if (mode == "mxfp4") return cpu::Format::mxfp4;
  if (mode == "mxfp8") return cpu::Format::mxfp8;
  if (mode == "nvfp4") return cpu::Format::nvfp4;
  reject("mode must be affine, mxfp4, mxfp8 or nvfp4, not '", mode, "'.");
}

void check_layout(const WeightSpec& spec, const std::string& mode) {
  if (spec.format == cpu::Format::affine) {
    if (spec.bits < 2 || spec.bits > 8 || spec.bits == 7) reject("bits must be 2, 3, 4, 5, 6 or 8, not ", spec.bits, ".");
    if (spec.group_size != 32 && spec.group_size != 64 && spec.group_size != 128) {
      reject("group_size must be 32, 64 or 128, not ", spec.group_size, ".");
    }
    return;
  }
  const int bits = spec.format == cpu::Format::mxfp8 ? 8 : 4, group_size = spec.format == cpu::Format::nvfp4 ? 16 : 32;
  if (spec.bits != bits || spec.group_size != group_size) {
    reject(mode, " has bits=", bits, " and group_size=", group_size, ", not ", spec.bits, " and ", spec.group_size, ".");
  }
}

}  // namespace

cpu::Matrix WeightSpec::matrix(const mx::array* first) const {
  cpu::Matrix w{};
  w.rows = first->shape(0);
  w.cols = columns(*first);
  w.element = element_of(format == cpu::Format::affine ? first[1].dtype() : first->dtype());
  w.format = format;
  w.bits = bits;
  w.group_size = group_size;
  w.values = first->data<void>();
  w.scales = arrays() > 1 ? first[1].data<void>() : nullptr;
  w.biases = arrays() > 2 ? first[2].data<void>() : nullptr;
  return w;
}

std::vector<mx::array> Weight::inputs(mx::Stream stream) const {
  std::vector<mx::array> inputs;
  for (const auto& a : arrays) inputs.push_back(contiguous(a, stream));
  return inputs;
}

Weight make_weight(
    const mx::array& values,
    const std::optional<mx::array>& scales,
    const std::optional<mx::array>& biases,
    int group_size,
    int bits,
    const std::string& mode) {
  if (!scales) {
    if (!is_float(values.dtype())) reject("a dense weight must be float32, float16 or bfloat16, not ", values.dtype(), ".");
    if (values.ndim() != 2) reject("a weight must be a matrix [O, I], not ", values.shape(), ".");
    return {{}, {values}};
  }
  const WeightSpec spec{format_named(mode), group_size, bits};
  check_layout(spec, mode);
  const bool affine = spec.format == cpu::Format::affine;
  if (values.dtype() != mx::uint32 || values.ndim() != 2) {
    reject("w must be a uint32 array [O, I * bits / 32], not ", values.dtype(), " ", values.shape(), ".");
  }
  if (affine != biases.has_value()) reject(affine ? "mode affine needs biases." : "only mode affine has biases.");
  if (affine && (!is_float(scales->dtype()) || scales->dtype() != biases->dtype())) {
    reject("scales and biases must share one of float32, float16, bfloat16; they are ", scales->dtype(), " and ", biases->dtype(), ".");
  }
  if (!affine && scales->dtype() != mx::uint8) reject("scales of ", mode, " must be uint8, not ", scales->dtype(), ".");
  const int64_t inner = spec.columns(values);
  const mx::Shape expected{values.shape(0), int(inner / group_size)};
  if (inner % group_size || int64_t(values.shape(1)) * 32 % bits || scales->shape() != expected || (affine && biases->shape() != expected)) {
    reject(
        "w ", values.shape(), " with bits=", bits, " and group_size=", group_size, " needs scales", affine ? " and biases" : "",
        " [O, I / group_size] = ", expected, "; the scales are ", scales->shape(), affine ? " and the biases " : "",
        affine ? biases->shape() : mx::Shape{}, ".");
  }
  std::vector<mx::array> arrays{values, *scales};
  if (affine) arrays.push_back(*biases);
  return {spec, arrays};
}

}  // namespace metalens
