// Included last. Defines Metal's keywords by OpenCL's, and removes OpenCL's keywords, which kernels may use as names.
#pragma once

#define device __global
#define threadgroup __local
#define thread __private
#define constant const __constant
#define kernel

#define local msl_name_local
#define global msl_name_global
#define generic msl_name_generic
#define pipe msl_name_pipe
#define read_only msl_name_read_only
#define write_only msl_name_write_only
#define read_write msl_name_read_write
#define vec_step msl_name_vec_step

#define atomic_int msl_atomic_int
#define atomic_uint msl_atomic_uint
#define atomic_float msl_atomic_float
#define atomic_bool msl_atomic_bool
#define atomic_ulong msl_atomic_ulong

// msl_convert also converts between half and bfloat, which clang's own casts do not.
#define static_cast msl_convert
