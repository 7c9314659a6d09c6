// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// The view is for engines that ask for it and is one short serial pass, which the backends share:
// a single thread runs it.
#include "launch.h"
#include "state/infer_param_view.h"

namespace mrv1 {
namespace {

__global__ void infer_param_view_kernel(InferParamInputs in, InferParamView out) {
  cuda::launch_next();
  cuda::wait_for_previous();
  fill_infer_param_view(in, out);
}

}  // namespace

void infer_param_view_cuda(const InferParamInputs& in, const InferParamView& out,
                           const StepContext& ctx) {
  check_internal(in.block_size > 0, "infer_param_view", "block_size is ", in.block_size,
                 "; it must be positive");
  cuda::launch("infer_param_view", ctx, infer_param_view_kernel, 1, 1, 0, in, out);
}

}  // namespace mrv1
