#include "cpu/split_vocab.h"

namespace metalens::cpu {

VocabularyRange vocabulary_split(int64_t vocab, int64_t split, int64_t splits) {
  const int64_t blocks = (vocab + kVocabularyBlock - 1) / kVocabularyBlock;
  return {blocks * split / splits * kVocabularyBlock, std::min(vocab, blocks * (split + 1) / splits * kVocabularyBlock)};
}

int64_t vocabulary_splits(int64_t vocab, int64_t tasks) {
  const int64_t blocks = (vocab + kVocabularyBlock - 1) / kVocabularyBlock;
  const int64_t wanted = 4 * num_threads();
  if (num_threads() == 1 || tasks >= wanted || tasks == 0) return 1;
  return std::clamp<int64_t>((wanted + tasks - 1) / tasks, 1, std::max<int64_t>(blocks, 1));
}

}  // namespace metalens::cpu
