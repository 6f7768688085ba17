// gemm on buffers of exactly the size it may touch, against a double-precision product: built with sanitizers by test_sanitizers.py. Exits 1 and says
// which case on a wrong value; the sanitizers end it on a wrong access or a race.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/thread_pool.h"

using namespace metalens::cpu;

namespace {

uint32_t state = 1;

uint32_t next_random() {
  return state = state * 1664525u + 1013904223u;
}

float uniform() {
  return float(next_random() >> 8) / float(1 << 24) - 0.5f;
}

struct Case {
  int64_t rows, outputs, inputs;
  int bits, group;
  bool transpose;
};

// A matrix [outputs, inputs] in exactly sized buffers, and its values.
struct Weight {
  std::vector<uint8_t> codes;
  std::vector<float> scales, biases;
  std::vector<double> values;

  explicit Weight(const Case& c) : values(c.outputs * c.inputs) {
    if (!c.bits) {
      codes.resize(values.size() * sizeof(float));
      for (size_t i = 0; i < values.size(); ++i) {
        const float v = uniform();
        values[i] = v;
        std::memcpy(codes.data() + i * sizeof(float), &v, sizeof(float));
      }
      return;
    }
    codes.resize(values.size() * c.bits / 8);
    for (size_t i = 0; i < values.size() / c.group; ++i) {
      scales.push_back(uniform());
      biases.push_back(uniform());
    }
    for (size_t i = 0; i < values.size(); ++i) {
      const uint32_t code = next_random() >> (32 - c.bits);
      for (int bit = 0; bit < c.bits; ++bit) {
        const size_t at = i * c.bits + bit;
        codes[at / 8] |= uint8_t((code >> bit & 1) << at % 8);
      }
      values[i] = double(scales[i / c.group]) * code + biases[i / c.group];
    }
  }
};

bool check(const Case& c) {
  const Weight weight(c);
  const Matrix w{c.outputs, c.inputs, Element::f32, c.bits, c.group, weight.codes.data(), weight.scales.data(), weight.biases.data()};
  const int64_t k = c.transpose ? c.inputs : c.outputs, n = c.transpose ? c.outputs : c.inputs;
  std::vector<float> a(c.rows * k), out(c.rows * n, 1e30f);
  for (auto& v : a) v = uniform();
  gemm(a.data(), c.rows, n, k, w, c.transpose, out.data());
  for (int64_t m = 0; m < c.rows; ++m) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < k; ++i) {
        const double term = a[m * k + i] * (c.transpose ? weight.values[j * k + i] : weight.values[i * n + j]);
        sum += term;
        size += std::abs(term);
      }
      if (!(std::abs(out[m * n + j] - sum) <= 2e-5 * size + 1e-6)) {
        std::printf(
            "rows %ld outputs %ld inputs %ld bits %d transpose %d: at (%ld, %ld) %g instead of %g\n", long(c.rows), long(c.outputs), long(c.inputs),
            c.bits, int(c.transpose), long(m), long(j), out[m * n + j], sum);
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  bool right = true;
  for (int bits : {0, 2, 3, 4, 5, 6, 8}) {
    for (int64_t rows : {1, 5, 13, 130}) {
      for (int64_t outputs : {1, 33, 67}) {
        for (int64_t inputs : {64, 320}) {
          for (bool transpose : {false, true}) right = check({rows, outputs, inputs, bits, 32, transpose}) && right;
        }
      }
    }
  }
  for (int64_t odd : {1, 7, 261}) right = check({3, odd, odd, 0, 0, true}) && check({3, odd, odd, 0, 0, false}) && right;

  // Several streams of MLX call at once; they take turns on one pool.
  std::vector<int> turns(4);
  std::vector<std::thread> callers;
  for (int& count : turns) {
    callers.emplace_back([&count] {
      for (int i = 0; i < 50; ++i) {
        std::vector<int> done(17);
        parallel_for(17, [&](int64_t task) { done[task] += 1; });
        count += std::count(done.begin(), done.end(), 1) == 17;
      }
    });
  }
  for (auto& caller : callers) caller.join();
  right = right && std::count(turns.begin(), turns.end(), 50) == 4;

  // An exception in a task reaches the caller, and the pool works on.
  bool caught = false;
  try {
    parallel_for(8, [](int64_t task) {
      if (task == 5) throw 5;
    });
  } catch (int) {
    caught = true;
  }
  return right && caught ? 0 : 1;
}
