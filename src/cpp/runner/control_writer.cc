// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "runner/control_writer.h"

#include <cstring>

namespace mrv1 {
namespace {

constexpr size_t kAlignment = 16;

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

template <typename T>
uint32_t append(ControlHeader* record, std::span<const T> items) {
  const uint32_t offset = record->bytes;
  if (!items.empty()) {
    std::memcpy(reinterpret_cast<char*>(record) + offset, items.data(), items.size_bytes());
  }
  record->bytes = static_cast<uint32_t>(offset + aligned(items.size_bytes()));
  return offset;
}

template <typename T>
int32_t count(const std::vector<T>& items) {
  return static_cast<int32_t>(items.size());
}

}  // namespace

void ControlWriter::reserve(int32_t max_rows) {
  freed_.reserve(max_rows);
  new_rows_.reserve(max_rows);
  token_writes_.reserve(max_rows);
  block_writes_.reserve(max_rows);
  word_writes_.reserve(max_rows);
  payload_.reserve(static_cast<size_t>(max_rows) * 4);
}

void ControlWriter::write_tokens(int32_t row, int32_t start, std::span<const int32_t> tokens) {
  token_writes_.push_back({row, start, static_cast<int32_t>(tokens.size()), count(payload_)});
  payload_.insert(payload_.end(), tokens.begin(), tokens.end());
}

void ControlWriter::write_blocks(int32_t group, int32_t row, int32_t start,
                                 std::span<const int32_t> blocks) {
  block_writes_.push_back(
      {group, row, start, static_cast<int32_t>(blocks.size()), count(payload_)});
  payload_.insert(payload_.end(), blocks.begin(), blocks.end());
}

void ControlWriter::write_words(int32_t* target, std::span<const int32_t> words) {
  word_writes_.push_back({target, static_cast<int32_t>(words.size()), count(payload_)});
  payload_.insert(payload_.end(), words.begin(), words.end());
}

void ControlWriter::zero_words(int32_t* target, int32_t count) {
  word_writes_.push_back({target, count, -1});
}

bool ControlWriter::empty() const {
  return freed_.empty() && new_rows_.empty() && token_writes_.empty() && block_writes_.empty() &&
         word_writes_.empty();
}

size_t ControlWriter::record_bytes(size_t num_entries) const {
  return aligned(sizeof(ControlHeader)) + aligned(freed_.size() * sizeof(FreeRow)) +
         aligned(new_rows_.size() * sizeof(NewRow)) +
         aligned(token_writes_.size() * sizeof(TokenWrite)) +
         aligned(block_writes_.size() * sizeof(BlockWrite)) +
         aligned(word_writes_.size() * sizeof(WordWrite)) +
         aligned(num_entries * sizeof(BatchEntry)) + aligned(payload_.size() * sizeof(int32_t));
}

void ControlWriter::write(ControlHeader* record, uint64_t step, uint64_t adopt_through,
                          std::span<const BatchEntry> entries, int32_t padded_requests,
                          int32_t padded_tokens, int32_t padded_logits) {
  ControlHeader header{};
  header.step = step;
  header.adopt_through = adopt_through;
  header.num_freed = count(freed_);
  header.num_new_rows = count(new_rows_);
  header.num_token_writes = count(token_writes_);
  header.num_block_writes = count(block_writes_);
  header.num_word_writes = count(word_writes_);
  header.num_entries = static_cast<int32_t>(entries.size());
  header.padded_requests = padded_requests;
  header.padded_tokens = padded_tokens;
  header.padded_logits = padded_logits;
  header.bytes = static_cast<uint32_t>(aligned(sizeof(ControlHeader)));
  *record = header;
  record->freed_offset = append<FreeRow>(record, freed_);
  record->new_rows_offset = append<NewRow>(record, new_rows_);
  record->token_writes_offset = append<TokenWrite>(record, token_writes_);
  record->block_writes_offset = append<BlockWrite>(record, block_writes_);
  record->word_writes_offset = append<WordWrite>(record, word_writes_);
  record->entries_offset = append<BatchEntry>(record, entries);
  record->payload_offset = append<int32_t>(record, payload_);
  clear();
}

void ControlWriter::clear() {
  freed_.clear();
  new_rows_.clear();
  token_writes_.clear();
  block_writes_.clear();
  word_writes_.clear();
  payload_.clear();
}

}  // namespace mrv1
