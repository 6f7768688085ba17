// Signatures and docstrings of the extension, nothing else.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
#include "metal/launcher.h"
#include "ops/activation.h"
#include "ops/attention.h"
#include "ops/head.h"
#include "ops/linear.h"
#include "ops/translate_norm.h"

namespace nb = nanobind;
using namespace nb::literals;

NB_MODULE(_ext, m) {
  m.doc() = "Native operations of metalens. Use them through metalens.ops, which falls back to plain MLX where they cannot run.";

  // Typed through mlx's own bindings, which must be loaded first.
  nb::module_::import_("mlx.core");

  m.def(
      "quantized_matmul", &metalens::quantized_matmul, "x"_a, "w"_a, "scales"_a, "biases"_a = nb::none(), "group_size"_a = 64, "bits"_a = 4,
      "transpose"_a = true, "mode"_a = "affine", "dtype"_a = nb::none(), "precision"_a = "float32", nb::kw_only(), "stream"_a = nb::none(),
      "x W^T (or x W) for a frozen quantized W, on the CPU.\n\n"
      "x [..., I] float32, float16 or bfloat16; w [O, I * bits / 32] uint32; scales and (affine) biases [O, I / group_size], as mlx.core.quantize\n"
      "gives them. Returns [..., O] in dtype, by default x's; sums are float32. affine: bits 2, 3, 4, 5, 6, 8, group_size 32, 64, 128; mxfp4, "
      "mxfp8,\n"
      "nvfp4. precision 'bf16' lets operands be rounded to bfloat16 where that is faster. Differentiable in x. With transpose=False, x is [..., O]\n"
      "and the result [..., I]. Raises ValueError for shapes or types that do not fit together.");

  m.def(
      "matmul", &metalens::matmul, "x"_a, "w"_a, "transpose"_a = true, "dtype"_a = nb::none(), "precision"_a = "float32", nb::kw_only(),
      "stream"_a = nb::none(),
      "x W^T (or x W) for a dense W, on the CPU.\n\n"
      "x [..., I], w [O, I], each float32, float16 or bfloat16. Returns [..., O] in dtype, by default the promoted one; sums are float32.\n"
      "Differentiable in both. With transpose=False, x is [..., O] and the result [..., I]. Raises ValueError for shapes or types that do not fit.");

  nb::class_<metalens::Head>(
      m, "Head",
      "The unembedding of a model: logits softcap(scale * (U n + bias)) of the first `vocab` rows of U. Raises ValueError if parts misfit.")
      .def(
          nb::init<
              const mlx::core::array&, const std::optional<mlx::core::array>&, const std::optional<mlx::core::array>&, int, int, const std::string&,
              const std::optional<mlx::core::array>&, float, std::optional<float>, std::optional<int>>(),
          "values"_a, "scales"_a = nb::none(), "biases"_a = nb::none(), "group_size"_a = 64, "bits"_a = 4, "mode"_a = "affine", "bias"_a = nb::none(),
          "scale"_a = 1.0f, "softcap"_a = nb::none(), "vocab"_a = nb::none());

  m.def(
      "lens_stats", &metalens::lens_stats, "n"_a, "head"_a, "k"_a = 1, "n_model"_a = nb::none(), "labels"_a = nb::none(), "precision"_a = "float32",
      nb::kw_only(), "stream"_a = nb::none(),
      "[lse, entropy, max_probability [L, N], top_ids int32, top_logits [L, N, k]], then [kl, agrees] with n_model [N, D], then [nll, rank] with\n"
      "labels [N], of rows n [L, N, D]; no logits array is made. A label outside the vocabulary has NaN and rank -1; a row with NaN is NaN.");

  m.def(
      "lens_target", &metalens::lens_target, "n_model"_a, "head"_a, "with_mean"_a = true, "precision"_a = "float32", nb::kw_only(),
      "stream"_a = nb::none(), "[lse [N], entropy [N]] and, for a linear head, the mean row [N, D] of U under the model's probabilities.");

  m.def(
      "lens_kl", &metalens::lens_kl, "n"_a, "head"_a, "n_model"_a, "lse"_a, "mean"_a = nb::none(), "with_gradient"_a = true,
      "precision"_a = "float32", nb::kw_only(), "stream"_a = nb::none(),
      "[KL(model || lens) [L, N]] and its gradient [L, N, D] at n [L, N, D]; lse and mean are lens_target's of n_model [N, D]. Differentiable in n.");

  m.def(
      "translate_norm", &metalens::translate_norm, "h"_a, "w"_a = nb::none(), "b"_a = nb::none(), "norm"_a = "rms", "gain"_a = nb::none(),
      "norm_bias"_a = nb::none(), "eps"_a = 1e-5f, "precision"_a = "float32", nb::kw_only(), "stream"_a = nb::none(),
      "norm(h W^T + b) [..., D] float32, W the identity if none; norm 'rms', 'layer' or 'none'. Differentiable in h, w and b.");

  m.def(
      "attention", &metalens::attention, "q"_a, "k"_a, "v"_a, "scale"_a, "causal"_a = false, "mask"_a = nb::none(), "precision"_a = "float32",
      nb::kw_only(), "stream"_a = nb::none(),
      "softmax(scale q k^T + mask) v [B, H, T, E] in q's type, for q [B, H, T, D], k [B, G, S, D], v [B, G, S, E] and mask [T, S]; with `causal`, "
      "query i\n"
      "sees the keys up to i + S - T. Not differentiable.");

  m.def(
      "swiglu", &metalens::swiglu, "gate"_a, "x"_a, nb::kw_only(), "stream"_a = nb::none(),
      "silu(gate) * x for arrays of one shape and one float type, computed in float32. Not differentiable.");

  m.def(
      "metal_library", &metalens::metal_library,
      "The path of the Metal kernels compiled ahead of time; '' where this build or this machine has none.");

  m.def(
      "launch_metal",
      [](const std::string& kernel, const std::vector<mlx::core::array>& inputs, const std::vector<std::vector<int>>& shapes,
         const std::vector<mlx::core::Dtype>& dtypes, const std::tuple<int, int, int>& grid, const std::tuple<int, int, int>& threadgroup,
         const std::vector<int>& reuse, mlx::core::StreamOrDevice stream) {
        // MLX's own type of a shape has a caster in MLX alone.
        std::vector<mlx::core::Shape> outputs;
        for (const auto& shape : shapes) outputs.emplace_back(shape.begin(), shape.end());
        return metalens::launch_metal(kernel, inputs, outputs, dtypes, grid, threadgroup, reuse, stream);
      },
      "kernel"_a, "inputs"_a, "shapes"_a, "dtypes"_a, "grid"_a, "threadgroup"_a, "reuse"_a, nb::kw_only(), "stream"_a = nb::none(),
      "The outputs, of `shapes` and `dtypes`, of a kernel of metal_library(), on the GPU.\n\n"
      "Its buffers are the inputs, row-contiguous and in order, then the outputs, as mlx.core.fast.metal_kernel lays them out; grid counts threads.\n"
      "Output i may be written over input reuse[i], -1 for none, if nothing else needs it. Not differentiable. Raises ValueError for parts that\n"
      "fit neither together nor the GPU, RuntimeError without a library or if it lacks the kernel.");

  m.def("num_threads", &metalens::cpu::num_threads, "Threads the kernels use: METALENS_NUM_THREADS, or the cores this process may run on.");
  m.def("isa", [] { return metalens::cpu::kernels().name; }, "The instruction set in use: METALENS_ISA, or the widest available.");
  m.def(
      "multiplies_bf16", [] { return metalens::cpu::kernels().bf16 != nullptr; },
      "Whether the instruction set in use multiplies 16-bit operands faster; if not, precision 'bf16' computes as 'float32' does.");
  m.def("available_isas", &metalens::cpu::available_isas, "The instruction sets this build and this CPU share, separated by spaces.");
}
