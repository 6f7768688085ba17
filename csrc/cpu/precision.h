// How exact the operands of a product are.
#pragma once

namespace metalens::cpu {

// The operands; sums are float32 with either.
enum class Precision : int {
  float32,  // as given
  bf16,     // rounded to bfloat16 if the CPU multiplies that faster, else as given
};

}  // namespace metalens::cpu
