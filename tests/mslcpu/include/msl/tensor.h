// <metal_tensor> and MetalPerformancePrimitives: the product of two tensors in device or threadgroup memory by one simdgroup, whose result is a
// cooperative tensor. Just that much: tensors of two dimensions made in the kernel (tensor_inline), and matmul2d over execution_simdgroup.
//
// Apple defines which elements a lane holds nowhere. The default layout scatters them and leaves some of a lane's places empty; another can be chosen
// (options.py), so that tests show which code relies on one. Places are NaN until they are written.
#pragma once

namespace metal {

enum : size_t { dynamic_extent = ~(size_t)0 };

// The number of columns, then the number of rows.
template <class Index, size_t Columns, size_t Rows>
struct extents {
  Index sizes[2];
  extents() {
    static_assert(Columns != dynamic_extent && Rows != dynamic_extent, "sizes that are known only at run time must be given");
    sizes[0] = Columns;
    sizes[1] = Rows;
  }
  extents(Index columns, Index rows) {
    sizes[0] = Columns == dynamic_extent ? columns : (Index)Columns;
    sizes[1] = Rows == dynamic_extent ? rows : (Index)Rows;
  }
  Index extent(int i) const { return sizes[i]; }
};
template <class Index, int Rank> struct msl_dynamic { static_assert(Rank == 2, "mslcpu has tensors of two dimensions only"); };
template <class Index> struct msl_dynamic<Index, 2> { typedef extents<Index, dynamic_extent, dynamic_extent> type; };
template <class Index, int Rank> using dextents = typename msl_dynamic<Index, Rank>::type;

struct tensor_inline {};

template <class T, class Extents, class Kind>
struct tensor {
  static_assert(is_same_v<Kind, tensor_inline>, "mslcpu has only tensors that are made in the kernel (tensor_inline)");
  T* msl_data;
  Extents msl_extents;
  int msl_strides[2];
  tensor(T* data, Extents sizes) : msl_data(data), msl_extents(sizes) {
    msl_strides[0] = 1;
    msl_strides[1] = (int)sizes.extent(0);
  }
  tensor(T* data, Extents sizes, array<int, 2> strides) : msl_data(data), msl_extents(sizes) {
    msl_strides[0] = strides[0];
    msl_strides[1] = strides[1];
  }
  // Elements beyond the extents are zeros to an operation.
  float msl_element(uint column, uint row) const {
    if ((int)column >= (int)msl_extents.extent(0) || (int)row >= (int)msl_extents.extent(1)) return 0.0f;
    return (float)msl_data[(long)column * msl_strides[0] + (long)row * msl_strides[1]];
  }
};

template <int Count> struct execution_simdgroups {
  static_assert(Count == 1, "mslcpu has operations of a single simdgroup only");
};
typedef execution_simdgroups<1> execution_simdgroup;

}  // namespace metal

namespace msl_mpp {  // mpp, once a kernel includes MetalPerformancePrimitives
namespace tensor_ops {

// Stands for a class whose objects are arguments of templates, which clang's OpenCL does not have: a function of its name returns its fields in bits.
struct matmul2d_descriptor {
  enum class mode { multiply, multiply_accumulate };
};
constexpr ulong matmul2d_descriptor(
    int m, int n, int k, bool transpose_left = false, bool transpose_right = false, bool relaxed_precision = false,
    enum matmul2d_descriptor::mode mode = matmul2d_descriptor::mode::multiply) {
  return (ulong)m | (ulong)n << 12 | (ulong)k << 24 | (ulong)transpose_left << 36 | (ulong)transpose_right << 37 |
         (ulong)relaxed_precision << 38 | (ulong)(mode == matmul2d_descriptor::mode::multiply_accumulate) << 39;
}

template <class T, int M, int N>
struct msl_destination {
  static_assert(M % 16 == 0 && N % 16 == 0 && M * N % 37 != 0, "mslcpu lays out multiples of 16 x 16");
  enum { held = M * N / 32, places = held + 2 };
  T msl_elements[places];
  msl_destination() {
    for (int i = 0; i < places; i++) msl_elements[i] = (T)__builtin_nanf("");
  }
  uint16_t get_capacity() const { return places; }
  // The two empty places of a lane: the last ones or, if permuted, different ones in each lane.
  int msl_first_gap() const { return msl_tensor_layout() ? held : (int)msl_lane() % (places - 1); }
  int msl_second_gap() const { return msl_tensor_layout() ? held + 1 : msl_first_gap() + 1 + ((int)msl_lane() / 5) % (places - 1 - msl_first_gap()); }
  bool is_valid_element(uint16_t i) const { return i != msl_first_gap() && i != msl_second_gap(); }
  // The number of the element among all, row by row. An empty place has that of another lane's element.
  uint msl_at(uint16_t i) const {
    uint lane = (msl_lane() + !is_valid_element(i)) % 32, number = (i - (i > msl_first_gap()) - (i > msl_second_gap())) % held;
    if (msl_tensor_layout() == 0) return ((number * 32 + lane) * 37 + 11) % (M * N);
    uint block = number / 8, row = (lane / 4 & 4) + lane / 2 % 4 + number / 4 % 2 * 8, column = ((lane / 4 & 2) + lane % 2) * 4 + number % 4;
    return (block / (N / 16) * 16 + row) * N + block % (N / 16) * 16 + column;
  }
  metal::array<int, 2> get_multidimensional_index(uint16_t i) const {
    metal::array<int, 2> index;
    index[0] = (int)(msl_at(i) % N);
    index[1] = (int)(msl_at(i) / N);
    return index;
  }
  T& operator[](uint16_t i) { return msl_elements[i]; }
};

template <ulong Descriptor, class Scope>
struct matmul2d {
  static_assert(metal::is_same_v<Scope, metal::execution_simdgroup>, "mslcpu has operations of a single simdgroup only");
  enum { M = Descriptor & 4095, N = Descriptor >> 12 & 4095, K = Descriptor >> 24 & 4095 };
  enum { left_transposed = Descriptor >> 36 & 1, right_transposed = Descriptor >> 37 & 1, relaxed = Descriptor >> 38 & 1, adds = Descriptor >> 39 & 1 };

  template <class Left, class Right, class T>
  msl_destination<T, M, N> get_destination_cooperative_tensor() const {
    static_assert(metal::is_same_v<T, float>, "mslcpu has sums of float only");
    return msl_destination<T, M, N>();
  }

  // A lane reads some elements of each operand. Which, the real operation does not say either.
  template <class Left, class Right>
  void run(__private Left& left, __private Right& right, __private msl_destination<float, M, N>& to, MSL_LINE) const {
    static_assert(!relaxed, "mslcpu does not know what relaxed precision rounds");
    uint first = (msl_lane() * 5 + 3) % 32;
    for (uint e = first; e < M * K; e += 32) msl_tensor_put(0, e, left_transposed ? left.msl_element(e / K, e % K) : left.msl_element(e % K, e / K));
    for (uint e = first; e < K * N; e += 32) msl_tensor_put(1, e, right_transposed ? right.msl_element(e / N, e % N) : right.msl_element(e % N, e / N));
    for (uint16_t i = 0; i < to.get_capacity(); i++) {
      if (to.is_valid_element(i)) msl_tensor_put(2, to.msl_at(i), adds ? to[i] : 0.0f);
    }
    msl_tensor_multiply(M, N, K, msl_line);
    for (uint16_t i = 0; i < to.get_capacity(); i++) {
      if (to.is_valid_element(i)) to[i] = msl_tensor_get(to.msl_at(i));
    }
  }
};

}  // namespace tensor_ops
}  // namespace msl_mpp
