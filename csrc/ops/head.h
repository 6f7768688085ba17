// The operations on rows that go through a model's unembedding. None of them ever holds the logits [rows, V].
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "cpu/head.h"
#include "ops/weight.h"

namespace metalens {

// A head without its arrays. A primitive keeps this; the arrays are among its inputs: the weight's, then the bias and the offset if there are any.
struct HeadSpec {
  WeightSpec weight;
  bool has_bias = false;
  bool has_offset = false;
  float scale = 1;
  float softcap = 0;  // 0: none
  int vocab = 0;

  bool operator==(const HeadSpec&) const = default;
  cpu::Head head(const mx::array* first) const;
};

// The unembedding of a model: logits softcap(scale * (U n + bias)) + offset for the first `vocab` rows of U. The constructor checks its parts.
class Head {
 public:
  Head(
      const mx::array& values,
      const std::optional<mx::array>& scales,
      const std::optional<mx::array>& biases,
      int group_size,
      int bits,
      const std::string& mode,
      const std::optional<mx::array>& bias,
      float scale,
      std::optional<float> softcap,
      std::optional<int> vocab,
      const std::optional<mx::array>& offset);

  const HeadSpec& spec() const {
    return spec_;
  }
  int64_t width() const {
    return weight_.columns();
  }
  // The inputs of a primitive: `rows`, then the head's arrays.
  std::vector<mx::array> inputs(std::vector<mx::array> rows, mx::Stream stream) const;

 private:
  Weight weight_;
  std::optional<mx::array> bias_, offset_;
  HeadSpec spec_;
};

// {lse, entropy, max_probability [L, N], top_ids [L, N, k] int32, top_logits [L, N, k]}, then {kl, agrees} if n_model is given, then {nll, rank} if
// labels are given, then {reverse_kl} with `reverse`, which needs n_model. n [L, N, D], n_model [N, D]; labels [N] or [N, C] of any integer type,
// which is the shape of nll and rank after [L].
std::vector<mx::array> lens_stats(
    const mx::array& n,
    const Head& head,
    int k,
    const std::optional<mx::array>& n_model,
    const std::optional<mx::array>& labels,
    const std::string& precision,
    bool reverse = false,
    mx::StreamOrDevice s = {});

// {lse [N], entropy [N], mean [N, D]} of the model's rows n_model [N, D]. No mean for a softcapped head, or without `with_mean`.
std::vector<mx::array> lens_target(
    const mx::array& n_model, const Head& head, bool with_mean, const std::string& precision, mx::StreamOrDevice s = {});

// {KL(model || lens) [L, N], its gradient at n [L, N, D]}. The KL is differentiable in n, by one multiplication with the saved gradient. Without
// `with_gradient` only the KL, not differentiable. lse and mean are results of lens_target; a softcapped head has no mean.
std::vector<mx::array> lens_kl(
    const mx::array& n,
    const Head& head,
    const mx::array& n_model,
    const mx::array& lse,
    const std::optional<mx::array>& mean,
    bool with_gradient,
    const std::string& precision,
    mx::StreamOrDevice s = {});

}  // namespace metalens
