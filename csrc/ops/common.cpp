#include "ops/common.h"

#include "mlx/ops.h"

namespace metalens {

mx::Stream cpu_stream(mx::StreamOrDevice s) {
  mx::Stream stream = std::holds_alternative<std::monostate>(s) ? mx::default_stream(mx::Device(mx::Device::cpu)) : mx::to_stream(s);
  if (stream.device != mx::Device::cpu) reject("this operation runs on the CPU. Pass stream=mx.cpu, or none.");
  return stream;
}

cpu::Precision precision_named(const std::string& name) {
  if (name == "float32") return cpu::Precision::float32;
  if (name == "bf16") return cpu::Precision::bf16;
  reject("precision must be 'float32' or 'bf16', not '", name, "'.");
}

mx::array contiguous(const mx::array& x, mx::Stream stream) {
  return x.is_available() && x.flags().row_contiguous ? x : mx::contiguous(x, false, stream);
}

mx::array as_rows(const mx::array& x, mx::Stream stream) {
  return contiguous(mx::astype(x, mx::float32, stream), stream);
}

mx::array checked_rows(const mx::array& x, const char* name, const mx::Shape& expected, mx::Stream stream) {
  if (!is_float(x.dtype())) reject(name, " must be float32, float16 or bfloat16, not ", x.dtype(), ".");
  if (x.shape() != expected) reject(name, " must be ", expected, ", not ", x.shape(), ".");
  return as_rows(x, stream);
}

}  // namespace metalens
