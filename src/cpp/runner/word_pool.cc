// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "runner/word_pool.h"

#include <algorithm>
#include <functional>

#include "core/error.h"

namespace mrv1 {

WordPool::WordPool(int64_t chunk_words, std::function<int32_t*(int64_t)> new_chunk)
    : chunk_words_(rounded(chunk_words)), new_chunk_(std::move(new_chunk)) {
  add_chunk(chunk_words_);
}

void WordPool::add_chunk(int64_t words) {
  chunks_.reserve(chunks_.size() + 1);
  Chunk chunk{nullptr, words, {{0, words}}};
  chunk.first = new_chunk_(words);
  chunks_.push_back(std::move(chunk));
  capacity_ += words;
}

int32_t* WordPool::allocate(int64_t count) {
  const int64_t needed = rounded(count);
  for (Chunk& chunk : chunks_) {
    for (auto range = chunk.free.begin(); range != chunk.free.end(); ++range) {
      if (range->second < needed) continue;
      int32_t* first = chunk.first + range->first;
      range->first += needed;
      range->second -= needed;
      if (range->second == 0) chunk.free.erase(range);
      used_ += needed;
      return first;
    }
  }
  add_chunk(std::max(needed, chunk_words_));
  return allocate(count);
}

void WordPool::release(int32_t* first, int64_t count) {
  if (count == 0) return;
  const std::less<const int32_t*> before;
  const auto chunk = std::find_if(chunks_.begin(), chunks_.end(), [&](const Chunk& candidate) {
    return !before(first, candidate.first) && before(first, candidate.first + candidate.words);
  });
  check_internal(chunk != chunks_.end(), "word pool",
                 "a range was released that is not the pool's");
  const std::pair<int64_t, int64_t> range{first - chunk->first, rounded(count)};
  auto& free = chunk->free;
  auto place = free.insert(std::lower_bound(free.begin(), free.end(), range), range);
  const auto merge = [&](auto left) {
    const auto right = left + 1;
    if (right == free.end() || left->first + left->second != right->first) return;
    left->second += right->second;
    free.erase(right);
  };
  merge(place);
  if (place != free.begin()) merge(place - 1);
  used_ -= range.second;
}

}  // namespace mrv1
