// Compares attention and swiglu with double precision.
#include "check.h"
#include "cpu/attention.h"

using namespace check;

namespace {

struct Case {
  int64_t batch, heads, kv_heads, queries, keys, d, d_value;
  bool causal, masked;
  int64_t broken;  // a query of the first head with NaN in it, or -1
};

void check_attention(const Case& c) {
  begin(
      "attention B %ld H %ld G %ld T %ld S %ld D %ld E %ld causal %d masked %d broken %ld", long(c.batch), long(c.heads), long(c.kv_heads),
      long(c.queries), long(c.keys), long(c.d), long(c.d_value), int(c.causal), int(c.masked), long(c.broken));
  std::vector<float> q = normals(c.batch * c.heads * c.queries * c.d, 1);
  const std::vector<float> k = normals(c.batch * c.kv_heads * c.keys * c.d, 1), v = normals(c.batch * c.kv_heads * c.keys * c.d_value, 1);
  std::vector<float> mask = normals(c.masked ? c.queries * c.keys : 0, 1);
  for (size_t i = 0; i < mask.size(); i += 5) mask[i] = i % c.keys ? -kInfinity : 0;
  if (c.broken >= 0) q[c.broken * c.d] = kNaN;
  const float scale = 0.7f;
  std::vector<float> out(c.batch * c.heads * c.queries * c.d_value, kNaN);
  const AttentionInput in{c.batch,
                          c.heads,
                          c.kv_heads,
                          c.queries,
                          c.keys,
                          c.d,
                          c.d_value,
                          q.data(),
                          k.data(),
                          v.data(),
                          scale,
                          c.causal,
                          c.masked ? mask.data() : nullptr};
  attention(in, Precision::float32, out.data());
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t h = 0; h < c.heads; ++h) {
      const int64_t shared = b * c.kv_heads + h / (c.heads / c.kv_heads);
      for (int64_t t = 0; t < c.queries; ++t) {
        const int64_t row = (b * c.heads + h) * c.queries + t;
        std::vector<double> z(c.keys), sums(c.d_value);
        double top = -INFINITY, total = 0;
        for (int64_t s = 0; s < c.keys; ++s) {
          for (int64_t i = 0; i < c.d; ++i) z[s] += double(scale) * q[row * c.d + i] * k[(shared * c.keys + s) * c.d + i];
          if (c.masked) z[s] += mask[t * c.keys + s];
          if (c.causal && s > t + c.keys - c.queries) z[s] = -INFINITY;
          top = std::max(top, z[s]);
        }
        for (int64_t s = 0; s < c.keys; ++s) {
          const double p = std::exp(z[s] - top);
          total += p;
          for (int64_t i = 0; i < c.d_value; ++i) sums[i] += p * v[(shared * c.keys + s) * c.d_value + i];
        }
        for (int64_t i = 0; i < c.d_value; ++i) near("out", row * c.d_value + i, out[row * c.d_value + i], sums[i] / total, 5e-6);
      }
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
    near("out", i, out[i], exact, 1e-6 * std::abs(exact) + 1e-36);
  }
}

}  // namespace

int main() {
  check_attention({1, 1, 1, 1, 1, 1, 1, false, false, -1});
  check_attention({2, 4, 2, 7, 7, 8, 5, true, false, -1});
  check_attention({1, 3, 3, 5, 9, 16, 4, false, true, 2});
  check_attention({1, 2, 1, 67, 270, 6, 9, true, false, 66});
  check_attention({1, 1, 1, 130, 130, 3, 2, true, true, 0});
  for (int64_t n : {1, 15, 16, 17, 1000}) check_swiglu(n);
  return result();
}
