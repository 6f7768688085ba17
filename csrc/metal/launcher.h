// Kernels compiled ahead of time, from the Metal library that a build with Apple's Metal compiler lays beside the extension. Without one the Python
// layer compiles the same sources just in time, through mx.fast.metal_kernel.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "mlx/array.h"
#include "mlx/utils.h"

namespace metalens {

namespace mx = mlx::core;

// The path of metalens.metallib; "" if this build has none or this machine has no Metal.
std::string metal_library();

// The outputs of `kernel`, a function of that library, as arrays of `shapes` and `dtypes`. Its buffers are the inputs, row-contiguous and in order,
// then the outputs: the signature that mx.fast.metal_kernel generates for a source that names no shapes or strides. `grid` counts threads, not
// threadgroups; as there, a threadgroup larger than the grid is cut to it. Output i is written over input reuse[i], -1 for none, if nothing else will
// read that input and an element of both is of one size: the kernel must bear it. Runs on a GPU stream, by default the current one. Not
// differentiable: the Python layer gives the gradient. Rejects parts that do not fit together; throws std::runtime_error without a library, or if it
// lacks `kernel`.
std::vector<mx::array> launch_metal(
    const std::string& kernel,
    const std::vector<mx::array>& inputs,
    const std::vector<mx::Shape>& shapes,
    const std::vector<mx::Dtype>& dtypes,
    const std::tuple<int, int, int>& grid,
    const std::tuple<int, int, int>& threadgroup,
    const std::vector<int>& reuse,
    mx::StreamOrDevice s = {});

}  // namespace metalens
