// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// The kernel of FA3 for head_dim 128.
#include "flashinfer_sm90.cuh"

namespace mrv1::cuda {

template void launch_flash_prefill_sm90<128>(const FlashArgs& args);

}  // namespace mrv1::cuda
