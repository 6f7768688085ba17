#include "ops/forward.h"

#include "mlx/transforms.h"

namespace metalens {

ForwardPrimitive::Function ForwardPrimitive::of_some(const std::vector<mx::array>& primals, const std::vector<int>& argnums) const {
  return [plain = plain_, primals, argnums](const std::vector<mx::array>& some) {
    auto inputs = primals;
    for (size_t i = 0; i < argnums.size(); ++i) inputs[argnums[i]] = some[i];
    return plain(inputs);
  };
}

std::vector<mx::array> ForwardPrimitive::vjp(
    const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents, const std::vector<int>& argnums, const std::vector<mx::array>&) {
  std::vector<mx::array> at;
  for (int argnum : argnums) at.push_back(primals[argnum]);
  return mx::vjp(of_some(primals, argnums), at, cotangents).second;
}

std::vector<mx::array> ForwardPrimitive::jvp(
    const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents, const std::vector<int>& argnums) {
  std::vector<mx::array> at;
  for (int argnum : argnums) at.push_back(primals[argnum]);
  return mx::jvp(of_some(primals, argnums), at, tangents).second;
}

std::pair<std::vector<mx::array>, std::vector<int>> ForwardPrimitive::vmap(const std::vector<mx::array>& inputs, const std::vector<int>& axes) {
  auto outputs = mx::vmap(plain_, axes)(inputs);
  return {outputs, std::vector<int>(outputs.size(), 0)};
}

}  // namespace metalens
