// Signatures and docstrings of the extension.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "cpu/kernels.h"
#include "cpu/split_vocab.h"
#include "cpu/thread_pool.h"
#include "cpu/token_block.h"
#include "metal/launcher.h"
#include "ops/activation.h"
#include "ops/attention.h"
#include "ops/compare.h"
#include "ops/gram.h"
#include "ops/head.h"
#include "ops/linear.h"
#include "ops/muon.h"
#include "ops/norm.h"
#include "ops/rotary.h"
#include "ops/translate_norm.h"

namespace nb = nanobind;
using namespace nb::literals;

NB_MODULE(_ext, m) {
  m.doc() = "Native operations of metalens. Use them through metalens.ops, which falls back to plain MLX if they cannot run.";

  // The signatures have types of mlx's own bindings, which must be loaded first.
  nb::module_::import_("mlx.core");

  m.def(
      "quantized_matmul", &metalens::quantized_matmul, "x"_a, "w"_a, "scales"_a, "biases"_a = nb::none(), "group_size"_a = 64, "bits"_a = 4,
      "transpose"_a = true, "mode"_a = "affine", "dtype"_a = nb::none(), "precision"_a = "float32", nb::kw_only(), "stream"_a = nb::none(),
      "Compute x W^T (or x W) for a frozen quantized W, on the CPU.\n\n"
      "x is [..., I] float32, float16 or bfloat16; w [O, I * bits / 32] uint32; scales and (affine) biases [O, I / group_size], as\n"
      "mlx.core.quantize gives them. affine: bits 2, 3, 4, 5, 6, 8, group_size 32, 64, 128; mxfp4, mxfp8, nvfp4. Returns [..., O] in dtype, by\n"
      "default that of x; sums are float32. precision 'bf16' permits operands rounded to bfloat16 if that is faster. Differentiable in x. With\n"
      "transpose=False, x is [..., O] and the result [..., I]. Raises ValueError if shapes or types do not fit together.");

  m.def(
      "matmul", &metalens::matmul, "x"_a, "w"_a, "transpose"_a = true, "dtype"_a = nb::none(), "precision"_a = "float32", nb::kw_only(),
      "stream"_a = nb::none(),
      "Compute x W^T (or x W) for a dense W, on the CPU.\n\n"
      "x is [..., I], w [O, I], each float32, float16 or bfloat16. Returns [..., O] in dtype, by default the promoted type; sums are float32.\n"
      "Differentiable in both. With transpose=False, x is [..., O] and the result [..., I]. Raises ValueError if shapes or types do not fit "
      "together.");

  m.def(
      "gram", &metalens::gram, "x"_a, "precision"_a = "float32", nb::kw_only(), "stream"_a = nb::none(),
      "Return x x^T [..., N, N] for x [..., N, K] of a float type, in that type. Computes the triangle on and below the diagonal and\n"
      "mirrors it. Sums are float32. Not differentiable. Raises ValueError if shape or type do not fit.");

  m.def(
      "muon_direction", &metalens::muon_direction, "gradient"_a, "momentum"_a, "beta"_a, "polynomials"_a, "slack"_a, "row_scale"_a = nb::none(),
      "column_scale"_a = nb::none(), "precision"_a = "float32", nb::kw_only(), "stream"_a = nb::none(),
      "Return [V, P, [<gradient, P>, <U, P>]] float32 for matrices [N, K]: V = beta momentum + (1 - beta) gradient,\n"
      "U = (1 - beta) gradient + beta V, and P = R p(R U S^-1 / (slack norm)) S^-1, with the diagonal matrices R of row_scale [N] and S of\n"
      "column_scale [K], the Frobenius norm of R U S^-1, and p the polynomials of singular values, one after the other, each with the coefficients\n"
      "of s, s^3 and s^5. Not differentiable. Raises ValueError if shapes or types do not fit together.");

  nb::class_<metalens::Head>(
      m, "Head",
      "The unembedding of a model: logits softcap(scale * (U n + bias)) + offset for the first `vocab` rows of U. Raises ValueError if parts do not "
      "fit "
      "together.")
      .def(
          nb::init<
              const mlx::core::array&, const std::optional<mlx::core::array>&, const std::optional<mlx::core::array>&, int, int, const std::string&,
              const std::optional<mlx::core::array>&, float, std::optional<float>, std::optional<int>, const std::optional<mlx::core::array>&>(),
          "values"_a, "scales"_a = nb::none(), "biases"_a = nb::none(), "group_size"_a = 64, "bits"_a = 4, "mode"_a = "affine", "bias"_a = nb::none(),
          "scale"_a = 1.0f, "softcap"_a = nb::none(), "vocab"_a = nb::none(), "offset"_a = nb::none());

  m.def(
      "lens_stats", &metalens::lens_stats, "n"_a, "head"_a, "k"_a = 1, "n_model"_a = nb::none(), "labels"_a = nb::none(), "precision"_a = "float32",
      "reverse"_a = false, nb::kw_only(), "stream"_a = nb::none(),
      "Return [lse, entropy, max_probability [L, N], top_ids int32, top_logits [L, N, k]] of rows n [L, N, D], then [kl, agrees] with n_model\n"
      "[N, D], then [nll, rank] with labels [N] or [N, C], then [KL(row || model)] with `reverse`. Never holds the logits. A label outside the\n"
      "vocabulary has nll NaN and rank -1; a row with NaN is NaN.");

  m.def(
      "lens_compare", &metalens::lens_compare, "a"_a, "head"_a, "lse_a"_a, "b"_a, "lse_b"_a, "head_b"_a.none() = nb::none(),
      "precision"_a = "float32", nb::kw_only(), "stream"_a = nb::none(),
      "Return [KL(a || b), KL(b || a), Jensen-Shannon divergence, total variation], each [L, N], of rows a [L, N, D] and b [L or 1, N, D]. lse_a "
      "and\n"
      "lse_b are the log-sum-exp of the rows, results of lens_target. Without head_b both go through `head`. Not differentiable.");

  m.def(
      "lens_target", &metalens::lens_target, "n_model"_a, "head"_a, "with_mean"_a = true, "precision"_a = "float32", nb::kw_only(),
      "stream"_a = nb::none(), "Return [lse [N], entropy [N]] and, for a linear head, the mean row [N, D] of U under the model's probabilities.");

  m.def(
      "lens_kl", &metalens::lens_kl, "n"_a, "head"_a, "n_model"_a, "lse"_a, "mean"_a = nb::none(), "with_gradient"_a = true,
      "precision"_a = "float32", nb::kw_only(), "stream"_a = nb::none(),
      "Return [KL(model || lens) [L, N], its gradient [L, N, D] at n [L, N, D]]. lse and mean are the results of lens_target for n_model [N, D].\n"
      "The KL is differentiable in n.");

  m.def(
      "translate_norm", &metalens::translate_norm, "h"_a, "w"_a = nb::none(), "b"_a = nb::none(), "norm"_a = "rms", "gain"_a = nb::none(),
      "norm_bias"_a = nb::none(), "eps"_a = 1e-5f, "precision"_a = "float32", nb::kw_only(), "stream"_a = nb::none(),
      "Return norm(h W^T + b) [..., D] float32; without w, W is the identity. norm is 'rms', 'layer' or 'none'. Differentiable in h, w and b.");

  m.def(
      "attention", &metalens::attention, "q"_a, "k"_a, "v"_a, "scale"_a, "causal"_a = false, "mask"_a = nb::none(), "sinks"_a = nb::none(),
      "precision"_a = "float32", nb::kw_only(), "stream"_a = nb::none(),
      "Return softmax(scale q k^T + mask) v [B, H, T, E] in q's type, for q [B, H, T, D], k [B, G, S, D], v [B, G, S, E]. mask broadcasts to\n"
      "[B, H, T, S]: booleans (true = visible) or floats. With `causal`, query i sees the keys up to i + S - T. sinks [H] are logits of one more\n"
      "key whose value is zero. Gradient of plain MLX.");

  m.def(
      "swiglu", &metalens::swiglu, "gate"_a, "x"_a, nb::kw_only(), "stream"_a = nb::none(),
      "Return silu(gate) * x for arrays of the same shape and float type, computed in float32. Gradient of plain MLX.");

  m.def(
      "gelu_tanh", &metalens::gelu_tanh, "x"_a, nb::kw_only(), "stream"_a = nb::none(),
      "Return x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 in the float type of x, computed in float32. Gradient of plain MLX.");

  m.def(
      "rms_norm", &metalens::rms_norm, "x"_a, "gain"_a = nb::none(), "eps"_a = 1e-5f, nb::kw_only(), "stream"_a = nb::none(),
      "Return gain * x / sqrt(mean(x^2) + eps) for the rows of x [..., D], in the promoted type. Gradient of plain MLX.");

  m.def(
      "layer_norm", &metalens::layer_norm, "x"_a, "gain"_a = nb::none(), "bias"_a = nb::none(), "eps"_a = 1e-5f, nb::kw_only(),
      "stream"_a = nb::none(),
      "Return gain * (x - mean(x)) / sqrt(var(x) + eps) + bias for the rows of x [..., D], in the promoted type. Gradient of plain MLX.");

  m.def(
      "rope", &metalens::rope, "x"_a, "dims"_a, "traditional"_a, "base"_a, "scale"_a, "offset"_a = 0, "freqs"_a = nb::none(), nb::kw_only(),
      "stream"_a = nb::none(), "Return mlx.core.fast.rope of the same arguments; angles are exact to float32. Gradient of plain MLX.");

  m.def(
      "run_sums_natively", &metalens::run_sums_natively, "outputs"_a,
      "Let the sums and products of two float arrays, in the graph that `outputs` wait for, run on the kernels. Values stay the same.");

  m.def("gpu_core_count", &metalens::gpu_core_count, "Return the number of the GPU's cores as macOS counts them; 0 if it is not known.");

  m.def(
      "metal_library", &metalens::metal_library,
      "Return the path of the library of Metal kernels compiled ahead of time; '' if this build or this machine has none.");

  m.def(
      "launch_metal",
      [](const std::string& kernel, const std::vector<mlx::core::array>& inputs, const std::vector<std::vector<int>>& shapes,
         const std::vector<mlx::core::Dtype>& dtypes, const std::tuple<int, int, int>& grid, const std::tuple<int, int, int>& threadgroup,
         const std::vector<int>& reuse, mlx::core::StreamOrDevice stream) {
        // The caster for MLX's own type of a shape is inside MLX.
        std::vector<mlx::core::Shape> outputs;
        for (const auto& shape : shapes) outputs.emplace_back(shape.begin(), shape.end());
        return metalens::launch_metal(kernel, inputs, outputs, dtypes, grid, threadgroup, reuse, stream);
      },
      "kernel"_a, "inputs"_a, "shapes"_a, "dtypes"_a, "grid"_a, "threadgroup"_a, "reuse"_a, nb::kw_only(), "stream"_a = nb::none(),
      "Run a kernel of metal_library() on the GPU and return its outputs, of `shapes` and `dtypes`.\n\n"
      "Its buffers are the inputs, row-contiguous and in order, then the outputs, as mlx.core.fast.metal_kernel lays them out. grid counts threads.\n"
      "Output i may overwrite input reuse[i] (-1: none) if nothing else needs that input. Not differentiable. Raises ValueError if the parts do\n"
      "not fit together or do not fit the GPU, RuntimeError if there is no library or it lacks the kernel.");

  m.def(
      "num_threads", &metalens::cpu::num_threads,
      "Return the number of threads that the kernels use: METALENS_NUM_THREADS, or the cores that this process may run on.");
  m.def("isa", [] { return metalens::cpu::kernels().name; }, "Return the name of the instruction set in use: METALENS_ISA, or the widest available.");
  m.def(
      "multiplies_bf16", [] { return metalens::cpu::kernels().bf16 != nullptr; },
      "Return whether the instruction set in use multiplies 16-bit operands faster. If not, precision 'bf16' computes as 'float32' does.");
  m.def("available_isas", &metalens::cpu::available_isas, "Return the instruction sets that are in this build and on this CPU, separated by spaces.");

  // The memory of a task, for the estimate of what training takes.
  m.attr("row_block") = metalens::cpu::kRowBlock;
  m.attr("vocabulary_block") = metalens::cpu::kVocabularyBlock;
}
