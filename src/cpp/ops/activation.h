// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace mrv1 {

// What the gate of a gated product goes through. Both are v / (1 + exp(-z)).
enum class Activation : int32_t {
  kNone,  // there is no gate
  kSilu,  // z = v
  // GELU by its tanh approximation (Hendrycks & Gimelshein 2016), v / 2 (1 + tanh(z / 2)):
  // z = sqrt(8 / pi) (v + 0.044715 v^3).
  kGeluTanh,
};

constexpr float kGeluScale = 1.5957691216057308f;  // sqrt(8 / pi)
constexpr float kGeluCubic = 0.044715f;

}  // namespace mrv1
