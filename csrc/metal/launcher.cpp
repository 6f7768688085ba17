#include "metal/launcher.h"

#include <CoreFoundation/CoreFoundation.h>
#include <dlfcn.h>
#include <IOKit/IOKitLib.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <utility>

#include "metal/donation.h"
#include "mlx/backend/metal/device.h"
#include "mlx/backend/metal/metal.h"
#include "mlx/ops.h"
#include "ops/common.h"

namespace metalens {
namespace {

// Metal numbers the buffers of a function from 0 to 30.
constexpr size_t kMostBuffers = 31;
// A view keeps its whole buffer alive. A buffer with more spare bytes than this is not reused for an output. MLX's own operations have the same
// limit.
constexpr size_t kMostSpareBytes = 16384;

struct Size {
  int x, y, z;

  explicit Size(const std::tuple<int, int, int>& t) : x(std::get<0>(t)), y(std::get<1>(t)), z(std::get<2>(t)) {
  }
  bool operator==(const Size&) const = default;
  MTL::Size metal() const {
    return MTL::Size(x, y, z);
  }
  size_t volume() const {
    return size_t(x) * size_t(y) * size_t(z);
  }
};

Size smaller(const Size& a, const Size& b) {
  return Size({std::min(a.x, b.x), std::min(a.y, b.y), std::min(a.z, b.z)});
}

std::ostream& operator<<(std::ostream& out, const Size& size) {
  return out << "(" << size.x << ", " << size.y << ", " << size.z << ")";
}

// The folder of the extension. MLX has a function of this name too, which finds libmlx and is not exported; this one finds the library that it is
// compiled into.
std::filesystem::path current_binary_dir() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(&current_binary_dir), &info)) throw std::runtime_error("[metalens] the extension cannot find its own file.");
  return std::filesystem::path(info.dli_fname).parent_path();
}

// The pipeline of a kernel. MLX keeps the library and every pipeline, so after the first call of a kernel this is two look-ups.
MTL::ComputePipelineState* pipeline(const std::string& kernel) {
  const auto path = metal_library();
  if (path.empty()) {
    throw std::runtime_error(
        "[metalens] there is no metalens.metallib beside the extension, or no Metal device here. Use the just-in-time kernels, or reinstall metalens "
        "from source on a Mac with Xcode, whose Metal compiler builds the library.");
  }
  auto& device = mx::metal::device(mx::Device::gpu);
  auto* library = device.get_library("metalens", path);
  try {
    return device.get_kernel(kernel, library);
  } catch (const std::exception& e) {
    std::ostringstream message;
    message << "[metalens] the kernel '" << kernel << "' cannot be loaded from " << path << ", which is of another version or damaged. Reinstall "
            << "metalens. (" << e.what() << ")";
    throw std::runtime_error(message.str());
  }
}

// Whether x is known to be row-contiguous. An array that is not computed yet has no known layout, and one that mx.compile traces has no data.
bool known_as_rows(const mx::array& x) {
  return x.status() != mx::array::Status::unscheduled && x.data_shared_ptr() && x.flags().row_contiguous;
}

class MetalKernel : public mx::Primitive {
 public:
  MetalKernel(
      mx::Stream stream,
      std::string kernel,
      const std::vector<mx::array>& inputs,
      std::vector<mx::Shape> shapes,
      std::vector<mx::Dtype> dtypes,
      Size grid,
      Size threadgroup,
      std::vector<int> reuse)
      : mx::Primitive(stream),
        kernel_(std::move(kernel)),
        shapes_(std::move(shapes)),
        dtypes_(std::move(dtypes)),
        grid_(grid),
        threadgroup_(threadgroup),
        reuse_(std::move(reuse)) {
    for (const auto& input : inputs) input_shapes_.push_back(input.shape());
  }

  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    // Everything that can fail comes before the first encoded command.
    auto* state = pipeline(kernel_);
    for (const auto& input : inputs) {
      if (!input.flags().row_contiguous) throw std::runtime_error("[metalens] an input of the kernel '" + kernel_ + "' is not row-contiguous.");
    }
    release_inputs_of_siblings(inputs, outputs);
    for (size_t i = 0; i < outputs.size(); ++i) allocate(outputs[i], reuse_[i] < 0 ? nullptr : &inputs[reuse_[i]]);

    auto& encoder = mx::metal::get_command_encoder(stream());
    encoder.set_compute_pipeline_state(state);
    int index = 0;
    for (const auto& input : inputs) encoder.set_input_array(input, index++);
    for (auto& output : outputs) encoder.set_output_array(output, index++);
    encoder.dispatch_threads(grid_.metal(), threadgroup_.metal());
  }

  void eval_cpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("[metalens] the Metal kernel '" + kernel_ + "' has no CPU implementation. Run it on a GPU stream.");
  }

  const char* name() const override {
    return "metalens::MetalKernel";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const MetalKernel&>(other);
    return kernel_ == o.kernel_ && input_shapes_ == o.input_shapes_ && shapes_ == o.shapes_ && dtypes_ == o.dtypes_ && grid_ == o.grid_ &&
           threadgroup_ == o.threadgroup_ && reuse_ == o.reuse_;
  }

  // Only mx.compile(shapeless=True) calls this. It may run the graph on other shapes, for which this grid and these outputs would be wrong.
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (inputs[i].shape() != input_shapes_[i]) {
        reject(
            "the Metal kernel '", kernel_, "' was traced with an input of shape ", input_shapes_[i], " and is run with ", inputs[i].shape(),
            ". Compile without shapeless=True.");
      }
    }
    return shapes_;
  }

 private:
  static void allocate(mx::array& output, const mx::array* input) {
    if (input && input->is_donatable() && input->itemsize() == output.itemsize() && input->size() == output.size() &&
        input->buffer_size() <= output.nbytes() + kMostSpareBytes) {
      mx::array::Flags flags{};
      const auto& shape = output.shape();
      flags.contiguous = flags.row_contiguous = true;
      flags.col_contiguous = output.size() <= 1 || output.size() == size_t(*std::max_element(shape.begin(), shape.end()));
      output.copy_shared_buffer(*input, output.strides(), flags, output.size());
    } else {
      output.set_data(mx::allocator::malloc(output.nbytes()));
    }
  }

  std::string kernel_;
  std::vector<mx::Shape> input_shapes_, shapes_;
  std::vector<mx::Dtype> dtypes_;
  Size grid_, threadgroup_;
  std::vector<int> reuse_;
};

}  // namespace

int gpu_core_count() {
  static const int count = [] {
    int cores = 0;
    // IOServiceGetMatchingService releases the dictionary.
    const io_service_t gpu = IOServiceGetMatchingService(kIOMainPortDefault, IOServiceMatching("AGXAccelerator"));
    if (gpu == IO_OBJECT_NULL) return cores;
    if (CFTypeRef value = IORegistryEntryCreateCFProperty(gpu, CFSTR("gpu-core-count"), kCFAllocatorDefault, 0)) {
      if (CFGetTypeID(value) == CFNumberGetTypeID()) CFNumberGetValue(static_cast<CFNumberRef>(value), kCFNumberIntType, &cores);
      CFRelease(value);
    }
    IOObjectRelease(gpu);
    return std::max(cores, 0);
  }();
  return count;
}

std::string metal_library() {
  static const std::string path = [] {
    const auto file = current_binary_dir() / "metalens.metallib";
    return std::filesystem::exists(file) ? file.string() : std::string();
  }();
  return mx::metal::is_available() ? path : "";
}

std::vector<mx::array> launch_metal(
    const std::string& kernel,
    const std::vector<mx::array>& inputs,
    const std::vector<mx::Shape>& shapes,
    const std::vector<mx::Dtype>& dtypes,
    const std::tuple<int, int, int>& grid,
    const std::tuple<int, int, int>& threadgroup,
    const std::vector<int>& reuse,
    mx::StreamOrDevice s) {
  const auto stream = mx::to_stream(s, mx::Device(mx::Device::gpu));
  if (stream.device != mx::Device::gpu) reject("the Metal kernel '", kernel, "' runs on the GPU. Pass stream=mx.gpu, or none.");
  if (shapes.empty() || shapes.size() != dtypes.size() || shapes.size() != reuse.size()) {
    reject(
        "the Metal kernel '", kernel, "' needs one shape, one dtype and one entry of reuse for each output, and at least one output; there are ",
        shapes.size(), ", ", dtypes.size(), " and ", reuse.size(), ".");
  }
  if (inputs.size() + shapes.size() > kMostBuffers) {
    reject(
        "the Metal kernel '", kernel, "' has ", inputs.size(), " inputs and ", shapes.size(), " outputs; Metal binds no more than ", kMostBuffers,
        " buffers. Pack small inputs into one array.");
  }
  for (const auto& shape : shapes) {
    if (std::any_of(shape.begin(), shape.end(), [](int n) { return n < 0; }))
      reject("an output of '", kernel, "' cannot have the shape ", shape, ".");
  }
  for (int input : reuse) {
    if (input < -1 || input >= int(inputs.size()))
      reject("reuse must name one of the ", inputs.size(), " inputs of '", kernel, "', or -1, not ", input, ".");
  }
  const Size threads(grid), group = smaller(Size(threadgroup), threads);
  if (group.x < 1 || group.y < 1 || group.z < 1) {
    reject("the grid and the threadgroup of '", kernel, "' must be positive, not ", threads, " and ", Size(threadgroup), ".");
  }
  // Checked here, not only when the kernel runs, so that the error arises at the call.
  if (const size_t most = pipeline(kernel)->maxTotalThreadsPerThreadgroup(); group.volume() > most) {
    reject(
        "a threadgroup of '", kernel, "' has ", group.volume(), " threads, ", group, "; this GPU runs it with no more than ", most,
        ". Pass a smaller threadgroup.");
  }
  std::vector<mx::array> rows;
  for (const auto& input : inputs) rows.push_back(known_as_rows(input) ? input : mx::contiguous(input, false, stream));
  auto primitive = std::make_shared<MetalKernel>(stream, kernel, rows, shapes, dtypes, threads, group, reuse);
  return mx::array::make_arrays(shapes, dtypes, primitive, rows);
}

}  // namespace metalens
