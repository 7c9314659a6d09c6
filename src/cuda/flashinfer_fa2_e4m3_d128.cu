// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// The decode kernel of FA2 over an E4M3 cache, for head_dim 128.
#include "flashinfer_fa2.cuh"

namespace mrv1::cuda {

template void launch_flash_decode_e4m3<128>(const FlashArgs& args);

}  // namespace mrv1::cuda
