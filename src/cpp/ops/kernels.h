// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/elementwise.h"
#include "ops/embedding.h"
#include "ops/linear.h"
#include "ops/paged_attention.h"
#include "ops/qkv_prepare.h"
#include "ops/rms_norm.h"
#include "sampling/sample.h"
#include "state/infer_param_view.h"
#include "state/infer_params.h"
#include "state/output_ring.h"

namespace mrv1 {

// Sizes from which a backend says how much scratch its kernels need at most.
struct WorkspaceLimits {
  int64_t vocab_size, head_dim;
  int num_threads;
};

// The backend table: one entry an op and one a phase of the step. The program and the runner call
// through it and do not know which backend runs. This header is the only place that lists them.
struct Kernels {
  void (*embedding)(const EmbeddingParams&, const StepContext&);
  void (*rms_norm)(const RmsNormParams&, const StepContext&);
  void (*linear)(const LinearParams&, const StepContext&);
  void (*add)(const AddParams&, const StepContext&);
  void (*silu_mul)(const SiluMulParams&, const StepContext&);
  void (*gather_rows)(const GatherRowsParams&, const StepContext&);
  void (*qkv_prepare)(const QkvPrepareParams&, const StepContext&);
  void (*paged_attention)(const PagedAttentionParams&, const StepContext&);

  void (*apply)(const ControlHeader&, const RowState&, const StepContext&);
  void (*infer_params)(const ControlHeader&, const RowState&, const InferParams&,
                       const StepContext&);
  void (*infer_param_view)(const InferParamInputs&, const InferParamView&, const StepContext&);
  void (*sample)(const SampleParams&, const StepContext&);
  void (*advance)(const ControlHeader&, const RowState&, const InferParams&, OutputHeader*,
                  const StepContext&);

  // Bytes of StepContext::workspace that the largest of the kernels needs.
  int64_t (*workspace_bytes)(const WorkspaceLimits&);
  // Layout that `linear` reads, for the loader.
  WeightLayout linear_layout;
};

const Kernels& cpu_kernels();

}  // namespace mrv1
