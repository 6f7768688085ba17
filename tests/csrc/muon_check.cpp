// Compares muon_direction with the same steps in double precision: wide, square and tall matrices, with and without scales.
// Also compares transpose_block.
#include "check.h"
#include "cpu/muon.h"

using namespace check;

namespace {

using Wide = std::vector<double>;

// a [n, k] times b [k, m]
Wide product(const Wide& a, const Wide& b, int64_t n, int64_t k, int64_t m) {
  Wide c(n * m);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t d = 0; d < k; ++d) {
      for (int64_t j = 0; j < m; ++j) c[i * m + j] += a[i * k + d] * b[d * m + j];
    }
  }
  return c;
}

Wide turned(const Wide& a, int64_t rows, int64_t columns) {
  Wide t(a.size());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) t[j * rows + i] = a[i * columns + j];
  }
  return t;
}

void check_direction(int64_t rows, int64_t columns, bool scaled, std::vector<OddPolynomial> polynomials, Precision precision) {
  begin(
      "muon rows %ld columns %ld scaled %d polynomials %ld precision %d", long(rows), long(columns), int(scaled), long(polynomials.size()),
      int(precision));
  const std::vector<float> gradient = normals(rows * columns, 1), momentum = normals(rows * columns, 2);
  std::vector<float> of_rows = normals(rows, 3), of_columns = normals(columns, 4);
  for (float& s : of_rows) s = 1 + std::abs(s);
  for (float& s : of_columns) s = 1 + std::abs(s);
  std::vector<float> v(rows * columns, kNaN), direction(rows * columns, kNaN), slopes(2, kNaN);
  const MuonInput in{
      .gradient = gradient.data(),
      .momentum = momentum.data(),
      .row_scale = scaled ? of_rows.data() : nullptr,
      .column_scale = scaled ? of_columns.data() : nullptr,
      .rows = rows,
      .columns = columns,
      .beta = 0.75f,
      .slack = 1.01f,
      .polynomials = polynomials,
  };
  muon_direction(in, precision, {v.data(), direction.data(), slopes.data()});

  Wide u(rows * columns), x(rows * columns);
  double norm = 0;
  for (int64_t i = 0; i < rows * columns; ++i) {
    const double now = 0.75 * momentum[i] + 0.25 * gradient[i];
    near("momentum", i, v[i], now, 1e-6);
    u[i] = 0.25 * gradient[i] + 0.75 * now;
    x[i] = scaled ? of_rows[i / columns] * u[i] / of_columns[i % columns] : u[i];
    norm += x[i] * x[i];
  }
  for (double& e : x) e /= double(1.01f) * std::sqrt(norm);
  const int64_t n = std::min(rows, columns), k = std::max(rows, columns);
  if (rows > columns) x = turned(x, rows, columns);
  for (const auto& p : polynomials) {
    const Wide s = product(x, turned(x, n, k), n, k, n), s2 = product(s, s, n, n, n);
    Wide factor(n * n);
    for (int64_t i = 0; i < n * n; ++i) factor[i] = p.b * s[i] + p.c * s2[i] + (i % (n + 1) == 0 ? p.a : 0);
    x = product(factor, x, n, n, k);
  }
  if (rows > columns) x = turned(x, n, k);
  const double tolerance = precision == Precision::bf16 ? 0.05 : 1e-5;
  double of_gradient = 0, of_update = 0, size = 0;
  for (int64_t i = 0; i < rows * columns; ++i) {
    const double scale = scaled ? of_rows[i / columns] / double(of_columns[i % columns]) : 1, expected = scale * x[i];
    near("direction", i, direction[i], expected, tolerance * scale);
    of_gradient += gradient[i] * expected;
    of_update += u[i] * expected;
    size += std::abs(gradient[i]) * scale + std::abs(u[i]) * scale;
  }
  near("slope", 0, slopes[0], of_gradient, tolerance * size);
  near("slope", 1, slopes[1], of_update, tolerance * size);
}

void check_transpose(int64_t rows, int64_t columns) {
  begin("transpose rows %ld columns %ld", long(rows), long(columns));
  const std::vector<float> from = normals(rows * (columns + 3), 5);
  std::vector<float> to(columns * (rows + 2), kNaN);
  kernels().transpose_block(from.data(), columns + 3, rows, columns, to.data(), rows + 2);
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) equal("to", j * (rows + 2) + i, to[j * (rows + 2) + i], from[i * (columns + 3) + j]);
    for (int64_t i = rows; i < rows + 2; ++i) {
      if (to[j * (rows + 2) + i] == to[j * (rows + 2) + i]) equal("written beyond the block", j, 1, 0);
    }
  }
}

}  // namespace

int main() {
  const OddPolynomial first{2.5f, -2.0f, 0.7f}, second{2.0f, -3.0f, 2.0f};
  for (Precision precision : precisions()) {
    for (bool scaled : {false, true}) {
      check_direction(1, 1, scaled, {first}, precision);
      check_direction(7, 33, scaled, {first, second}, precision);
      check_direction(33, 7, scaled, {second, first}, precision);
      check_direction(61, 61, scaled, {second, second}, precision);
    }
    check_direction(150, 150, true, {first, second}, precision);  // tasks on the diagonal, below it, cut off
    check_direction(9, 270, false, {second}, precision);          // beyond a block of the reduction
    check_direction(5, 5, false, {}, precision);
  }
  for (int64_t rows : {1, 4, 17, 33}) {
    for (int64_t columns : {0, 1, 8, 19, 32}) check_transpose(rows, columns);
  }
  // Nothing stays nothing.
  begin("muon of zeros");
  const std::vector<float> zeros(6);
  const OddPolynomial polynomials[] = {first};
  std::vector<float> v(6, kNaN), direction(6, kNaN), slopes(2, kNaN);
  muon_direction(
      {zeros.data(), zeros.data(), nullptr, nullptr, 2, 3, 0.9f, 1, polynomials}, Precision::float32, {v.data(), direction.data(), slopes.data()});
  for (int i = 0; i < 6; ++i) equal("direction", i, direction[i], 0);
  for (int i = 0; i < 2; ++i) equal("slope", i, slopes[i], 0);
  return result();
}
