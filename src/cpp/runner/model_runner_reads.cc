// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// What callers may read of the newest step, beside its result.
#include "core/error.h"
#include "runner/model_runner.h"

namespace mrv1 {

void ModelRunner::wait_newest() const {
  check(newest_batch_step_ != 0, "runner", "no step has been executed");
  check_no_cut("runner");
  device_->synchronize();
}

std::vector<int32_t> ModelRunner::read_ints(const int32_t* data, int64_t count) {
  std::vector<int32_t> values(static_cast<size_t>(count));
  if (count > 0) device_->copy_out(values.data(), data, values.size() * sizeof(int32_t));
  return values;
}

int32_t ModelRunner::batch_of(int32_t item, const char* where) {
  wait_newest();
  check(item >= 0 && item < newest_entries_, where, "item ", item, " is outside [0, ",
        newest_entries_, ")");
  return read_ints(ctx_.infer.entry_batch + item, 1)[0];
}

const float* ModelRunner::device_logits(int32_t item) {
  const int32_t row = read_ints(ctx_.infer.logits_start + batch_of(item, "logits"), 1)[0];
  if (row < 0 || read_ints(ctx_.infer.logits_batch + row, 1)[0] < 0) return nullptr;
  const auto* base = static_cast<const float*>(executable_->value(program_.logits_value()));
  return base + row * int64_t{ctx_.rows.vocab_size};
}

ModelRunner::HiddenStates ModelRunner::hidden_states(int32_t item) {
  const char* where = "hidden_states";
  check(config_.keep_hidden_states, where, "the runner was made without keep_hidden_states");
  const int32_t batch = batch_of(item, where);
  const Value& value = program_.values()[program_.hidden_value()];
  HiddenStates states{nullptr, 0, value.cols, value.dtype};
  if (read_ints(ctx_.infer.row + batch, 1)[0] < 0) return states;
  const std::vector<int32_t> start = read_ints(ctx_.infer.query_start_loc + batch, 2);
  states.tokens = start[1] - start[0];
  states.data = static_cast<const char*>(executable_->value(program_.hidden_value())) +
                start[0] * value.cols * static_cast<int64_t>(dtype_size(value.dtype));
  return states;
}

std::vector<float> ModelRunner::logits(int32_t item) {
  const float* row = device_logits(item);
  if (row == nullptr) return {};
  std::vector<float> values(ctx_.rows.vocab_size);
  device_->copy_out(values.data(), row, values.size() * sizeof(float));
  return values;
}

std::vector<std::pair<std::string, std::vector<int32_t>>> ModelRunner::infer_params() {
  wait_newest();
  const InferParams& infer = ctx_.infer;
  const StepSizes& sizes = newest_sizes_;
  std::vector<std::pair<std::string, std::vector<int32_t>>> all;
  const auto add = [&](const char* name, const int32_t* data, int64_t count) {
    all.emplace_back(name, read_ints(data, count));
  };
  add("counts", reinterpret_cast<const int32_t*>(infer.counts), sizeof(InferCounts) / 4);
  add("row", infer.row, sizes.num_requests);
  add("query_start_loc", infer.query_start_loc, sizes.num_requests + 1);
  add("seq_lens", infer.seq_lens, sizes.num_requests);
  add("token_batch", infer.token_batch, sizes.num_tokens);
  add("token_ids", infer.token_ids, sizes.num_tokens);
  add("positions", infer.positions, sizes.num_tokens);
  add("slot_mapping", infer.slot_mapping, sizes.num_tokens);
  for (int32_t group = 1; group < ctx_.rows.num_groups; ++group) {
    all.emplace_back(
        concat("slot_mapping.", group),
        read_ints(infer.slot_mapping + int64_t{group} * infer.max_tokens, sizes.num_tokens));
  }
  add("logits_indices", infer.logits_indices, sizes.num_logits);
  add("logits_batch", infer.logits_batch, sizes.num_logits);
  add("logits_place", infer.logits_place, sizes.num_logits);
  add("logits_entry", infer.logits_entry, sizes.num_logits);
  add("logits_start", infer.logits_start, sizes.num_requests);
  add("entry_batch", infer.entry_batch, newest_entries_);
  add("sampled", infer.sampled, sizes.num_logits);
  for (int half = 0; half < (newest_cut_ > 0 ? 2 : 0); ++half) {
    const InferParams& part = halves_->infer(half);
    const auto add_part = [&](const char* name, const int32_t* data, int64_t count) {
      all.emplace_back(concat(name, ".half", half), read_ints(data, count));
    };
    add_part("counts", reinterpret_cast<const int32_t*>(part.counts), sizeof(InferCounts) / 4);
    add_part("row", part.row, sizes.num_requests);
    add_part("query_start_loc", part.query_start_loc, sizes.num_requests + 1);
    add_part("seq_lens", part.seq_lens, sizes.num_requests);
  }
  if (view_) {
    const int64_t rows = config_.max_num_seqs;
    const InferParamView& view = *view_;
    add("encoder_batch_map", view.encoder_batch_map, rows);
    add("decoder_batch_map", view.decoder_batch_map, rows);
    add("encoder_batch_idx", view.encoder_batch_idx, rows);
    add("decoder_batch_idx", view.decoder_batch_idx, rows);
    add("encoder_seq_lod", view.encoder_seq_lod, rows + 1);
    add("decoder_seq_lod", view.decoder_seq_lod, rows + 1);
    add("encoder_kv_lod", view.encoder_kv_lod, rows + 1);
    add("prefix_len", view.prefix_len, rows);
    add("decoder_context_len", view.decoder_context_len, rows);
    add("decoder_context_len_cache", view.decoder_context_len_cache, rows);
    add("prefix_block_tables", view.prefix_block_tables, rows * ctx_.rows.max_blocks);
    add("slot_mapping_enc", view.slot_mapping_enc, config_.max_num_batched_tokens);
    add("slot_mapping_dec", view.slot_mapping_dec, rows * view_inputs_.query_per_decode);
    add("len_info", view.len_info, 7);
  }
  return all;
}

Row ModelRunner::row_state(int32_t row) {
  check(row >= 0 && row < config_.max_num_seqs, "row_state", "row ", row, " is outside [0, ",
        config_.max_num_seqs, ")");
  device_->synchronize();
  Row state;
  device_->copy_out(&state, ctx_.rows.rows + row, sizeof(state));
  return state;
}

}  // namespace mrv1
