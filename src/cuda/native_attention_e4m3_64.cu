// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "native_attention.cuh"

namespace mrv1::cuda {

void native_attention_e4m3_64(const NativeAttentionArgs& args, const AttentionLaunch& launch,
                              const StepContext& ctx) {
  if (launch.dim == 64) return launch_native_attention<E4M3Cache, 64>(args, launch, ctx);
  launch_native_attention<E4M3Cache, 80>(args, launch, ctx);
}

}  // namespace mrv1::cuda
