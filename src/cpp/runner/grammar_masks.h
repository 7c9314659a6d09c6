// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

#include "core/device.h"

namespace mrv1 {

// The masks of rows with a grammar: a bit for each id of the vocabulary, bit i % 32 of word i / 32,
// 1 = may be drawn. They lie in mapped host memory, [rows, words], where the sampler reads them; it
// is there from the first row with a grammar on. The host writes a row's mask only while no step
// that draws for it is on the device.
class GrammarMasks {
 public:
  GrammarMasks(int32_t num_rows, int32_t vocab_size)
      : num_rows_(num_rows), words_((vocab_size + 31) / 32) {}

  // Words of a mask.
  int32_t words() const { return words_; }
  int32_t num_rows() const { return num_rows_; }
  // Makes the memory be there; kOutOfMemory.
  void allocate(Device& device);
  size_t bytes() const { return memory_.bytes(); }
  // Address of a row's mask for the device; null before allocate().
  const uint32_t* device_mask(int32_t row) const {
    if (memory_.data() == nullptr) return nullptr;
    return static_cast<const uint32_t*>(memory_.data()) + int64_t{row} * words_;
  }
  std::span<uint32_t> mask(int32_t row) { return {all() + int64_t{row} * words_, mask_size()}; }
  void allow_all(int32_t row);
  // The masks of all rows, one after the other; null before allocate().
  uint32_t* all() { return static_cast<uint32_t*>(memory_.host()); }

 private:
  size_t mask_size() const { return static_cast<size_t>(words_); }

  int32_t num_rows_, words_;
  Buffer memory_;
};

}  // namespace mrv1
