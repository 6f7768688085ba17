// Products with a frozen matrix, tile by tile: what gemm, lens_stats, lens_target and lens_kl are built of.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "cpu/buffer.h"
#include "cpu/kernels.h"

namespace metalens::cpu {

// How exact the operands of a product are; sums are float32 in either.
enum class Precision : int {
  float32,  // as given
  bf16,     // rounded to bfloat16 where the CPU multiplies that faster, as given elsewhere
};

const Multiplier& multiplier(Precision precision);

// The rows [rows, depth] on the left of a product, packed once for every panel that they meet.
class Left {
 public:
  Left(const Multiplier& multiplier, int64_t rows, int64_t depth);

  // Pack a [rows, depth], row stride lda.
  void pack(const float* a, int64_t lda);

  int64_t rows() const {
    return rows_;
  }
  int64_t depth() const {
    return depth_;
  }
  // The rows' part in the reduction's block that begins at `start`.
  void* block(int64_t start) const {
    return data_.data() + start / kReductionBlock * block_bytes_;
  }

 private:
  const Multiplier* multiplier_;
  int64_t rows_, depth_, block_bytes_;
  Buffer<std::byte> data_;
};

// c[:, 0:width] = left W^T or left W, added to c if `accumulate`; ldc is c's row stride.
struct Product {
  const Left& left;
  float* c;
  int64_t ldc;
  bool accumulate;
};

// Products of one depth with the same panel: the output columns [column, column + width), at most a panel's, of left W^T (transpose) or left W. The
// reduction starts at row `first` of W when not transposed, else at its first column. `panel` is scratch of multiplier.panel_bytes.
void multiply_panel(
    const Multiplier& multiplier,
    std::span<const Product> products,
    const Matrix& w,
    bool transpose,
    int64_t column,
    int64_t width,
    int64_t first,
    void* panel);

// The unembedding of a model, frozen: logits softcap(scale * (U n + bias)) for the first `vocab` rows of U; rows beyond are padding, never predicted.
struct Head {
  Matrix u;
  const float* bias;  // [vocab], or null
  float scale;
  float softcap;  // 0: none
  int64_t vocab;
};

// Vocabulary ids whose logits are worked on at a time. At most one block of the reduction, since U's rows are the reduction of the way back.
constexpr int64_t kVocabularyBlock = kReductionBlock;

// Rows of a task: every weight of U that is unpacked serves all of them.
constexpr int64_t kRowBlock = 256;

// The two products of a softmax over the rows of a matrix, one block of them at a time: rows times `keys`^T gives logits, weights times `values`
// gives sums. For a head both matrices are U; for attention they are what their names say.
class BlockProduct {
 public:
  BlockProduct(const Matrix& keys, const Matrix& values, Precision precision);

  // x [rows, D], row stride D = keys.cols; must stay as it is for few rows, which are not packed. The last `exact` rows are multiplied as if they
  // were float32 also where operands are 16 bits wide: in two parts.
  void set_rows(const float* x, int64_t rows, int64_t exact = 0);

  // z[r, j] = row r . keys[first + j], for j < width <= kVocabularyBlock; row stride kVocabularyBlock.
  void forward(int64_t first, int64_t width, float* z);

  // The same for one row and one key, to the last bit what forward() gives.
  float forward_one(const float* row, int64_t key) const;

  // sums[r, :] += z[r, 0:width] values[first : first + width], for `rows` rows; row stride values.cols.
  void backward(const float* z, int64_t rows, int64_t first, int64_t width, float* sums);

 private:
  const Matrix& keys_;
  const Matrix& values_;
  const Multiplier& multiplier_;
  const float* x_ = nullptr;
  int64_t rows_ = 0;
  Left left_, rest_, weights_;
  Buffer<std::byte> panel_;
};

// Ids [first, last).
struct VocabularyRange {
  int64_t first;
  int64_t last;
};

// Share number `share` out of `shares`, in whole blocks.
VocabularyRange vocabulary_share(int64_t vocab, int64_t share, int64_t shares);

// Into how many shares the vocabulary is split so that `tasks` row blocks keep all threads busy.
int64_t vocabulary_shares(int64_t vocab, int64_t tasks);

}  // namespace metalens::cpu
