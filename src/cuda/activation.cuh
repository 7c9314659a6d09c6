// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Elementwise functions that several kernels have in common: one text, so that a fused form equals
// its parts bit for bit.
#pragma once

#include "ops/activation.h"

namespace mrv1::cuda {

// activation(gate) * up; the activation is not kNone.
__device__ __forceinline__ float gated_mul(Activation activation, float gate, float up) {
  float z = gate;
  if (activation == Activation::kGeluTanh) {
    z = kGeluScale * fmaf(kGeluCubic, gate * gate * gate, gate);
  }
  return gate / (1.0f + expf(-z)) * up;
}

// cap * tanh(x * scale), scale being 1 / cap times what x is scaled by.
__device__ __forceinline__ float soft_cap(float x, float scale, float cap) {
  return cap * tanhf(x * scale);
}

}  // namespace mrv1::cuda
