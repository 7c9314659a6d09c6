// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "state/control_record.h"

namespace mrv1 {

// Collects the changes of the next step and writes them out as one control record. Its arrays keep
// their capacity, so that a steady step allocates nothing.
class ControlWriter {
 public:
  void reserve(int32_t max_rows);

  void free_row(FreeRow command) { freed_.push_back(command); }
  void new_row(const NewRow& command) { new_rows_.push_back(command); }
  void write_tokens(int32_t row, int32_t start, std::span<const int32_t> tokens);
  void write_blocks(int32_t group, int32_t row, int32_t start, std::span<const int32_t> blocks);
  void write_words(int32_t* target, std::span<const int32_t> words);
  void zero_words(int32_t* target, int32_t count);

  bool empty() const;
  // Bytes of the record that write() would make with this many entries.
  size_t record_bytes(size_t num_entries) const;
  // Writes the record and forgets the changes.
  void write(ControlHeader* record, uint64_t step, uint64_t adopt_through,
             std::span<const BatchEntry> entries, int32_t padded_requests, int32_t padded_tokens,
             int32_t padded_logits);
  void clear();

 private:
  std::vector<FreeRow> freed_;
  std::vector<NewRow> new_rows_;
  std::vector<TokenWrite> token_writes_;
  std::vector<BlockWrite> block_writes_;
  std::vector<WordWrite> word_writes_;
  std::vector<int32_t> payload_;
};

}  // namespace mrv1
