// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/portable.h"
#include "sampling/processors.h"
#include "state/row_state.h"
#include "state/step_context.h"

namespace mrv1 {

// A parameter of sampling: a value for each row, or one for all of them.
template <typename T>
struct RowParam {
  const T* values = nullptr;  // [num_rows], or null
  T value{};                  // if there are none

  MRV1_HD T at(int64_t row) const { return values != nullptr ? values[row] : value; }
};

// The rows that sample() reads, from plain arrays: for callers of single ops, whose logits row l is
// batch position l and row l of a table that lives for one call.
struct SamplingRowsParams {
  int64_t num_rows, vocab_size;
  Row* rows;              // [num_rows], written whole
  SamplingRow* sampling;  // [num_rows], written whole
  int32_t* index;         // [num_rows], becomes 0, 1, 2 ...
  RowParam<float> temperature, top_p, min_p;
  RowParam<int32_t> top_k;
  RowParam<uint64_t> seed;
  RowParam<int32_t> position;  // of the token to be drawn
};

MRV1_HD void write_sampling_row(const SamplingRowsParams& params, int64_t l) {
  Row row = {};
  row.phase = RowPhase::kDecode;
  row.total_len = params.position.at(l);
  SamplingRow sampling = {};
  sampling.temperature = params.temperature.at(l);
  sampling.top_p = params.top_p.at(l);
  sampling.min_p = params.min_p.at(l);
  sampling.top_k = TopK::effective(params.top_k.at(l), params.vocab_size);
  sampling.seed = params.seed.at(l);
  params.rows[l] = row;
  params.sampling[l] = sampling;
  params.index[l] = static_cast<int32_t>(l);
}

void sampling_rows_cpu(const SamplingRowsParams& params, const StepContext& ctx);
void sampling_rows_cuda(const SamplingRowsParams& params, const StepContext& ctx);

}  // namespace mrv1
