// The kernel table of one instruction set. One source serves every instruction set: isa/<name>.cpp defines the macros below, includes this header,
// and is compiled with flags of its own. The .cpp defines
//   METALENS_ISA     the unit's namespace and the instruction set's name
//   METALENS_VECTOR  floats per vector register
//   METALENS_ROWS    rows of the register tile
// and may define
//   METALENS_BF16     the address of a Multiplier with 16-bit operands, from a header that it includes first
//   METALENS_FLOAT32  a Multiplier in place of that of multiply.h
//
// Everything in isa/*.h lies in metalens::cpu::METALENS_ISA, a namespace of this unit alone. So no two units share a symbol, and the linker can never
// pick a function with wide instructions for a narrower machine.
#pragma once

#include "cpu/isa/forward.h"
#include "cpu/isa/matvec.h"
#include "cpu/isa/multiply.h"
#include "cpu/isa/rows.h"
#include "cpu/isa/transpose.h"

#ifndef METALENS_FLOAT32
#define METALENS_FLOAT32 kFloat32
#endif
#ifndef METALENS_BF16
#define METALENS_BF16 nullptr
#endif
#define METALENS_TEXT_OF(name) #name
#define METALENS_NAME_OF(macro) METALENS_TEXT_OF(macro)

namespace metalens::cpu::METALENS_ISA {

constexpr Multiplier kFloat32{
    .panel_width = kWidth,
    .left_bytes = left_bytes,
    .panel_bytes = kReductionBlock * kWidth * int64_t(sizeof(float)),
    .pack_left = pack_left,
    .pack_rows = pack_rows,
    .pack_columns = pack_columns,
    .multiply = multiply,
};

extern const KernelTable table;
const KernelTable table{
    .name = METALENS_NAME_OF(METALENS_ISA),
    .float32 = METALENS_FLOAT32,
    .bf16 = METALENS_BF16,
    .load = load,
    .store = store,
    .transpose_block = transpose_block,
    .matvec_rows = matvec_rows,
    .matvec_columns = matvec_columns,
    .transform = transform,
    .softmax_add = softmax_add,
    .weighted_difference = weighted_difference,
    .compare_add = compare_add,
    .count_above = count_above,
    .log_probabilities = log_probabilities,
    .delta_transform = delta_transform,
    .delta_add = delta_add,
    .swiglu = swiglu,
    .add = add,
    .multiply_elements = multiply_elements,
    .gelu_tanh = gelu_tanh,
    .rotate = rotate,
    .normalize = normalize,
    .normalize_backward = normalize_backward,
};

}  // namespace metalens::cpu::METALENS_ISA
