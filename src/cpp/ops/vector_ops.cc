// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/vector_ops.h"

#include "ops/cpu_isa.h"

namespace mrv1 {

const VectorOps& vector_ops() {
#if defined(__x86_64__)
  switch (current_cpu_isa()) {
    case CpuIsa::kAvx512Bf16:
      return avx512bf16::kVectorOps;
    case CpuIsa::kAmxBf16:
    case CpuIsa::kAvx512:
      return avx512::kVectorOps;
    case CpuIsa::kAvx2:
      return avx2::kVectorOps;
    case CpuIsa::kPortable:
      break;
  }
#endif
  return portable::kVectorOps;
}

const TypedVectorOps& vector_ops(DType dtype, std::string_view op) {
  return *dispatch_activation(dtype, op, [&](auto) {
    return dtype == DType::kF32 ? &vector_ops().f32 : &vector_ops().bf16;
  });
}

}  // namespace mrv1
