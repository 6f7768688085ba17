// Compares the operations of a model's forward pass with double precision: attention, norms, rotary positions, activations, sums.
#include "check.h"
#include "cpu/attention.h"
#include "cpu/elementwise.h"
#include "cpu/norm_rows.h"
#include "cpu/rotary.h"

using namespace check;

namespace {

enum class Masked { none, numbers, booleans };

struct Case {
  int64_t batch, heads, kv_heads, queries, keys, d, d_value;
  bool causal;
  Masked masked;
  bool sinks;
  int64_t broken;  // a query of the first head with NaN in it, or -1
  Element element = Element::f32;
};

// Numbers rounded to a type of element, as it stores them, and the same as floats.
struct Stored {
  std::vector<uint16_t> narrow;
  std::vector<float> wide;

  Stored(std::vector<float> numbers, Element element) : narrow(element == Element::f32 ? 0 : numbers.size()), wide(std::move(numbers)) {
    if (narrow.empty()) return;
    kernels().store(element, wide.data(), narrow.data(), int64_t(wide.size()));
    kernels().load(element, narrow.data(), wide.data(), int64_t(wide.size()));
  }
  const void* data() const {
    return narrow.empty() ? static_cast<const void*>(wide.data()) : narrow.data();
  }
};

void check_attention(const Case& c) {
  begin(
      "attention B %ld H %ld G %ld T %ld S %ld D %ld E %ld causal %d masked %d sinks %d broken %ld element %d", long(c.batch), long(c.heads),
      long(c.kv_heads), long(c.queries), long(c.keys), long(c.d), long(c.d_value), int(c.causal), int(c.masked), int(c.sinks), long(c.broken),
      int(c.element));
  std::vector<float> numbers = normals(c.batch * c.heads * c.queries * c.d, 1);
  if (c.broken >= 0) numbers[c.broken * c.d] = kNaN;
  const Stored q(numbers, c.element), k(normals(c.batch * c.kv_heads * c.keys * c.d, 1), c.element);
  // The values lie as [batch, keys, heads, width], as a model computes them.
  const Stored v(normals(c.batch * c.keys * c.kv_heads * c.d_value, 1), c.element);
  // A mask of its own for every head.
  std::vector<float> added = normals(c.masked == Masked::none ? 0 : c.heads * c.queries * c.keys, 1);
  for (size_t i = 0; i < added.size(); i += 5) added[i] = i % c.keys ? -kInfinity : 0;
  std::vector<uint8_t> visible(added.size());
  if (c.masked == Masked::booleans) {
    // A window: whole blocks of keys are hidden.
    for (size_t i = 0; i < added.size(); ++i) {
      const int64_t distance = int64_t(i / c.keys % c.queries) + c.keys - c.queries - int64_t(i % c.keys);
      visible[i] = distance >= 0 && distance < 20;
      added[i] = visible[i] ? 0 : -kInfinity;
    }
  }
  const std::vector<float> sinks = normals(c.sinks ? c.heads : 0, 1);
  const float scale = 0.7f;
  std::vector<float> out(c.batch * c.heads * c.queries * c.d_value, kNaN);
  AttentionMask mask;
  if (c.masked != Masked::none) {
    mask = {added.data(), false, Element::f32, {0, c.queries * c.keys, c.keys, 1}};
    if (c.masked == Masked::booleans) {
      mask.data = visible.data();
      mask.booleans = true;
    }
  }
  const AttentionInput in{
      .batch = c.batch,
      .heads = c.heads,
      .kv_heads = c.kv_heads,
      .queries = c.queries,
      .keys = c.keys,
      .q = {q.data(), c.element, {c.batch, c.heads, c.queries, c.d}, {c.heads * c.queries * c.d, c.queries * c.d, c.d, 1}},
      .k = {k.data(), c.element, {c.batch, c.kv_heads, c.keys, c.d}, {c.kv_heads * c.keys * c.d, c.keys * c.d, c.d, 1}},
      .v = {v.data(), c.element, {c.batch, c.kv_heads, c.keys, c.d_value}, {c.keys * c.kv_heads * c.d_value, c.d_value, c.kv_heads * c.d_value, 1}},
      .scale = scale,
      .causal = c.causal,
      .mask = mask,
      .sinks = c.sinks ? sinks.data() : nullptr,
  };
  attention(in, Precision::float32, {out.data(), Element::f32});
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t h = 0; h < c.heads; ++h) {
      const int64_t kv_head = h / (c.heads / c.kv_heads), shared = b * c.kv_heads + kv_head;
      for (int64_t t = 0; t < c.queries; ++t) {
        const int64_t row = (b * c.heads + h) * c.queries + t, to = (b * c.queries + t) * c.heads + h;
        std::vector<double> z(c.keys), sums(c.d_value);
        double top = c.sinks ? sinks[h] : -INFINITY;
        for (int64_t s = 0; s < c.keys; ++s) {
          for (int64_t i = 0; i < c.d; ++i) z[s] += double(scale) * q.wide[row * c.d + i] * k.wide[(shared * c.keys + s) * c.d + i];
          if (c.masked != Masked::none) z[s] += added[(h * c.queries + t) * c.keys + s];
          if (c.causal && s > t + c.keys - c.queries) z[s] = -INFINITY;
          top = std::max(top, z[s]);
        }
        double total = c.sinks ? std::exp(sinks[h] - top) : 0;
        for (int64_t s = 0; s < c.keys; ++s) {
          const double p = std::exp(z[s] - top);
          total += p;
          for (int64_t i = 0; i < c.d_value; ++i) sums[i] += p * v.wide[((b * c.keys + s) * c.kv_heads + kv_head) * c.d_value + i];
        }
        for (int64_t i = 0; i < c.d_value; ++i) near("out", to * c.d_value + i, out[to * c.d_value + i], sums[i] / total, 5e-6);
      }
    }
  }
}

// Rows of any type and strides, normed, turned and added.
void check_rows(Element element, int64_t rows, int64_t width, bool transposed) {
  begin("rows element %d %ld x %ld transposed %d", int(element), long(rows), long(width), int(transposed));
  const Stored x(normals(rows * width, 2), element), gain(normals(width, 1), Element::f32);
  const std::vector<int64_t> strides = transposed ? std::vector<int64_t>{1, rows} : std::vector<int64_t>{width, 1};
  const StridedRows a(x.data(), element, {rows, width}, strides), same(gain.data(), Element::f32, {rows, width}, {0, 1});
  const auto at = [&](int64_t r, int64_t i) { return double(x.wide[r * strides[0] + i * strides[1]]); };
  std::vector<float> y(rows * width, kNaN);
  norm_rows(a, {true, false, 1e-5f, gain.wide.data(), nullptr}, {y.data(), Element::f32});
  for (int64_t r = 0; r < rows; ++r) {
    double squares = 0;
    for (int64_t i = 0; i < width; ++i) squares += at(r, i) * at(r, i) / width;
    for (int64_t i = 0; i < width; ++i) near("norm", r * width + i, y[r * width + i], at(r, i) / std::sqrt(squares + 1e-5) * gain.wide[i], 2e-5);
  }
  elementwise(Elementwise::add, a, same, {y.data(), Element::f32});
  for (int64_t i = 0; i < rows * width; ++i) near("sum", i, y[i], at(i / width, i % width) + gain.wide[i % width], 1e-6);
  elementwise(Elementwise::multiply, a, same, {y.data(), Element::f32});
  for (int64_t i = 0; i < rows * width; ++i) near("product", i, y[i], at(i / width, i % width) * gain.wide[i % width], 4e-6);
  elementwise(Elementwise::gelu_tanh, a, {}, {y.data(), Element::f32});
  for (int64_t i = 0; i < rows * width; ++i) {
    const double v = at(i / width, i % width);
    near("gelu", i, y[i], 0.5 * v * (1 + std::tanh(std::sqrt(2 / 3.14159265358979) * (v + 0.044715 * v * v * v))), 3e-6);
  }
  for (const bool pairs : {false, true}) {
    const int64_t dims = width / 2 * 2, half = dims / 2, positions = std::max<int64_t>(1, rows / 2);
    if (dims == 0 || rows % positions) continue;
    rotate_rows({dims, pairs, 100, 0.5f, 3, {}}, positions, a, {y.data(), Element::f32});
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < half; ++i) {
        const int64_t one = pairs ? 2 * i : i, two = pairs ? 2 * i + 1 : i + half;
        const double angle = (3 + double(r % positions)) * 0.5 / std::pow(100.0, 2.0 * i / dims);
        near("turned", r * width + one, y[r * width + one], at(r, one) * std::cos(angle) - at(r, two) * std::sin(angle), 2e-6);
        near("turned", r * width + two, y[r * width + two], at(r, two) * std::cos(angle) + at(r, one) * std::sin(angle), 2e-6);
      }
      for (int64_t i = dims; i < width; ++i) near("kept", r * width + i, y[r * width + i], at(r, i), 0);
    }
  }
}

void check_swiglu(int64_t n) {
  begin("swiglu n %ld", long(n));
  const std::vector<float> gate = normals(n, 30), x = normals(n, 1);
  std::vector<float> out(n, kNaN);
  kernels().swiglu(gate.data(), x.data(), n, out.data());
  for (int64_t i = 0; i < n; ++i) {
    const double exact = gate[i] / (1 + std::exp(-double(gate[i]))) * x[i];
    // The kernel takes exp(-gate) as at most exp(88).
    near("out", i, out[i], exact, 1e-6 * std::abs(exact) + std::abs(double(gate[i]) * x[i]) * std::exp(-88));
  }
}

}  // namespace

int main() {
  check_attention({1, 1, 1, 1, 1, 1, 1, false, Masked::none, false, -1});
  check_attention({2, 4, 2, 7, 7, 8, 5, true, Masked::none, false, -1});
  check_attention({1, 3, 3, 5, 9, 16, 4, false, Masked::numbers, true, 2});
  check_attention({1, 2, 1, 67, 270, 6, 9, true, Masked::none, true, 66});
  check_attention({1, 1, 1, 130, 130, 3, 2, true, Masked::numbers, false, 0});
  check_attention({1, 2, 1, 300, 530, 4, 3, false, Masked::booleans, false, 7});
  for (Element element : {Element::f16, Element::bf16}) {
    check_attention({2, 4, 2, 9, 9, 8, 5, true, Masked::none, false, -1, element});
    check_attention({1, 2, 2, 67, 270, 6, 9, false, Masked::booleans, true, 3, element});
  }
  for (int64_t n : {1, 15, 16, 17, 1000}) check_swiglu(n);
  for (Element element : {Element::f32, Element::f16, Element::bf16}) {
    for (const bool transposed : {false, true}) {
      for (int64_t rows : {1, 2, 34}) {
        for (int64_t width : {1, 2, 17, 64, 2100}) check_rows(element, rows, width, transposed);
      }
    }
  }
  return result();
}
