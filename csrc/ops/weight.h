// A frozen matrix as MLX stores it.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "ops/common.h"

namespace metalens {

// The storage format of a matrix, without its arrays. A primitive keeps this; the arrays are among its inputs: values, then scales, then biases.
struct WeightSpec {
  cpu::Format format = cpu::Format::dense;
  int group_size = 0;
  int bits = 0;

  bool operator==(const WeightSpec&) const = default;

  // The number of inputs that belong to the matrix.
  int arrays() const {
    return format == cpu::Format::dense ? 1 : format == cpu::Format::affine ? 3 : 2;
  }
  int64_t columns(const mx::array& values) const {
    return format == cpu::Format::dense ? values.shape(1) : int64_t(values.shape(1)) * 32 / bits;
  }
  // The matrix whose arrays begin at `first`; valid while the arrays live.
  cpu::Matrix matrix(const mx::array* first) const;
};

struct Weight {
  WeightSpec spec;
  std::vector<mx::array> arrays;

  int64_t rows() const {
    return arrays[0].shape(0);
  }
  int64_t columns() const {
    return spec.columns(arrays[0]);
  }
  // The arrays, row-contiguous.
  std::vector<mx::array> inputs(mx::Stream stream) const;
};

// A dense weight: values [O, I] floats, no scales. A quantized one, as mlx.core.quantize gives it for `mode`: values [O, I * bits / 32] uint32,
// scales [O, I / group_size] and, only for mode affine, biases. Rejects arrays that do not fit together.
Weight make_weight(
    const mx::array& values,
    const std::optional<mx::array>& scales,
    const std::optional<mx::array>& biases,
    int group_size,
    int bits,
    const std::string& mode);

}  // namespace metalens
