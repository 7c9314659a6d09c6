// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ops/kernels.h"
#include "ops/paged_attention.h"
#include "state/step_context.h"

namespace mrv1 {

class Device;  // core/device.h

// Which kernels take which rows of a step. Batch order puts decode rows first, so a class of rows
// is a range of batch positions that the device reads from InferParams::counts.
enum class AttentionRows : int32_t {
  kAll,      // every batch position
  kDecode,   // positions below counts->num_decodes
  kPrefill,  // the others: extend and prefill rows
};

// How paged_attention_cuda and plan_attention_cuda divide a step between backends. It follows from
// the geometry and the context alone, so the plan and every layer of a step agree.
struct AttentionRoute {
  bool native = true;  // the native kernels take `native_rows`
  AttentionRows native_rows = AttentionRows::kAll;
  bool flashinfer_decode = false;   // FlashInfer takes AttentionRows::kDecode
  bool flashinfer_prefill = false;  // FlashInfer takes AttentionRows::kPrefill
};
AttentionRoute attention_route(const AttentionPlan& plan, const StepContext& ctx);

// The kernel for every cache that the native one does not read (plain_attention.cu): all rows, zero
// rows too, without a plan.
void plain_attention(const PagedAttentionParams& params, const StepContext& ctx);

// FlashInfer. Defined by flashinfer_*.cu, or by no_flashinfer.cc in a build without it, where
// nothing is supported, plans are 0 bytes long, and the others fail. A backend that takes a class
// of rows writes their output rows and no others; zero rows of padding and masked tokens are
// written by the native kernel where it runs, else by one that the dispatch launches.

// Whether FlashInfer can take the step's extend and prefill rows. Asked only where the launch is
// not part of a captured graph (ctx.eager_attention) and the step need not be batch invariant; may
// look at ctx.sizes, ctx.rows and whatever host side lengths the context has. Cheap: asked per
// layer.
//
// It reads bfloat16. Of an FP8 cache, what the rows see is dequantised layer by layer into the
// step's workspace: of as many key/value heads at a time as fit. Where not even one does, or where
// few tokens read many keys, the rows are left to the native kernel, which reads FP8 itself.
bool flashinfer_prefill_supports(const AttentionPlan& plan, const StepContext& ctx);
int64_t flashinfer_workspace_bytes(const WorkspaceLimits& limits);
void flashinfer_prefill(const PagedAttentionParams& params, const StepContext& ctx);

// Whether FlashInfer can take the step's decode rows. Asked only if ctx.attention_backend says so
// and the step need not be batch invariant.
bool flashinfer_decode_supports(const AttentionPlan& plan, const StepContext& ctx);
void flashinfer_decode(const PagedAttentionParams& params, const StepContext& ctx);

// Its part of AttentionPlan::data, zeros at first: how long, where, and the launches that fill it,
// called once per step and geometry if the step's route has FlashInfer take anything.
int64_t flashinfer_plan_bytes(const AttentionPlan& plan, Device& device);
void* flashinfer_plan_data(const AttentionPlan& plan);  // defined by attention_plan.cu
void flashinfer_plan(const AttentionPlan& plan, const StepContext& ctx);

}  // namespace mrv1
