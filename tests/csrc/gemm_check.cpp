// Compares gemm with products in double precision, for every format of a frozen matrix, both orientations, and row counts on both sides of
// kMatvecRows. Compares gram too.
#include "check.h"
#include "cpu/gemm.h"
#include "cpu/gram.h"

using namespace check;

namespace {

// a W^T with W [outputs, inputs], or a W.
void check_product(int64_t rows, int64_t outputs, int64_t inputs, Storage storage, bool transpose, Precision precision) {
  begin(
      "gemm rows %ld outputs %ld inputs %ld format %d bits %d group %d element %d transpose %d precision %d", long(rows), long(outputs), long(inputs),
      int(storage.format), storage.bits, storage.group, int(storage.element), int(transpose), int(precision));
  const Frozen weight(outputs, inputs, storage);
  const int64_t k = transpose ? inputs : outputs, n = transpose ? outputs : inputs;
  const std::vector<float> a = normals(rows * k, 1);
  std::vector<float> c(rows * n, kNaN);
  gemm(a.data(), rows, n, k, weight.matrix(), transpose, precision, c.data());
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < k; ++i) {
        sum += a[m * k + i] * (transpose ? weight.at(j, i) : weight.at(i, j));
        size += std::abs(a[m * k + i]) * (transpose ? weight.size_at(j, i) : weight.size_at(i, j));
      }
      near("c", m * n + j, c[m * n + j], sum, unit(precision) * size);
    }
  }
}

void check_both_ways(int64_t rows, int64_t outputs, int64_t inputs, Storage storage) {
  for (Precision precision : precisions()) {
    for (bool transpose : {false, true}) check_product(rows, outputs, inputs, storage, transpose, precision);
  }
}

// The lower triangles of x x^T and their mirror images, for matrices [n, k] of one element type.
void check_gram(int64_t count, int64_t n, int64_t k, Element element, Precision precision) {
  begin("gram count %ld n %ld k %ld element %d precision %d", long(count), long(n), long(k), int(element), int(precision));
  const Storage storage{Format::dense, 0, 0, element};
  const Frozen x(count * n, k, storage);
  std::vector<char> c(count * n * n * element_size(element), char(0xff));
  gram(x.matrix().values, element, count, n, k, precision, c.data());
  std::vector<float> wide(count * n * n);
  kernels().load(element, c.data(), wide.data(), count * n * n);
  const double rounding = element == Element::f32 ? 0 : element == Element::f16 ? 1.0 / 2048 : 1.0 / 256;
  for (int64_t matrix = 0; matrix < count; ++matrix) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        double sum = 0, size = 0;
        for (int64_t d = 0; d < k; ++d) {
          const double term = x.at(matrix * n + i, d) * x.at(matrix * n + j, d);
          sum += term;
          size += std::abs(term);
        }
        const float *row = wide.data() + (matrix * n + i) * n, *column = wide.data() + (matrix * n + j) * n;
        const double tolerance = element == Element::bf16 ? unit(Precision::float32) * size : unit(precision) * size;
        near("c", i * n + j, row[j], sum, tolerance + rounding * std::abs(sum) + 4e-8);
        equal("mirror image", j * n + i, column[i], row[j]);
      }
    }
  }
}

}  // namespace

int main() {
  std::vector<Storage> storages{
      kDense, {Format::mxfp4, 4, 32, Element::f32}, {Format::mxfp8, 8, 32, Element::f32}, {Format::nvfp4, 4, 16, Element::f32}};
  for (int bits : {2, 3, 4, 5, 6, 8}) storages.push_back({Format::affine, bits, bits == 5 ? 128 : bits == 6 ? 64 : 32, Element::f32});
  storages.push_back({Format::affine, 4, 64, Element::f16});
  storages.push_back({Format::affine, 8, 32, Element::bf16});
  storages.push_back({Format::dense, 0, 0, Element::f16});
  storages.push_back({Format::dense, 0, 0, Element::bf16});

  // Every number of rows that a tile or the matrix-vector path treats in its own way; outputs and inputs within a panel, and beyond one block.
  for (const Storage& storage : storages) {
    for (int64_t rows : {1, 2, 3, 4, 5, 13}) check_both_ways(rows, 33, 128, storage);
    for (int64_t rows : {3, 26}) check_both_ways(rows, 67, 384, storage);
    check_both_ways(7, 261, 128, storage);
    check_both_ways(1, 1, 128, storage);
  }
  // Rows in several groups, and the reduction of a matrix-vector product in several parts.
  check_both_ways(130, 9, 64, {Format::affine, 4, 32, Element::f32});
  check_both_ways(2, 700, 64, {Format::affine, 4, 32, Element::f32});
  for (int64_t odd : {1, 7, 261}) {
    check_both_ways(3, odd, odd, kDense);
    check_both_ways(9, odd, odd, kDense);
  }
  for (Precision precision : precisions()) {
    for (Element element : {Element::f32, Element::f16, Element::bf16}) {
      for (int64_t n : {1, 2, 33, 193}) check_gram(2, n, 7, element, precision);
      check_gram(1, 35, 261, element, precision);
      check_gram(3, 5, 0, element, precision);
    }
    check_gram(1, 389, 13, Element::f32, precision);  // every kind of task: on the diagonal, below it, cut off
  }
  // An empty sum, and an empty result.
  std::vector<float> c(6, kNaN);
  const Frozen weight(3, 1, kDense);
  const Matrix empty{3, 0, Element::f32, Format::dense, 0, 0, nullptr, nullptr, nullptr};
  begin("gemm of an empty sum");
  gemm(nullptr, 2, 3, 0, empty, true, Precision::float32, c.data());
  for (int i = 0; i < 6; ++i) equal("c", i, c[i], 0);
  gemm(nullptr, 0, 3, 1, weight.matrix(), true, Precision::float32, nullptr);
  return result();
}
