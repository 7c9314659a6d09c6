// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/sampling_rows.h"

namespace mrv1 {

void sampling_rows_cpu(const SamplingRowsParams& params, const StepContext&) {
  for (int64_t l = 0; l < params.num_rows; ++l) write_sampling_row(params, l);
}

}  // namespace mrv1
