// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace mrv1 {

// Device memory for the words of rows (SamplingRow::words), handed out in ranges. It grows by whole
// chunks and keeps them. Only addresses are handled here, no memory is touched.
class WordPool {
 public:
  // `new_chunk` returns the address of that many words of device memory, or throws. It is called
  // for the first chunk here.
  WordPool(int64_t chunk_words, std::function<int32_t*(int64_t)> new_chunk);

  // A range of `count` words, aligned to 16 bytes. Throws what new_chunk throws, and is then as it
  // was.
  int32_t* allocate(int64_t count);
  void release(int32_t* first, int64_t count);
  // Words of all chunks, and those that are handed out.
  int64_t capacity() const { return capacity_; }
  int64_t used() const { return used_; }

 private:
  struct Chunk {
    int32_t* first;
    int64_t words;
    std::vector<std::pair<int64_t, int64_t>> free;  // offset, count; sorted, never touching
  };
  void add_chunk(int64_t words);
  static int64_t rounded(int64_t count) { return (count + 3) / 4 * 4; }

  const int64_t chunk_words_;
  const std::function<int32_t*(int64_t)> new_chunk_;
  std::vector<Chunk> chunks_;
  int64_t capacity_ = 0, used_ = 0;
};

}  // namespace mrv1
