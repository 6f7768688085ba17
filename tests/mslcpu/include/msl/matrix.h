// <metal_simdgroup_matrix>: 8x8 matrices distributed over the simdgroup. Each lane holds two neighboring elements of a row, laid out as on Apple GPUs.
#pragma once

MSL_INLINE uint msl_matrix_row() { uint lane = msl_lane(); return (lane / 4 & 4) + lane / 2 % 4; }
MSL_INLINE uint msl_matrix_column() { uint lane = msl_lane(); return (lane / 4 & 2) * 2 + lane % 2 * 2; }

namespace metal {

template <class T, int Columns, int Rows = Columns>
struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "simdgroup matrices are 8x8");
  static_assert(is_floating_point_v<T>, "simdgroup matrices hold half, bfloat or float");
  typedef vec<T, 2> storage_type;
  storage_type msl_elements;
  simdgroup_matrix() {}
  explicit simdgroup_matrix(T diagonal) {
    uint row = msl_matrix_row(), column = msl_matrix_column();
    msl_elements[0] = row == column ? diagonal : (T)0;
    msl_elements[1] = row == column + 1 ? diagonal : (T)0;
  }
  __private storage_type& thread_elements() __private { return msl_elements; }
  const __private storage_type& thread_elements() const __private { return msl_elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Columns, int Rows = Columns>
MSL_INLINE simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> m;
  m.msl_elements[0] = m.msl_elements[1] = value;
  return m;
}
template <class T, int Columns, int Rows = Columns>
MSL_INLINE simdgroup_matrix<T, Columns, Rows> make_diagonal_simdgroup_matrix(T value) {
  return simdgroup_matrix<T, Columns, Rows>(value);
}

// Each lane moves its own two elements, with one access if they are neighbors in memory. `stride` is in elements; `origin` is (column, row).
template <class T> struct msl_neighbors { typedef vec<T, 2> type __attribute__((aligned(sizeof(T)))); };
#define MSL_MATRIX_ACCESS(SPACE)                                                                                              \
  template <class T> MSL_INLINE void simdgroup_load(                                                                          \
      __private simdgroup_matrix<T, 8, 8>& m, const SPACE T* p, ulong stride = 8, ulong2 origin = (ulong2)(0ul),              \
      bool transpose = false) {                                                                                               \
    msl_matrix_access();                                                                                                      \
    uint row = msl_matrix_row(), column = msl_matrix_column();                                                                \
    p += origin.x + origin.y * stride;                                                                                        \
    if (transpose) {                                                                                                          \
      m.msl_elements[0] = p[column * stride + row];                                                                           \
      m.msl_elements[1] = p[(column + 1) * stride + row];                                                                     \
    } else {                                                                                                                  \
      m.msl_elements = *(const SPACE typename msl_neighbors<T>::type*)(p + row * stride + column);                            \
    }                                                                                                                         \
  }                                                                                                                           \
  template <class T> MSL_INLINE void simdgroup_store(                                                                         \
      simdgroup_matrix<T, 8, 8> m, SPACE T* p, ulong stride = 8, ulong2 origin = (ulong2)(0ul), bool transpose = false) {     \
    msl_matrix_access();                                                                                                      \
    uint row = msl_matrix_row(), column = msl_matrix_column();                                                                \
    p += origin.x + origin.y * stride;                                                                                        \
    if (transpose) {                                                                                                          \
      p[column * stride + row] = m.msl_elements[0];                                                                           \
      p[(column + 1) * stride + row] = m.msl_elements[1];                                                                     \
    } else {                                                                                                                  \
      *(SPACE typename msl_neighbors<T>::type*)(p + row * stride + column) = m.msl_elements;                                  \
    }                                                                                                                         \
  }
MSL_MATRIX_ACCESS(__global)
MSL_MATRIX_ACCESS(__local)

template <class D, class A, class B, class C>
MSL_INLINE void simdgroup_multiply_accumulate(
    __private simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c, MSL_LINE) {
  float2 fa = {(float)a.msl_elements[0], (float)a.msl_elements[1]};
  float2 fb = {(float)b.msl_elements[0], (float)b.msl_elements[1]};
  float2 fc = {(float)c.msl_elements[0], (float)c.msl_elements[1]};
  float2 product;
  msl_matrix_multiply((__private float*)&fa, (__private float*)&fb, (__private float*)&fc, (__private float*)&product, msl_line);
  d.msl_elements[0] = (D)product[0];
  d.msl_elements[1] = (D)product[1];
}
template <class D, class A, class B>
MSL_INLINE void simdgroup_multiply(
    __private simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b, MSL_LINE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>((D)0), msl_line);
}

}  // namespace metal
