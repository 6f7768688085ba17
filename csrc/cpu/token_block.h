// How rows are divided into tasks. The rows of all layers for a block of tokens go together, so that the model's own logits are computed once per
// token.
#pragma once

#include <algorithm>
#include <cstdint>

namespace metalens::cpu {

// Rows of a task: every weight of U that is unpacked serves all of them.
constexpr int64_t kRowBlock = 256;

struct TokenBlock {
  int64_t first;
  int64_t tokens;
};

class TokenBlocks {
 public:
  TokenBlocks(int64_t layers, int64_t tokens) : tokens_(tokens), step_(std::clamp<int64_t>(kRowBlock / std::max<int64_t>(layers, 1), 1, tokens)) {
  }

  int64_t size() const {
    return (tokens_ + step_ - 1) / step_;
  }

  TokenBlock operator[](int64_t i) const {
    return {i * step_, std::min(step_, tokens_ - i * step_)};
  }

 private:
  int64_t tokens_, step_;
};

}  // namespace metalens::cpu
