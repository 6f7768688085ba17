// How rows are cut into tasks: the rows of all layers for some tokens go together, so that what the model says of a token is computed once for all.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/product.h"

namespace metalens::cpu {

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
