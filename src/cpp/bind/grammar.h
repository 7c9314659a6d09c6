// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <span>
#include <vector>

#include "engine/mask_source.h"

namespace mrv1 {

// A request's grammar as Python holds it: a matcher for each sample, and what works on many of them
// at a time. They have the methods of llguidance's LLMatcher and LLExecutor.
class PythonGrammar final : public Grammar {
 public:
  PythonGrammar(nanobind::object executor, std::vector<nanobind::object> matchers)
      : executor_(std::move(executor)), matchers_(std::move(matchers)) {}

  const nanobind::object& executor() const { return executor_; }
  const nanobind::object& matcher(int32_t sample) const { return matchers_[sample]; }
  size_t num_samples() const { return matchers_.size(); }

 private:
  nanobind::object executor_;
  std::vector<nanobind::object> matchers_;
};

// Takes the GIL, but runs no Python of its own: no interrupt and no finalizer comes in between. The
// executor lets go of the GIL while it works.
class PythonMaskSource final : public MaskSource {
 public:
  void fill(std::span<MaskRequest> requests, uint32_t* masks, int32_t num_rows,
            int32_t words) override;
};

void bind_grammar(nanobind::module_& m);

}  // namespace mrv1
