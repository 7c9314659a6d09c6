// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace mrv1 {

// What the outputs of a request must follow, with how far each of its samples has come. The engine
// keeps it until the last sample ends, and knows nothing else of it.
class Grammar {
 public:
  virtual ~Grammar() = default;
};

// A sample that draws with the next step.
struct MaskRequest {
  Grammar* grammar = nullptr;
  int32_t sample = 0;                 // of the request, below its n
  int32_t row = 0;                    // whose mask is wanted
  std::span<const int32_t> tokens{};  // its outputs since the last call; each is told once
  std::string error{};                // set by fill() if there is no mask: the sample ends with it
};

// Where masks come from.
class MaskSource {
 public:
  virtual ~MaskSource() = default;
  // Writes the mask of each request's row; `masks` is [num_rows, words], as in
  // runner/grammar_masks.h. One call a step, so that the source may work on all of them at a time.
  // What it throws ends all of the requests.
  virtual void fill(std::span<MaskRequest> requests, uint32_t* masks, int32_t num_rows,
                    int32_t words) = 0;
};

}  // namespace mrv1
