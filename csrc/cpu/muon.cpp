#include "cpu/muon.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace metalens::cpu {
namespace {

// Call f(row) for all rows, in runs long enough to occupy a thread.
template <typename F>
void for_rows(int64_t rows, int64_t columns, const F& f) {
  const int64_t run = std::max<int64_t>(1, 32768 / columns);
  parallel_for((rows + run - 1) / run, [&](int64_t i) {
    for (int64_t row = i * run; row < std::min(rows, (i + 1) * run); ++row) f(row);
  });
}

double total(const std::vector<double>& of_rows) {
  return std::accumulate(of_rows.begin(), of_rows.end(), 0.0);
}

// The sum of f(j): sixteen partial sums, which the compiler keeps in vectors. A row is short enough for float32; rows are added in double precision.
template <typename F>
double sum(int64_t count, const F& f) {
  float partial[16] = {};
  int64_t j = 0;
  for (; j + 16 <= count; j += 16) {
    for (int64_t lane = 0; lane < 16; ++lane) partial[lane] += f(j + lane);
  }
  for (; j < count; ++j) partial[0] += f(j);
  return std::accumulate(partial, partial + 16, 0.0);
}

}  // namespace

void muon_direction(const MuonInput& in, Precision precision, const MuonOutput& out) {
  const int64_t rows = in.rows, columns = in.columns, size = rows * columns;
  if (size == 0) {
    std::fill_n(out.slopes, 2, 0.0f);
    return;
  }
  const float beta = in.beta, rest = 1 - in.beta;
  // 1 / S, and 1 where there is no scale: the loops need no second form.
  std::vector<float> row_scale(rows, 1.0f), inverse(columns, 1.0f);
  if (in.row_scale) row_scale.assign(in.row_scale, in.row_scale + rows);
  for (int64_t j = 0; in.column_scale && j < columns; ++j) inverse[j] = 1 / in.column_scale[j];

  Buffer<float> x(size);
  std::vector<double> squares(rows), of_gradient(rows), of_update(rows);
  for_rows(rows, columns, [&](int64_t row) {
    const float *g = in.gradient + row * columns, *before = in.momentum + row * columns;
    float *v = out.momentum + row * columns, *to = x.data() + row * columns;
    for (int64_t j = 0; j < columns; ++j) {
      v[j] = beta * before[j] + rest * g[j];
      to[j] = row_scale[row] * (rest * g[j] + beta * v[j]) * inverse[j];
    }
    squares[row] = sum(columns, [&](int64_t j) { return to[j] * to[j]; });
  });
  const float norm = float(std::sqrt(total(squares)));
  const float factor = norm == 0 ? 0.0f : 1 / (in.slack * norm);
  const bool wide = rows <= columns;
  for_rows(rows, columns, [&](int64_t row) {
    for (int64_t j = 0; j < columns; ++j) x.data()[row * columns + j] *= factor;
  });
  if (!wide) {
    Buffer<float> turned(size);
    kernels().transpose_block(x.data(), columns, rows, columns, turned.data(), rows);
    x = std::move(turned);
  }
  if (norm != 0) odd_polynomials(x, std::min(rows, columns), std::max(rows, columns), in.polynomials, precision);
  for_rows(rows, columns, [&](int64_t row) {
    const float *g = in.gradient + row * columns, *v = out.momentum + row * columns;
    float* to = out.direction + row * columns;
    for (int64_t j = 0; j < columns; ++j) {
      const float found = wide ? x.data()[row * columns + j] : x.data()[j * rows + row];
      to[j] = row_scale[row] * found * inverse[j];
    }
    of_gradient[row] = sum(columns, [&](int64_t j) { return g[j] * to[j]; });
    of_update[row] = sum(columns, [&](int64_t j) { return (rest * g[j] + beta * v[j]) * to[j]; });
  });
  out.slopes[0] = float(total(of_gradient));
  out.slopes[1] = float(total(of_update));
}

}  // namespace metalens::cpu
