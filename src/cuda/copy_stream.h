// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <memory>

#include "core/side_stream.h"

namespace mrv1::cuda {

std::unique_ptr<CopyStream> make_copy_stream(int ordinal);

// `own` is the stream that a null stream stands for.
std::unique_ptr<Fence> make_fence(int ordinal, cudaStream_t own);

// A mark costs the host two calls; events are made here, so none is in a step.
std::unique_ptr<StreamMark> make_mark(int ordinal, cudaStream_t own);

void order_streams(int ordinal, cudaStream_t before, cudaStream_t after);

// Throws kInvalidArgument unless steps can run in a stream of somebody else: it must belong to the
// GPU and be no default stream, which graphs cannot be captured from.
void check_external_stream(int ordinal, cudaStream_t stream);

}  // namespace mrv1::cuda
