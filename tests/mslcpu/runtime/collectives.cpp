// The functions that kernels call: barriers, simdgroup collectives, the matrix product, atomics, threadgroup variables.
#include <cstring>

#include "state.h"

#define MSLCPU_PC __builtin_return_address(0)

namespace mslcpu {

namespace {

void wait_in_collective(uint32_t kind, uint32_t line, const void* pc) {
  Fiber* self = runtime.current;
  Simdgroup& simdgroup = runtime.simdgroups[self->context.simdgroup];
  if (simdgroup.arrived == 0) {
    simdgroup.uniform = true;
  } else if (simdgroup.uniform) {
    // All lanes that wait so far are in the same collective, so one represents them.
    for (uint32_t i = 0; i < simdgroup.lanes; i++) {
      const Fiber& other = runtime.fibers[simdgroup.first + i];
      if (other.state != State::kCollective) continue;
      simdgroup.uniform = other.kind == kind && other.line == line;
      break;
    }
  }
  simdgroup.arrived++;
  self->kind = kind;
  self->line = line;
  self->pc = pc;
  self->state = State::kCollective;
  yield_fiber();
}

}  // namespace

void multiply(Simdgroup& s) {
  runtime.launch->matrix_ops++;
  for (uint32_t row = 0; row < 8; row++) {
    float sum[8];
    memcpy(sum, s.c + 8 * row, sizeof sum);
    for (uint32_t k = 0; k < 8; k++) {
      float factor = s.a[8 * row + k];
      for (uint32_t column = 0; column < 8; column++) sum[column] += factor * s.b[8 * k + column];
    }
    memcpy(s.d + 8 * row, sum, sizeof sum);
  }
}

// A tensor operation counts as the products of 8 x 8 matrices that it consists of.
void multiply_tensors(Simdgroup& s) {
  runtime.launch->matrix_ops += static_cast<uint64_t>(s.m) * s.n * s.k / 512;
  s.product = s.tensors[2];
  for (uint32_t row = 0; row < s.m; row++) {
    float* sums = &s.product[row * s.n];
    for (uint32_t k = 0; k < s.k; k++) {
      float factor = s.tensors[0][row * s.k + k];
      for (uint32_t column = 0; column < s.n; column++) sums[column] += factor * s.tensors[1][k * s.n + column];
    }
  }
}

}  // namespace mslcpu

using namespace mslcpu;

#pragma GCC visibility push(default)

extern "C" {

void msl_threadgroup_barrier(uint32_t line, uint32_t mem_flags) {
  Fiber* self = runtime.current;
  self->line = line;
  self->pc = MSLCPU_PC;
  self->mem_flags = mem_flags;
  self->state = State::kBarrier;
  yield_fiber();
  if (runtime.attention) attend();
}

void msl_simdgroup_barrier(uint32_t line, uint32_t mem_flags) {
  wait_in_collective(kSimdgroupBarrier, line, MSLCPU_PC);
  if (mem_flags & kMemThreadgroup) runtime.current->threadgroup_low += kStampSimdEpoch;
  if (mem_flags & kMemDevice) runtime.current->device_low += kStampSimdEpoch;
}

// Deposit `bytes` of operand, wait for the simdgroup's other active lanes and return their mask. Lane i's operand is then at
// *base + i * *stride.
uint32_t msl_simd_exchange(const void* operand, uint32_t bytes, uint32_t kind, uint32_t line, const uint8_t** base, uint64_t* stride) {
  Fiber* self = runtime.current;
  Simdgroup& simdgroup = runtime.simdgroups[self->context.simdgroup];
  uint32_t slot = simdgroup.round & 1;
  memcpy(self->deposit[slot], operand, bytes);
  wait_in_collective(kind, line, MSLCPU_PC);
  *base = runtime.fibers[simdgroup.first].deposit[slot];
  *stride = sizeof(Fiber);
  return self->mask;
}

const ThreadContext* msl_context(void) {
  return &runtime.current->context;
}

uint32_t msl_lane(void) {
  return runtime.current->context.lane;
}

// d = a * b + c for 8x8 matrices; each lane passes two neighboring elements. When the last lane arrives, the scheduler computes the product, once for
// the simdgroup.
void msl_matrix_multiply(const float* a, const float* b, const float* c, float* d, uint32_t line) {
  Fiber* self = runtime.current;
  Simdgroup& simdgroup = runtime.simdgroups[self->context.simdgroup];
  uint32_t lane = self->context.lane;
  uint32_t row = (lane / 4 & 4) + lane / 2 % 4, column = (lane / 4 & 2) * 2 + lane % 2 * 2;
  uint32_t at = row * 8 + column;
  memcpy(simdgroup.a + at, a, 8);
  memcpy(simdgroup.b + at, b, 8);
  memcpy(simdgroup.c + at, c, 8);
  wait_in_collective(kMatrixMultiply, line, MSLCPU_PC);
  memcpy(d, simdgroup.d + at, 8);
}

// Give an element of an operand of the simdgroup's next tensor operation: 0 left, 1 right, 2 what it adds to.
void msl_tensor_put(uint32_t operand, uint32_t at, float value) {
  std::vector<float>& tensor = runtime.simdgroups[runtime.current->context.simdgroup].tensors[operand];
  if (at >= tensor.size()) tensor.resize(at + 1);
  tensor[at] = value;
}

// When the last lane arrives, the scheduler computes the product [m, n] = [m, k] [k, n] + [m, n]. Its elements stay until all lanes arrive again.
void msl_tensor_multiply(uint32_t m, uint32_t n, uint32_t k, uint32_t line) {
  Simdgroup& simdgroup = runtime.simdgroups[runtime.current->context.simdgroup];
  simdgroup.m = m, simdgroup.n = n, simdgroup.k = k;
  wait_in_collective(kTensorMultiply, line, MSLCPU_PC);
}

float msl_tensor_get(uint32_t at) {
  return runtime.simdgroups[runtime.current->context.simdgroup].product[at];
}

uint32_t msl_tensor_layout(void) {
  return runtime.launch->tensor_layout;
}

// simdgroup_load and simdgroup_store are plain accesses by each lane, so they need no rendezvous. Their count reveals lanes that skipped some.
void msl_matrix_access(void) {
  Fiber* self = runtime.current;
  self->matrix_accesses++;
  self->matrix_pc = MSLCPU_PC;
}

// Metal allows four units in the last place for most functions. The move is a function of the result, so that equal results stay equal.
// A result of 1 stays, because exp(0) is 1 on every GPU, and a kernel that merges sums multiplies by it many times.
float msl_approximated(float result) {
  constexpr int32_t largest_move = 4;
  if (!runtime.launch->inexact || !__builtin_isnormal(result) || result == 1.0f) return result;
  int32_t bits;
  memcpy(&bits, &result, 4);
  uint64_t mixed = (static_cast<uint32_t>(bits) + runtime.launch->seed) * 0x9E3779B97F4A7C15ull;
  bits += static_cast<int32_t>((mixed >> 33) % (2 * largest_move + 1)) - largest_move;
  float moved;
  memcpy(&moved, &bits, 4);
  return __builtin_isnormal(moved) ? moved : result;
}

void msl_atomic_access(uint8_t* address, uint64_t bytes) {
  Launch& launch = *runtime.launch;
  launch.atomics++;
  if (!launch.checked) return;
  if (reinterpret_cast<uint64_t>(address) % bytes) MSLCPU_FAIL(MSLCPU_PC, "misaligned atomic access");
  check_access(address, bytes, true, true, MSLCPU_PC);
}

void* msl_threadgroup_variable(int64_t id, uint64_t bytes, const char* name) {
  return declare_threadgroup_variable(id, bytes, name, MSLCPU_PC);
}

// Not in every libgcc. Rounds to nearest even.
__bf16 __truncsfbf2(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  uint16_t rounded = (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  __bf16 result;
  memcpy(&result, &rounded, 2);
  return result;
}

}  // extern "C"
