// Signatures and docstrings of the extension, nothing else.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
#include "ops/linear.h"

namespace nb = nanobind;
using namespace nb::literals;

NB_MODULE(_ext, m) {
  m.doc() = "Native CPU operations of metalens. Use them through metalens.ops, which falls back to plain MLX where they cannot run.";

  // Typed through mlx's own bindings, which must be loaded first.
  nb::module_::import_("mlx.core");

  m.def(
      "quantized_matmul", &metalens::quantized_matmul, "x"_a, "w"_a, "scales"_a, "biases"_a, "group_size"_a = 64, "bits"_a = 4, "transpose"_a = true,
      nb::kw_only(), "stream"_a = nb::none(),
      "x W^T (or x W) for a frozen W in MLX's affine format, on the CPU.\n\n"
      "x [..., I] float32, float16 or bfloat16; w [O, I * bits / 32] uint32; scales, biases [O, I / group_size]. Returns [..., O] in x's dtype;\n"
      "accumulates in float32. bits: 2, 3, 4, 5, 6, 8; group_size: 32, 64, 128. Differentiable in x. With transpose=False, x is [..., O] and the\n"
      "result [..., I]. Raises ValueError for shapes or types that do not fit together.");

  m.def(
      "matmul", &metalens::matmul, "x"_a, "w"_a, "transpose"_a = true, nb::kw_only(), "stream"_a = nb::none(),
      "x W^T (or x W) for a dense W, on the CPU.\n\n"
      "x [..., I], w [O, I], each float32, float16 or bfloat16. Returns [..., O] in the promoted dtype; accumulates in float32. Differentiable in "
      "both.\n"
      "With transpose=False, x is [..., O] and the result [..., I]. Raises ValueError for shapes or types that do not fit together.");

  m.def("num_threads", &metalens::cpu::num_threads, "Threads the kernels use: METALENS_NUM_THREADS, or the cores this process may run on.");
  m.def("isa", [] { return metalens::cpu::kernels().name; }, "The instruction set in use: METALENS_ISA, or the widest available.");
  m.def("available_isas", &metalens::cpu::available_isas, "The instruction sets this build and this CPU share, separated by spaces.");
}
