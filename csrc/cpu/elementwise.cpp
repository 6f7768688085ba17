#include "cpu/elementwise.h"

namespace metalens::cpu {

void elementwise(Elementwise function, const StridedRows& a, const StridedRows& b, const Output& y) {
  const auto& table = kernels();
  for_pieces(a.count(), a.width(), [&](int64_t row, int64_t first, int64_t n) {
    float wide_a[kPiece], wide_b[kPiece], wide_y[kPiece];
    const float* left = a.read(row, first, n, wide_a);
    const float* right = function == Elementwise::gelu_tanh ? nullptr : b.read(row, first, n, wide_b);
    const int64_t offset = row * a.width() + first;
    float* out = y.at(offset, wide_y);
    switch (function) {
      case Elementwise::swiglu:
        table.swiglu(left, right, n, out);
        break;
      case Elementwise::gelu_tanh:
        table.gelu_tanh(left, n, out);
        break;
      case Elementwise::add:
        table.add(left, right, n, out);
        break;
      case Elementwise::multiply:
        table.multiply_elements(left, right, n, out);
        break;
    }
    y.finish(offset, n, out);
  });
}

}  // namespace metalens::cpu
