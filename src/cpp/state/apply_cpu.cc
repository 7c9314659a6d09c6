// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "core/clock.h"
#include "state/infer_params.h"
#include "state/output_ring.h"
#include "state/step_context.h"

namespace mrv1 {

void apply_cpu(const StepContext& ctx) {
  const ControlHeader& record = *ctx.rings.record();
  const RowState& state = ctx.rows;
  ctx.rings.output_slot()->begin_ns = clock_ns();
  const auto* payload = record_array<int32_t>(&record, record.payload_offset);

  const auto* freed = record_array<FreeRow>(&record, record.freed_offset);
  for (int32_t i = 0; i < record.num_freed; ++i) {
    Row& row = state.rows[freed[i].row];
    if (row.generation != freed[i].generation) continue;
    row.phase = RowPhase::kFree;
    for (int32_t group = 0; group < state.num_groups; ++group) {
      const int64_t start = (int64_t{group} * state.num_rows + freed[i].row) * state.max_blocks;
      std::memset(state.block_table + start, 0, sizeof(int32_t) * state.max_blocks);
    }
  }

  const auto* added = record_array<NewRow>(&record, record.new_rows_offset);
  for (int32_t i = 0; i < record.num_new_rows; ++i) {
    state.rows[added[i].row] = added[i].state;
    state.sampling[added[i].row] = added[i].sampling;
  }

  const auto* tokens = record_array<TokenWrite>(&record, record.token_writes_offset);
  for (int32_t i = 0; i < record.num_token_writes; ++i) {
    const TokenWrite& write = tokens[i];
    std::memcpy(state.tokens + int64_t{write.row} * state.max_model_len + write.start,
                payload + write.payload_start, sizeof(int32_t) * write.count);
  }

  const auto* blocks = record_array<BlockWrite>(&record, record.block_writes_offset);
  for (int32_t i = 0; i < record.num_block_writes; ++i) {
    const BlockWrite& write = blocks[i];
    const int64_t row = int64_t{write.group} * state.num_rows + write.row;
    std::memcpy(state.block_table + row * state.max_blocks + write.start,
                payload + write.payload_start, sizeof(int32_t) * write.count);
  }

  const auto* words = record_array<WordWrite>(&record, record.word_writes_offset);
  for (int32_t i = 0; i < record.num_word_writes; ++i) {
    const WordWrite& write = words[i];
    const size_t bytes = sizeof(int32_t) * write.count;
    if (write.payload_start < 0) {
      std::memset(write.target, 0, bytes);
    } else {
      std::memcpy(write.target, payload + write.payload_start, bytes);
    }
  }
}

}  // namespace mrv1
