// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Linked in place of flashinfer_*.cu in a CUDA build without FlashInfer's headers.
#include "attention_backends.h"
#include "core/error.h"

namespace mrv1 {
namespace {

[[noreturn]] void refuse() {
  fail(ErrorKind::kInternal, "paged_attention", "this build is without FlashInfer");
}

}  // namespace

bool flashinfer_prefill_supports(const AttentionPlan&, const StepContext&) { return false; }
bool flashinfer_decode_supports(const AttentionPlan&, const StepContext&) { return false; }
int64_t flashinfer_workspace_bytes(const WorkspaceLimits&) { return 0; }
int64_t flashinfer_plan_bytes(const AttentionPlan&, Device&) { return 0; }
void flashinfer_plan(const AttentionPlan&, const StepContext&) { refuse(); }
void flashinfer_prefill(const PagedAttentionParams&, const StepContext&) { refuse(); }
void flashinfer_decode(const PagedAttentionParams&, const StepContext&) { refuse(); }

}  // namespace mrv1
