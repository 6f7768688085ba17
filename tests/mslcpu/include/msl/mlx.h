// The part of MLX's preamble of a custom kernel that such kernels rely on; written anew.
#pragma once

using namespace metal;

typedef half float16_t;
typedef bfloat bfloat16_t;

struct complex64_t {
  float real, imag;
};

// The offset of the element with row-major index `elem` in an array of arbitrary strides.
template <typename IndexT = int64_t>
METAL_FUNC IndexT elem_to_loc(IndexT elem, const __constant int* shape, const __constant int64_t* strides, int ndim) {
  IndexT offset = 0;
  for (int i = ndim - 1; i >= 0; i--) {
    offset += (elem % shape[i]) * IndexT(strides[i]);
    elem /= shape[i];
  }
  return offset;
}
METAL_FUNC int64_t elem_to_loc(uint elem, const __constant int* shape, const __constant int64_t* strides, int ndim) {
  return elem_to_loc<int64_t>((int64_t)elem, shape, strides, ndim);
}
template <typename T, typename U>
METAL_FUNC T ceildiv(T n, U m) { return (n + m - 1) / m; }
