// Common parts of the operations: errors, element types, streams.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/precision.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace metalens {

namespace mx = mlx::core;

// Throw std::invalid_argument, which becomes a ValueError in Python.
template <typename... Parts>
[[noreturn]] void reject(const Parts&... parts) {
  std::ostringstream message;
  message << "[metalens] ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline bool is_float(mx::Dtype t) {
  return t == mx::float32 || t == mx::float16 || t == mx::bfloat16;
}

inline cpu::Element element_of(mx::Dtype t) {
  return t == mx::float16 ? cpu::Element::f16 : t == mx::bfloat16 ? cpu::Element::bf16 : cpu::Element::f32;
}

// The CPU stream to run on. Rejects a stream of another device.
mx::Stream cpu_stream(mx::StreamOrDevice s);

// The precision of this name. Rejects names other than float32 and bf16.
cpu::Precision precision_named(const std::string& name);

// x as a row-contiguous array. Adds no node to the graph if x is known to be one: each node costs about a microsecond of every evaluation.
mx::array contiguous(const mx::array& x, mx::Stream stream);

// x as a row-contiguous float32 array.
mx::array as_rows(const mx::array& x, mx::Stream stream);

// The same. Rejects other shapes than `expected`, and types that are no floats; `name` is for the message.
mx::array checked_rows(const mx::array& x, const char* name, const mx::Shape& expected, mx::Stream stream);

// Allocate the outputs and run f(inputs, outputs) on the stream's thread. Inputs and outputs stay alive until it is done. The first output takes the
// memory of the input `reused`, if that is not null.
template <typename F>
void dispatch(mx::Stream stream, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, F f, const mx::array* reused = nullptr) {
  auto& encoder = mx::cpu::get_command_encoder(stream);
  std::vector<mx::array> in, out;
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
    in.push_back(mx::array::unsafe_weak_copy(input));
  }
  for (auto& output : outputs) {
    if (reused && &output == &outputs[0]) {
      output.copy_shared_buffer(*reused);
    } else {
      output.set_data(mx::allocator::malloc(output.nbytes()));
    }
    encoder.set_output_array(output);
    out.push_back(mx::array::unsafe_weak_copy(output));
  }
  encoder.dispatch([in = std::move(in), out = std::move(out), f = std::move(f)]() mutable { f(in, out); });
}

// A primitive that runs on the CPU only.
class CpuPrimitive : public mx::Primitive {
 public:
  using mx::Primitive::Primitive;
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("[metalens] this operation has no GPU implementation.");
  }
};

}  // namespace metalens
