// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "state/infer_param_view.h"

namespace mrv1 {

void infer_param_view_cpu(const InferParamInputs& in, const InferParamView& out,
                          const StepContext&) {
  fill_infer_param_view(in, out);
}

}  // namespace mrv1
