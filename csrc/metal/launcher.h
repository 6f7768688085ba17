// Launches kernels that were compiled ahead of time. They are in the Metal library that a build with Apple's Metal compiler puts beside the
// extension. Without a library the Python layer compiles the same sources just in time, through mx.fast.metal_kernel.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "mlx/array.h"
#include "mlx/utils.h"

namespace metalens {

namespace mx = mlx::core;

// The number of the GPU's cores in the registry of macOS; 0 if it is not there. MLX's name of a GPU does not tell a Pro from a Max.
int gpu_core_count();

// The path of metalens.metallib; "" if this build has no library or this machine has no Metal.
std::string metal_library();

// Run `kernel`, a function of that library, and return its outputs, arrays of `shapes` and `dtypes`. Its buffers are the inputs, row-contiguous and
// in order, then the outputs: the signature that mx.fast.metal_kernel generates for a source that names no shapes or strides. `grid` counts threads,
// not threadgroups. As with mx.fast.metal_kernel, a threadgroup larger than the grid is cut to the grid. Output i overwrites input reuse[i] (-1:
// none) if nothing else will read that input and the elements of both have the same size; the kernel must permit that. Runs on a GPU stream, by
// default the current one. Not differentiable: the Python layer gives the gradient. Rejects parts that do not fit together. Throws std::runtime_error
// if there is no library or it lacks `kernel`.
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
