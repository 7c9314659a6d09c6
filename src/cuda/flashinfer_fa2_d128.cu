// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// The kernels of FA2 for head_dim 128.
#include "flashinfer_fa2.cuh"

namespace mrv1::cuda {

template void launch_flash_prefill<128>(const FlashArgs& args, int32_t tile);
template void launch_flash_decode<128>(const FlashArgs& args);

}  // namespace mrv1::cuda
