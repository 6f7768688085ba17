// The launcher in a build against an MLX without Metal.
#include <stdexcept>

#include "metal/launcher.h"

namespace metalens {

int gpu_core_count() {
  return 0;
}

std::string metal_library() {
  return "";
}

std::vector<mx::array> launch_metal(
    const std::string& kernel,
    const std::vector<mx::array>&,
    const std::vector<mx::Shape>&,
    const std::vector<mx::Dtype>&,
    const std::tuple<int, int, int>&,
    const std::tuple<int, int, int>&,
    const std::vector<int>&,
    mx::StreamOrDevice) {
  throw std::runtime_error(
      "[metalens] the Metal kernel '" + kernel +
      "' cannot run: this metalens was built against an MLX without Metal. Use it on a Mac with Apple silicon, or choose the backend 'auto', which "
      "never picks what cannot run.");
}

}  // namespace metalens
