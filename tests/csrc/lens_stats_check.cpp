// Compares lens_stats with a softmax in double precision.
#include "check_head.h"
#include "cpu/lens_stats.h"

using namespace check;

namespace {

struct Options {
  bool model, labels;
  int64_t k;
  int64_t broken = -1;    // a row that is NaN; -2: the model's row of token 0
  int64_t per_token = 1;  // labels of each token
  bool reverse = false;
};

// Outputs in buffers of exactly their size; outputs that were not asked for are empty.
struct Outputs {
  std::vector<float> lse, entropy, max_probability, top_logits, kl, reverse_kl, nll;
  std::vector<int32_t> top_ids, rank;
  std::vector<uint8_t> agrees;

  Outputs(int64_t rows, const Options& o)
      : lse(rows),
        entropy(rows),
        max_probability(rows),
        top_logits(rows * o.k),
        kl(o.model * rows),
        reverse_kl(o.reverse * rows),
        nll(o.labels * rows * o.per_token),
        top_ids(rows * o.k),
        rank(o.labels * rows * o.per_token),
        agrees(o.model * rows) {
  }

  LensStatsOutput pointers() {
    return {
        lse.data(),
        entropy.data(),
        max_probability.data(),
        top_ids.data(),
        top_logits.data(),
        kl.data(),
        reinterpret_cast<bool*>(agrees.data()),
        reverse_kl.data(),
        nll.data(),
        rank.data()};
  }
};

// Logits that the kernel may see as equal can come in any order; if they are equal, the lower id comes first.
void check_top(const Outputs& out, int64_t row, const Softmax& lens, int64_t k, double error) {
  std::vector<double> sorted = lens.z;
  std::sort(sorted.rbegin(), sorted.rend());
  for (int64_t i = 0; i < k; ++i) {
    const int64_t at = row * k + i, id = out.top_ids[at];
    expect(id >= 0 && id < int64_t(lens.z.size()), "top id", at, double(id), 0, 0);
    near("top logit", at, out.top_logits[at], sorted[i], error);
    near("logit of top id", at, lens.z[id], sorted[i], error);
    for (int64_t j = 0; j < i; ++j) expect(out.top_ids[row * k + j] != id, "repeated top id", at, double(id), 0, 0);
    if (i == 0 || out.top_logits[at] != out.top_logits[at - 1]) continue;
    expect(id > out.top_ids[at - 1], "order of ties", at, double(id), out.top_ids[at - 1], 0);
  }
}

void check_nan(const Outputs& out, int64_t row, const Options& o) {
  near("lse of a NaN row", row, out.lse[row], kNaN, 0);
  near("entropy of a NaN row", row, out.entropy[row], kNaN, 0);
  near("max probability of a NaN row", row, out.max_probability[row], kNaN, 0);
  for (int64_t i = 0; i < o.k; ++i) near("top logit of a NaN row", row, out.top_logits[row * o.k + i], kNaN, 0);
  if (o.model) near("kl of a NaN row", row, out.kl[row], kNaN, 0);
  if (o.reverse) near("reverse kl of a NaN row", row, out.reverse_kl[row], kNaN, 0);
  for (int64_t i = 0; o.labels && i < o.per_token; ++i) near("nll of a NaN row", row, out.nll[row * o.per_token + i], kNaN, 0);
}

void check_stats(const HeadCase& c, const Options& o, Precision precision) {
  begin(
      "lens_stats layers %ld tokens %ld D %ld vocab %ld + %ld bits %d bias %d scale %g softcap %g offset %d model %d labels %d k %ld broken %ld "
      "precision %d labels per token %d reverse %d",
      long(c.layers), long(c.tokens), long(c.d), long(c.vocab), long(c.padding), c.storage.bits, int(c.bias), c.scale, c.softcap, int(c.offset),
      int(o.model), int(o.labels), long(o.k), long(o.broken), int(precision), int(o.per_token), int(o.reverse));
  const TestHead test(c);
  const Head head = test.head();
  std::vector<float> model = test.rows(c.tokens), n = test.around(model);
  if (o.broken >= 0) n[o.broken * c.d] = kNaN;
  if (o.broken == -2) model[c.d - 1] = kNaN;
  std::vector<int32_t> labels(c.tokens * o.per_token);
  for (int64_t t = 0; t < int64_t(labels.size()); ++t) labels[t] = t == 1 ? int32_t(c.vocab) : t == 2 ? -1 : int32_t((next_random() >> 8) % c.vocab);
  const int64_t rows = c.layers * c.tokens;
  Outputs out(rows, o);
  lens_stats(
      head, {c.layers, c.tokens, n.data(), o.model ? model.data() : nullptr, o.labels ? labels.data() : nullptr, o.per_token, o.k, o.reverse},
      precision, out.pointers());

  for (int64_t r = 0; r < rows; ++r) {
    if (r == o.broken) {
      check_nan(out, r, o);
      continue;
    }
    const int64_t t = r % c.tokens;
    const Softmax lens(test, n.data() + r * c.d);
    const double error = unit(precision) * lens.size + 1e-6 * (1 + std::abs(lens.lse));
    near("lse", r, out.lse[r], lens.lse, error);
    near("entropy", r, out.entropy[r], lens.entropy, error * (2 + std::log(double(c.vocab))) + 2e-6);
    near("max probability", r, out.max_probability[r], lens.p[lens.best()], 2 * error * lens.p[lens.best()]);
    check_top(out, r, lens, o.k, error);
    for (int64_t i = 0; o.labels && i < o.per_token; ++i) {
      const int64_t label = labels[t * o.per_token + i], at = r * o.per_token + i;
      const bool known = label >= 0 && label < c.vocab;
      const double z = known ? lens.z[label] : kNaN;
      near("nll", at, out.nll[at], known ? lens.lse - z : kNaN, 2 * error);
      const auto above = [&](double bound) { return double(std::count_if(lens.z.begin(), lens.z.end(), [&](double v) { return v > bound; })); };
      const double least = known ? 1 + above(z + 2 * error) : -1, most = known ? 1 + above(z - 2 * error) : -1;
      expect(out.rank[at] >= least && out.rank[at] <= most, "rank", at, out.rank[at], least, most - least);
    }
    if (!o.model) continue;
    if (o.broken == -2 && t == 0) {
      near("kl to a NaN row", r, out.kl[r], kNaN, 0);
      if (o.reverse) near("reverse kl to a NaN row", r, out.reverse_kl[r], kNaN, 0);
      continue;
    }
    const Softmax other(test, model.data() + t * c.d);
    near("kl", r, out.kl[r], divergence(other, lens), 4 * (error + unit(precision) * other.size));
    if (o.reverse) near("reverse kl", r, out.reverse_kl[r], divergence(lens, other), 4 * (error + unit(precision) * other.size));
    const int64_t best = lens.best(), model_best = other.best();
    const bool close = best != model_best && (lens.z[best] - lens.z[model_best] < error || other.z[model_best] - other.z[best] < error);
    if (!close) equal("agrees", r, out.agrees[r], best == model_best);
  }
}

}  // namespace

int main() {
  for (Precision precision : precisions()) {
    // Vocabularies of one id, just below and above a block, and of several blocks; k up to all of them.
    for (int64_t vocab : {1, 255, 257, 700}) {
      const HeadCase c{2, 3, 64, vocab, 0, kFourBits, false, 1, 0, 0.5f};
      check_stats(c, {true, true, 1}, precision);
      check_stats(c, {true, true, 1, -1, 3, true}, precision);
      check_stats(c, {false, false, std::min<int64_t>(vocab, 3)}, precision);
      check_stats(c, {false, true, std::min<int64_t>(vocab, 3)}, precision);
      check_stats(c, {true, false, vocab}, precision);
    }
    // Heads with all options; row counts too small for packing, and more than one block of rows.
    for (const auto& [layers, tokens] : {std::pair<int64_t, int64_t>{1, 1}, {1, 3}, {1, 4}, {5, 3}}) {
      check_stats({layers, tokens, 32, 300, 13, kFourBits, true, 0.25f, 0, 1}, {true, true, 3}, precision);
      check_stats({layers, tokens, 96, 300, 5, {Format::affine, 8, 32, Element::bf16}, true, 0.5f, 5, 1}, {true, true, 3}, precision);
      check_stats({layers, tokens, 32, 300, 13, kFourBits, true, 0.25f, 0, 1, true}, {true, true, 3}, precision);
      check_stats({layers, tokens, 32, 300, 0, kFourBits, false, 1, 5, 1, true}, {true, true, 3}, precision);
      check_stats({layers, tokens, 17, 300, 1, kDense, false, 1, 3, 20}, {true, true, 2}, precision);
      check_stats({layers, tokens, 32, 700, 13, kFourBits, true, 0.25f, 0, 1, true}, {true, true, 3, -1, 2, true}, precision);
    }
    check_stats({3, 100, 16, 257, 0, kNvfp4, false, 1, 0, 1}, {true, true, 2}, precision);
    check_stats({260, 2, 16, 65, 0, kNvfp4, false, 1, 0, 1}, {true, false, 1}, precision);
    // A row that is NaN changes no other row.
    for (int64_t broken : {0, 4, -2}) check_stats({3, 2, 32, 300, 0, kFourBits, true, 1, 0, 1}, {true, true, 3, broken, 2, true}, precision);
    check_stats({1, 3, 32, 300, 0, kFourBits, true, 1, 4, 1}, {true, true, 3, 1}, precision);
    check_stats({0, 3, 32, 30, 0, kFourBits, true, 1, 0, 1}, {true, true, 1}, precision);
  }

  // Ids with equal rows of U have logits equal to the last bit, also if they are in different blocks.
  begin("lens_stats of equal logits");
  const std::vector<float> u(300 * 16, 0.5f), n(5 * 16, 1);
  const Head head{{300, 16, Element::f32, Format::dense, 0, 0, u.data(), nullptr, nullptr}, nullptr, 1, 0, 300};
  const std::vector<int32_t> labels(5, 299);
  const Options o{true, true, 300};
  Outputs out(5, o);
  lens_stats(head, {1, 5, n.data(), n.data(), labels.data(), 1, o.k, false}, Precision::float32, out.pointers());
  for (int i = 0; i < 1500; ++i) equal("top id", i, out.top_ids[i], i % 300);
  for (int r = 0; r < 5; ++r) {
    equal("rank", r, out.rank[r], 1);
    equal("agrees", r, out.agrees[r], 1);
    near("kl", r, out.kl[r], 0, 1e-6);
    near("entropy", r, out.entropy[r], std::log(300), 1e-5);
  }
  return result();
}
