// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "runner/model_runner.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "core/device.h"
#include "core/error.h"
#include "runner/data_ranks.h"
#include "runner/rank_followers.h"
#include "sampling/math.h"

namespace mrv1 {
namespace {

constexpr int64_t kSlotAlignment = 256;
constexpr std::chrono::hours kLongestTimeout{24};

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

uint64_t nanoseconds_since(std::chrono::steady_clock::time_point start) {
  const auto elapsed = std::chrono::steady_clock::now() - start;
  return std::chrono::duration_cast<std::chrono::nanoseconds>(elapsed).count();
}

size_t control_slot_bytes(const RunnerConfig& config, size_t groups) {
  return round_up(RowTable::record_bytes(config, groups), kSlotAlignment);
}

// Logprobs that outputs hold: a stage that has no logits has none (RunnerConfig::max_logprobs).
int32_t reported_logprobs(const Program& program, const RunnerConfig& config) {
  return program.logits_value() >= 0 ? config.max_logprobs : -1;
}

size_t output_slot_bytes(const RunnerConfig& config, int32_t max_logprobs) {
  const int64_t records = int64_t{config.max_num_seqs} * (1 + config.num_speculative_tokens);
  return round_up(output_tokens_end(config.max_num_seqs, config.num_speculative_tokens) +
                      records * logprob_record_bytes(max_logprobs),
                  kSlotAlignment);
}

// Of the outputs that a stage is told by the last one.
int64_t adopted_bytes(const Program& program, const RunnerConfig& config) {
  if (program.logits_value() >= 0) return 0;
  return step_slots(config) * static_cast<int64_t>(output_slot_bytes(config, -1));
}

// Token histories of a row: its own, and the forced tokens.
int64_t history_rows(const RunnerConfig& config) { return config.force_tokens ? 2 : 1; }

// Sizes of the int32 arrays of InferParams, in the order allocate_state() makes them.
int64_t infer_ints(const RunnerConfig& config, int64_t groups) {
  const int64_t requests = config.max_num_seqs, tokens = config.max_num_batched_tokens;
  int64_t ints = requests * 5 + 1 + tokens * (3 + groups) + int64_t{max_logits_rows(config)} * 5 +
                 sizeof(InferCounts) / 4;
  if (config.infer_param_view) {
    ints += 3 * requests + (8 + config.num_speculative_tokens) * requests + 3 * (requests + 1) +
            requests * max_blocks_per_row(config) + tokens + 7;
  }
  return ints;
}

// Bytes of StepRings::staged: the header of a record and the entries of the largest batch.
int64_t staged_bytes(const RunnerConfig& config) {
  return round_up(sizeof(ControlHeader), kSlotAlignment) +
         round_up(int64_t{config.max_num_seqs} * sizeof(BatchEntry), kSlotAlignment);
}

// That the kernels of experts can count what the largest step has.
void check_expert_steps(const Program& program, const RunnerConfig& config) {
  const int64_t ranks = config.data_parallel ? config.num_ranks : 1;
  const auto at_most = [&](int64_t tokens, const auto&... reason) {
    check(config.max_num_batched_tokens <= tokens, "runner", "max_num_batched_tokens",
          config.data_parallel ? " or max_tokens_per_rank" : "", " must be in [1, ", tokens,
          "], not ", config.max_num_batched_tokens, ": ", reason...);
  };
  for (const Op& op : program.ops()) {
    if (op.kind == OpKind::kMoeExperts) {
      const int64_t top_k = program.values()[op.inputs[1]].cols;
      at_most(kMaxExpertPairs / (ranks * top_k), "tokens of ", ranks, " ranks with ", top_k,
              " experts each are at most ", kMaxExpertPairs, " pairs");
    } else if (op.kind == OpKind::kMoeCombine) {
      const Value& sums = program.values()[op.outputs[0]];
      const int64_t pieces = combined_pieces(sums.cols, sums.dtype);
      at_most(kMaxCombinedPieces / pieces, "sums of ", sums.cols, " ", dtype_name(sums.dtype),
              " columns are ", pieces, " pieces of 16 bytes, at most ", kMaxCombinedPieces,
              " in a step");
    }
  }
}

}  // namespace

PlanLimits ModelRunner::plan_limits(const RunnerConfig& config) {
  // No other cache is dequantised for prompts, nor this one where all rows take one kernel.
  const bool dequantises = config.kv_cache.dtype == DType::kE4M3 && !config.batch_invariant;
  const int64_t keys = int64_t{config.max_num_seqs} * config.max_model_len;
  const int32_t logits =
      config.max_logprobs < 0 ? max_logits_rows(config) : PromptScorer::max_rows(config);
  return {config.max_num_batched_tokens, logits, config.max_num_seqs, dequantises ? keys : 0,
          config.data_parallel ? config.num_ranks : 1};
}

Program ModelRunner::prepared(Program program, const RunnerConfig& config) {
  // Prompts are scored from them in several passes of the head.
  const bool is_read = config.keep_hidden_states || config.max_logprobs >= 0;
  if (is_read && program.hidden_value() >= 0) {
    program.output(program.hidden_value());
  }
  return program;
}

MemoryPlan ModelRunner::plan_memory(const Program& wired, const RunnerConfig& config,
                                    Device& device) {
  check_limits(wired, config);
  const Program program = prepared(wired, config);
  MemoryPlan plan;
  const std::vector<WeightView> weights = stored_weights(program, device.kernels());
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t bytes = weight_parts(weights[i]).bytes;
    plan.weights += bytes;
    if (program.is_expert_weight(static_cast<int32_t>(i))) plan.experts += bytes;
  }
  const PlanLimits limits = plan_limits(config);
  plan.activations =
      Executable::bytes(program, limits, device, config.max_model_len) +
      device.kernels().workspace_bytes(Executable::workspace_limits(program, limits, device));
  plan.two_batch = TwoBatch::bytes(program, config, limits, device);
  if (config.num_ranks > 1) {
    plan.activations +=
        group_bytes(device.type(), config.num_ranks, group_options(program, config));
  }
  const int64_t rows = config.max_num_seqs;
  const KvLayout layout = program.kv_layout();
  const auto groups = static_cast<int64_t>(layout.groups.size());
  const int64_t slot_bytes =
      static_cast<int64_t>(control_slot_bytes(config, groups) +
                           output_slot_bytes(config, reported_logprobs(program, config)));
  plan.state = rows * (sizeof(Row) + sizeof(SamplingRow)) +
               rows *
                   (history_rows(config) * int64_t{config.max_model_len} +
                    groups * max_blocks_per_row(config)) *
                   4 +
               config.sampling_words * 4 + infer_ints(config, groups) * 4 + staged_bytes(config) +
               sizeof(uint64_t) + step_slots(config) * slot_bytes + adopted_bytes(program, config);
  plan.state += KvStore::other_bytes(config.kv_cache, program);
  if (reported_logprobs(program, config) >= 0) {
    plan.state += PromptScorer::bytes(config, step_slots(config));
  }
  plan.per_block = KvStore::block_bytes(config.kv_cache, program, config.block_size);
  return plan;
}

void ModelRunner::check_limits(const Program& program, const RunnerConfig& config) {
  const auto positive = [](int64_t value, const char* name, int64_t limit) {
    check(value > 0 && value <= limit, "runner", name, " must be in [1, ", limit, "], not ", value);
  };
  positive(config.max_num_seqs, "max_num_seqs", 65535);
  positive(config.max_num_batched_tokens, "max_num_batched_tokens", 1 << 24);
  positive(config.max_model_len, "max_model_len", 1 << 24);
  positive(config.block_size, "block_size", 4096);
  check(config.sampling_words > 0, "runner", "sampling_words must be positive");
  check(config.max_logprobs >= -1 && config.max_logprobs <= kMaxSampledVocab, "runner",
        "max_logprobs must be in [-1, ", kMaxSampledVocab, "], not ", config.max_logprobs);
  check(config.max_num_batched_tokens >= config.max_num_seqs, "runner", "max_num_batched_tokens (",
        config.max_num_batched_tokens, ") must be at least max_num_seqs (", config.max_num_seqs,
        ")");
  check(config.pad_requests <= config.max_num_seqs &&
            config.pad_tokens <= config.max_num_batched_tokens,
        "runner", "padding exceeds the limits");
  for (const CaptureSize& size : config.capture_sizes) {
    check(size.requests >= 1 && size.requests <= config.max_num_seqs, "runner",
          "capture_sizes asks for ", size.requests,
          " requests; allowed are 1 to max_num_seqs = ", config.max_num_seqs);
    check(size.tokens_per_request >= 1 &&
              int64_t{size.requests} * size.tokens_per_request <= config.max_num_batched_tokens,
          "runner", "capture_sizes asks for ", size.requests, " requests of ",
          size.tokens_per_request,
          " tokens; together 1 to max_num_batched_tokens = ", config.max_num_batched_tokens,
          " tokens are allowed");
  }
  check(
      config.num_speculative_tokens >= 0 && config.num_speculative_tokens <= kMaxSpeculativeTokens,
      "runner", "num_speculative_tokens must be in [0, ", kMaxSpeculativeTokens, "], not ",
      config.num_speculative_tokens);
  check(config.ngram.min >= 1 && config.ngram.min <= config.ngram.max, "runner",
        "the n-grams that are looked up must have 1 or more tokens, not ", config.ngram.min, " to ",
        config.ngram.max);
  for (const int32_t tokens : config.piecewise_sizes) {
    check(tokens >= 1 && tokens <= config.max_num_batched_tokens, "runner",
          "piecewise_sizes asks for ", tokens,
          " tokens; allowed are 1 to max_num_batched_tokens = ", config.max_num_batched_tokens);
  }
  check(config.num_ranks >= 1 && config.num_ranks <= kMaxRanks, "runner",
        "num_ranks must be in [1, ", kMaxRanks, "], not ", config.num_ranks);
  check(config.rank_timeout.count() > 0 && config.rank_timeout <= kLongestTimeout, "runner",
        "rank_timeout must be 1 ms to 1 day, not ", config.rank_timeout.count(), " ms");
  check(config.num_stages >= 1 && config.num_ranks % config.num_stages == 0, "runner",
        "num_stages must be a divisor of num_ranks = ", config.num_ranks, ", not ",
        config.num_stages);
  check(!config.data_parallel || config.num_stages == 1, "runner",
        "ranks with requests of their own have no stages; num_stages is ", config.num_stages);
  const int32_t stage_ranks = tensor_ranks(config);
  for (const Op& op : program.ops()) {
    if (!op.row_parallel || !config.batch_invariant || stage_ranks == 1) continue;
    const WeightSpec& weight = program.weights()[op.weights[0]];
    const DType stored = weight.format == WeightFormat::kNvfp4 ? DType::kE2M1 : program.dtype();
    check(has_invariant_parts(weight.cols, stage_ranks, stored), "runner",
          "batch_invariant sums the columns of row-parallel weights in ", kInvariantParts,
          " parts of whole groups of ", part_unit(stored), ", which ", stage_ranks, " ranks with ",
          weight.cols, " columns each of '", weight.name, "' do not have");
  }
  check(program.logits_value() >= 0 || (config.num_stages > 1 && program.vocab_size() != 0),
        "runner", "the program has no logits");
  check(!program.kv_layers().empty(), "runner", "the program has no attention");
  check_kv_spec(config.kv_cache, program, "runner");
  check_expert_steps(program, config);
  positive(program.vocab_size(), "vocab_size", kMaxSampledVocab);
}

RunnerConfig ModelRunner::checked_config(const Program& program, RunnerConfig config,
                                         Device& device) {
  check_limits(program, config);
  check(config.num_blocks >= 2, "runner",
        "num_blocks must be at least 2 (block 0 is never used), not ", config.num_blocks);
  check(int64_t{config.num_blocks} * config.block_size < std::numeric_limits<int32_t>::max(),
        "runner", "num_blocks * block_size must fit 31 bits, is ", config.num_blocks, " * ",
        config.block_size);
  const MemoryPlan plan = plan_memory(program, config, device);
  const MemoryInfo memory = device.memory();
  const int64_t total = plan.total(config.num_blocks);
  if (total > static_cast<int64_t>(memory.free_bytes)) {
    const auto mb = [](int64_t bytes) { return bytes / 1000000; };
    fail(ErrorKind::kOutOfMemory, "runner", "needs ", mb(total), " MB but ", mb(memory.free_bytes),
         " MB are free on ", device.name(), ": weights ", mb(plan.weights), ", activations ",
         mb(plan.activations + plan.two_batch), ", state ", mb(plan.state), ", KV cache ",
         mb(plan.per_block * config.num_blocks), " (", config.num_blocks, " blocks of ",
         config.block_size, " tokens)");
  }
  return config;
}

ModelRunner::ModelRunner(std::shared_ptr<Device> device, Program program,
                         const RunnerConfig& config, std::unique_ptr<Communicator> communicator)
    : device_(std::move(device)),
      communicator_(std::move(communicator)),
      program_(prepared(std::move(program), config)),
      config_(checked_config(program_, config, *device_)),
      weights_(program_, *device_),
      kv_layout_(program_.kv_layout()),
      masks_(config_.max_num_seqs, program_.vocab_size()),
      memory_plan_(plan_memory(program_, config_, *device_)) {
  device_->linear_context();  // a missing library is reported here, not in a step
  kv_ = std::make_unique<KvStore>(*device_, config_.kv_cache, program_, config_.num_blocks,
                                  config_.block_size);
  executable_ =
      std::make_unique<Executable>(program_, plan_limits(config_), *device_, weights_.views(),
                                   kv_->layers(), config_.max_model_len);
  if (TwoBatch::applies(program_, config_)) {
    halves_ = std::make_unique<TwoBatch>(program_, *executable_, config_, plan_limits(config_),
                                         *device_, weights_.views(), kv_->layers());
  }
  ladder_ = GraphLadder(config_.graph_mode, config_.capture_sizes, config_.piecewise_sizes,
                        config_.num_speculative_tokens);
  allocate_state();
  allocate_rings();
  step_ = std::make_unique<Step>(program_, *executable_, *device_, ctx_);
  step_->set_halves(halves_.get());
  if (view_) step_->set_view(view_inputs_, *view_);
  if (reported_logprobs(program_, config_) >= 0) {
    scorer_ = std::make_unique<PromptScorer>(config_, num_slots(), *device_);
  }
}

ModelRunner::~ModelRunner() {
  followers_.reset();
  try {
    device_->synchronize();
  } catch (const Error&) {
    // A device that failed cannot be waited for; its memory goes with it.
  }
}

template <typename T>
T* ModelRunner::state_array(int64_t count, const char* name) {
  state_buffers_.push_back(device_->allocate(static_cast<size_t>(count) * sizeof(T), name));
  return static_cast<T*>(state_buffers_.back().data());
}

void ModelRunner::allocate_state() {
  const int64_t rows = config_.max_num_seqs, tokens = config_.max_num_batched_tokens;
  RowState& state = ctx_.rows;
  state.num_rows = config_.max_num_seqs;
  state.num_groups = static_cast<int32_t>(kv_layout_.groups.size());
  state.block_size = config_.block_size;
  state.max_blocks = max_blocks_per_row(config_);
  state.max_model_len = config_.max_model_len;
  state.vocab_size = program_.vocab_size();
  state.rows = state_array<Row>(rows, "rows");
  state.sampling = state_array<SamplingRow>(rows, "sampling rows");
  state.tokens =
      state_array<int32_t>(rows * history_rows(config_) * config_.max_model_len, "token history");
  state.forced_tokens =
      config_.force_tokens ? state.tokens + rows * config_.max_model_len : nullptr;
  state.max_drafts = config_.num_speculative_tokens;
  state.max_logprobs = reported_logprobs(program_, config_);
  state.ngram = config_.ngram;
  state.block_table =
      state_array<int32_t>(state.num_groups * rows * state.max_blocks, "block tables");

  InferParams& infer = ctx_.infer;
  infer.max_requests = config_.max_num_seqs;
  infer.max_tokens = config_.max_num_batched_tokens;
  infer.max_logits = max_logits_rows(config_);
  infer.counts = state_array<InferCounts>(1, "infer params");
  infer.row = state_array<int32_t>(rows, "infer params");
  infer.query_start_loc = state_array<int32_t>(rows + 1, "infer params");
  infer.seq_lens = state_array<int32_t>(rows, "infer params");
  infer.entry_batch = state_array<int32_t>(rows, "infer params");
  infer.logits_start = state_array<int32_t>(rows, "infer params");
  infer.token_batch = state_array<int32_t>(tokens, "infer params");
  infer.token_ids = state_array<int32_t>(tokens, "infer params");
  infer.positions = state_array<int32_t>(tokens, "infer params");
  infer.slot_mapping = state_array<int32_t>(state.num_groups * tokens, "infer params");
  for (int32_t** array : {&infer.logits_indices, &infer.logits_batch, &infer.logits_place,
                          &infer.logits_entry, &infer.sampled}) {
    *array = state_array<int32_t>(infer.max_logits, "infer params");
  }
  infer.row_lengths = nullptr;
  if (config_.infer_param_view) {
    infer.row_lengths = state_array<int32_t>(3 * rows, "infer params");
    view_inputs_ = {infer.row_lengths,
                    infer.row_lengths + rows,
                    infer.row_lengths + 2 * rows,
                    state.block_table,
                    config_.max_num_seqs,
                    state.max_blocks,
                    config_.block_size,
                    1 + config_.num_speculative_tokens};
    InferParamView view{};
    for (int32_t** array : {&view.encoder_batch_map, &view.decoder_batch_map,
                            &view.encoder_batch_idx, &view.decoder_batch_idx, &view.prefix_len,
                            &view.decoder_context_len, &view.decoder_context_len_cache}) {
      *array = state_array<int32_t>(rows, "infer param view");
    }
    view.slot_mapping_dec =
        state_array<int32_t>(rows * view_inputs_.query_per_decode, "infer param view");
    for (int32_t** array : {&view.encoder_seq_lod, &view.decoder_seq_lod, &view.encoder_kv_lod}) {
      *array = state_array<int32_t>(rows + 1, "infer param view");
    }
    view.prefix_block_tables = state_array<int32_t>(rows * state.max_blocks, "infer param view");
    view.slot_mapping_enc = state_array<int32_t>(tokens, "infer param view");
    view.len_info = state_array<int32_t>(7, "infer param view");
    view.max_tokens = config_.max_num_batched_tokens;
    view_ = view;
  }

  ctx_.device = device_.get();
  ctx_.pool = device_->pool();
  ctx_.stream = device_->stream();
  ctx_.communicator = communicator_.get();
  ctx_.attention_backend = config_.attention_backend;
  ctx_.batch_invariant = config_.batch_invariant;
  ctx_.sync_launches = config_.sync_launches;
  ctx_.workspace_bytes = static_cast<size_t>(device_->kernels().workspace_bytes(
      Executable::workspace_limits(program_, plan_limits(config_), *device_)));
  workspace_ = device_->allocate(ctx_.workspace_bytes, "workspace");
  ctx_.workspace = workspace_.data();

  rows_ = std::make_unique<RowTable>(
      config_, state.vocab_size, kv_layout_.groups, masks_, [this] { send_changes(); },
      [this](int64_t words) {
        begin_allocation();
        return state_array<int32_t>(words, "sampling lists");
      });
  entries_.reserve(rows);
}

void ModelRunner::allocate_rings() {
  control_slot_bytes_ = control_slot_bytes(config_, kv_layout_.groups.size());
  output_slot_bytes_ = output_slot_bytes(config_, reported_logprobs(program_, config_));
  slots_.resize(num_slots());
  control_buffer_ = device_->allocate_mapped(control_slot_bytes_ * slots_.size(), "control ring");
  output_buffer_ = device_->allocate_mapped(output_slot_bytes_ * slots_.size(), "output ring");
  if (!has_logits()) {
    adopted_buffer_ =
        device_->allocate(adopted_bytes(program_, config_), "outputs of other stages");
  }
  StepRings& rings = ctx_.rings;
  rings.control = static_cast<char*>(control_buffer_.data());
  rings.output = static_cast<char*>(output_buffer_.data());
  rings.control_bytes = static_cast<int64_t>(control_slot_bytes_);
  rings.output_bytes = static_cast<int64_t>(output_slot_bytes_);
  rings.num_slots = num_slots();
  rings.step = state_array<uint64_t>(1, "step counter");
  device_->copy_in(rings.step, &next_step_, sizeof(next_step_));
  if (device_->type() == DeviceType::kCuda) {
    rings.staged = state_array<char>(staged_bytes(config_), "staged record");
  }
  for (size_t i = 0; i < slots_.size(); ++i) {
    slots_[i].runner = this;
    if (config_.num_speculative_tokens > 0) slots_[i].marks.reserve(config_.max_num_seqs);
    slots_[i].control = reinterpret_cast<ControlHeader*>(
        static_cast<char*>(control_buffer_.host()) + control_slot_bytes_ * i);
    slots_[i].output = reinterpret_cast<OutputHeader*>(static_cast<char*>(output_buffer_.host()) +
                                                       output_slot_bytes_ * i);
  }
}

// --- rows and blocks ---------------------------------------------------------------------------

RowHandle ModelRunner::add_row(const RowSpec& spec) {
  check_no_cut("add_row");
  const auto allocated = [&] { return static_cast<int64_t>(masks_.bytes()) + rows_->list_words(); };
  const int64_t before = allocated();
  if (spec.grammar && has_logits() && masks_.bytes() == 0) {
    begin_allocation();
    masks_.allocate(*device_);
    std::lock_guard lock(side_mutex_);
    stats_.mask_bytes = masks_.bytes();
  }
  // A long prompt takes several steps, which in a pipeline wait for the other stages.
  const RowHandle made = rows_->add(spec, [&](RowHandle handle) {
    if (followers_ != nullptr) followers_->add_row(spec, handle);
  });
  if (allocated() != before) end_allocation();
  return made;
}

void ModelRunner::append_blocks(RowHandle row, int32_t group, std::span<const int32_t> block_ids,
                                bool distinct) {
  check_no_cut("append_blocks");
  rows_->append_blocks(row, group, block_ids, distinct);
  if (followers_ != nullptr) followers_->append_blocks(row, group, block_ids);
}

void ModelRunner::drop_blocks(RowHandle row, int32_t group, int32_t first, int32_t count) {
  check_no_cut("drop_blocks");
  rows_->drop_blocks(row, group, first, count);
  if (followers_ != nullptr) followers_->drop_blocks(row, group, first, count);
}

void ModelRunner::free_row(RowHandle row) {
  check_no_cut("free_row");
  rows_->free(row);
  if (followers_ != nullptr) followers_->free_row(row);
}

void ModelRunner::fill_kv_random(uint64_t seed) {
  if (followers_ != nullptr) followers_->fill_kv_random(seed);
  if (data_ranks_ != nullptr && global_rank() == 0) {
    for (int rank = 1; rank < data_ranks_->size(); ++rank) {
      data_ranks_->runner(rank).fill_kv_random(seed);
    }
  }
  kv_->fill_random(seed);
  if (followers_ != nullptr) followers_->join();
}

void ModelRunner::copy_blocks(std::span<const BlockCopy> copies) {
  check_no_cut("copy_blocks");
  check_copies(copies, config_.num_blocks);
  if (followers_ != nullptr) followers_->copy_blocks(copies);
  struct Task {
    ModelRunner* runner;
    CopyBlocksParams params;
  };
  for (size_t first = 0; first < copies.size(); first += CopyBlocksParams::kMaxCopies) {
    const auto piece = copies.subspan(
        first, std::min<size_t>(CopyBlocksParams::kMaxCopies, copies.size() - first));
    auto task = std::make_unique<Task>(Task{this,
                                            {.arrays = kv_->arrays(),
                                             .num_arrays = kv_->num_arrays(),
                                             .num_blocks = config_.num_blocks,
                                             .count = static_cast<int32_t>(piece.size()),
                                             .copies = {}}});
    std::copy(piece.begin(), piece.end(), task->params.copies);
    device_->submit(
        [](void* arg) {
          const std::unique_ptr<Task> task(static_cast<Task*>(arg));
          ModelRunner& runner = *task->runner;
          try {
            runner.device_->kernels().copy_blocks(task->params, runner.ctx_);
          } catch (const std::exception& error) {
            runner.failed_copy_ = error.what();
          }
        },
        task.release());
  }
}

// --- the step ----------------------------------------------------------------------------------

uint64_t ModelRunner::execute(std::span<const BatchItem> batch, std::optional<bool> in_halves) {
  if (followers_ == nullptr) return execute(batch, {}, in_halves);
  return execute(batch, take_injected(batch), in_halves);
}

// Checks a batch, and fills in what the step's record says of it.
ModelRunner::BatchWork ModelRunner::prepare(std::span<const BatchItem> batch) {
  check_no_cut("execute");
  check(batch.size() <= static_cast<size_t>(config_.max_num_seqs), "execute", "a batch holds ",
        config_.max_num_seqs, " rows, not ", batch.size());
  BatchWork work;
  entries_.clear();
  masked_items_.clear();
  scored_.clear();
  ++batch_mark_;
  for (const BatchItem& item : batch) {
    HostRow& row = rows_->checked({item.row, item.generation}, "execute");
    check(row.batch_mark != batch_mark_, "execute", "row ", item.row, " is in the batch twice");
    row.batch_mark = batch_mark_;
    rows_->check_tokens(item, row);
    work.tokens += item.num_tokens;
    if (row.num_launched < row.prefill_target) {
      const int64_t keys = int64_t{row.num_launched} + item.num_tokens;
      work.prefill.keys += keys;
      work.prefill.scores += keys * item.num_tokens;
      ScoredTokens scored;
      scored.entry = static_cast<int32_t>(entries_.size());
      if (rows_->scores(item, scored)) scored_.push_back(scored);
    }
    const int32_t draws = RowTable::num_samples(item, row);
    work.samples += draws;
    if (row.has_grammar && draws > 0) {
      masked_items_.push_back(static_cast<int32_t>(entries_.size()));
    }
    entries_.push_back({item.row, row.generation, item.num_tokens, draws});
  }
  check(work.tokens <= config_.max_num_batched_tokens, "execute", "the batch has ", work.tokens,
        " tokens, max_num_batched_tokens is ", config_.max_num_batched_tokens);
  return work;
}

StepLoad ModelRunner::check_batch(std::span<const BatchItem> batch) {
  const BatchWork work = prepare(batch);
  return {static_cast<int32_t>(work.tokens), work.prefill.keys > 0};
}

uint64_t ModelRunner::execute(std::span<const BatchItem> batch, const std::string& injected,
                              std::optional<bool> in_halves) {
  const auto start = std::chrono::steady_clock::now();
  waited_ns_ = 0;
  const BatchWork work = prepare(batch);
  if (!scored_.empty() && scorer_ != nullptr) scorer_->place(scored_);
  StepShape shape;
  // Ranks with requests of their own run the program without any too, on padding, and in halves
  // only where all do.
  if (data_ranks_ != nullptr) in_halves = in_halves.value_or(false);
  const bool runs = !batch.empty() || data_ranks_ != nullptr;
  if (runs) {
    StepSizes exact{static_cast<int32_t>(batch.size()), static_cast<int32_t>(work.tokens),
                    work.samples};
    if (batch.empty()) exact = {1, 1, 1};
    const bool scores = std::any_of(scored_.begin(), scored_.end(),
                                    [](const ScoredTokens& tokens) { return tokens.count > 0; });
    shape = choose_shape(exact, scores, work.prefill, in_halves);
  }
  // Before this rank's own: it may wait for a step that the others have not launched yet.
  if (followers_ != nullptr) followers_->execute(batch, injected, shape.cut_token > 0);
  const uint64_t step = submit(entries_, shape, scored_, injected);
  if (shape.cut) cut_step_ = step;
  for (const BatchItem& item : batch) rows_->launch(item, step);
  if (!follows()) {
    Slot& slot = slot_of(step);
    slot.delivered = false;
    for (const BatchItem& item : batch) {
      if (rows_->has_logprobs()) slot.num_logprobs.push_back(rows_->num_logprobs(item.row));
      if (config_.num_speculative_tokens > 0) slot.marks.push_back(rows_->mark(item.row));
    }
  }
  if (runs) {
    newest_sizes_ = shape.sizes;
    newest_cut_ = shape.cut_token;
    newest_entries_ = static_cast<int32_t>(batch.size());
    newest_batch_step_ = step;
  }
  std::lock_guard lock(side_mutex_);
  if (runs) {
    ++stats_.batches;
    ++stats_.steps_by_mode[static_cast<int>(shape.mode)];
    stats_.steps_in_halves += shape.cut_token > 0 ? 1 : 0;
  }
  stats_.host_ns += nanoseconds_since(start) - waited_ns_;
  return step;
}

StepShape ModelRunner::choose_shape(StepSizes exact, bool scores, const PrefillWork& prefill,
                                    std::optional<bool> in_halves) {
  // Halves have a token each, one of them padding if need be.
  if (in_halves.value_or(false)) exact.num_tokens = std::max(exact.num_tokens, 2);
  StepShape shape;
  {
    std::lock_guard lock(side_mutex_);
    shape = ladder_.choose(entries_, exact, scores);
  }
  shape.prefill = prefill;
  shape.cut = !masked_items_.empty() && has_logits();
  // Until there are graphs, the same kernels are launched one by one.
  if (!captured_) shape.mode = StepMode::kEager;
  StepSizes& sizes = shape.sizes;
  if (shape.mode == StepMode::kEager) {
    sizes.num_requests = std::max(sizes.num_requests, config_.pad_requests);
    sizes.num_tokens = std::max(sizes.num_tokens, config_.pad_tokens);
    sizes.num_logits = std::max(sizes.num_logits, config_.pad_requests);
  }
  if (halves_ == nullptr) return shape;
  // A size of whole steps is cut at one place and in one case, so that it has one graph.
  const StepLoad load{shape.whole ? sizes.num_tokens : exact.num_tokens,
                      !shape.whole && prefill.keys > 0};
  if (!in_halves.value_or(runs_in_halves(config_.two_batch, {&load, 1}))) return shape;
  shape.cut_token = halves_->cut_of(load.tokens, sizes.num_tokens, sizes.speculates);
  // What is captured in pieces is of whole steps.
  if (shape.cut_token > 0 && shape.mode == StepMode::kPiecewise) shape.mode = StepMode::kEager;
  return shape;
}

// Rows can be given back on a device that is lost, too: execute() says so, free_row() need not.
void ModelRunner::send_changes() {
  try {
    submit({}, {});
  } catch (const Error&) {
    rows_->drop_changes();
  }
}

// The stages of a pipeline may be several steps apart. A row's next step needs what its last one
// drew, and a slot is written again only once all have read it.
uint64_t ModelRunner::adopt_through(std::span<const BatchEntry> entries) const {
  if (config_.num_stages == 1) return 0;
  const uint64_t step = next_step_;
  const auto slots = static_cast<uint64_t>(slots_.size());
  uint64_t newest = step >= slots ? step - slots + 1 : 0;
  for (const BatchEntry& entry : entries) {
    newest = std::max(newest, rows_->last_draw(entry.row));
  }
  return newest;
}

uint64_t ModelRunner::submit(std::span<const BatchEntry> entries, const StepShape& shape,
                             std::span<const ScoredTokens> scored, const std::string& injected) {
  Slot& slot = slot_of(next_step_);
  if (slot.step != 0) {
    const auto start = std::chrono::steady_clock::now();
    wait(slot);
    waited_ns_ += nanoseconds_since(start);
    if (!slot.delivered) keep_output(slot);
    log_step(slot);
  }
  const uint64_t adopt = adopt_through(entries);
  const uint64_t step = next_step_++;
  rows_->write(slot.control, step, adopt, entries, shape.sizes);
  slot.step = step;
  slot.shape = shape;
  slot.delivered = true;  // execute() asks for delivery; changes alone have nothing to say
  slot.error.clear();
  slot.injected = injected;
  slot.alone = false;
  slot.time = {};
  for (const BatchEntry& entry : entries) slot.time.tokens += entry.num_tokens;
  slot.time.requests = static_cast<int32_t>(entries.size());
  slot.marks.clear();
  slot.num_logprobs.clear();
  slot.scored.assign(scored.begin(), scored.end());
  count_batch(slot);
  {
    std::lock_guard lock(side_mutex_);
    const bool is_batch =
        !entries.empty() || (data_ranks_ != nullptr && shape.sizes.num_requests > 0);
    if (is_batch && (fails_alone_ || communicator_ == nullptr)) {
      slot.injected.swap(injected_failure_);
      slot.alone = std::exchange(fails_alone_, false);
    }
    ++stats_.steps;
    stats_.control_bytes += slot.control->bytes;
    stats_.output_bytes +=
        kOutputHeaderBytes +
        entries.size() * (sizeof(OutputEntry) + (1 + ctx_.rows.max_drafts) * sizeof(int32_t));
  }
  device_->submit(&ModelRunner::run_step, &slot);
  return step;
}

void ModelRunner::finish_step() {
  const auto start = std::chrono::steady_clock::now();
  check(cut_step_ != 0, "finish_step", "no step waits for it");
  if (followers_ != nullptr) {
    masked_rows_.clear();
    for (size_t i = 0; i < masked_items_.size(); ++i) masked_rows_.push_back(masked_row(i));
    followers_->finish_step(masked_rows_, masks_.all(), masks_.words());
  }
  device_->submit(&ModelRunner::run_rest, &slot_of(std::exchange(cut_step_, 0)));
  std::lock_guard lock(side_mutex_);
  stats_.host_ns += nanoseconds_since(start);
}

void ModelRunner::refuse_cut(const char* where) const {
  fail(ErrorKind::kInvalidArgument, where, "step ", cut_step_,
       " waits for the masks of its rows and must be finished first");
}

void ModelRunner::run_step(void* arg) {
  Slot& slot = *static_cast<Slot*>(arg);
  ModelRunner& runner = *slot.runner;
  try {
    runner.check_ranks();
    if (!runner.failed_copy_.empty()) {
      fail(ErrorKind::kDevice, "copy_blocks", std::exchange(runner.failed_copy_, {}));
    }
    if (slot.injected.empty()) {
      runner.step_->run(slot.shape,
                        {runner.scorer_.get(), slot.scored, slot.step % runner.slots_.size()});
    } else {
      runner.step_->run_and_fail(slot.shape, slot.injected);
    }
  } catch (const std::exception& error) {
    runner.fail_step(slot, error.what());
  }
}

void ModelRunner::run_rest(void* arg) {
  Slot& slot = *static_cast<Slot*>(arg);
  if (!slot.error.empty()) return;  // it has ended
  try {
    slot.runner->step_->run_rest(slot.shape);
  } catch (const std::exception& error) {
    slot.runner->fail_step(slot, error.what());
  }
}

// Ends a step that could not be launched as a whole, so that the next one finds the rings in order.
void ModelRunner::fail_step(Slot& slot, const char* what) noexcept {
  // Others may wait for what it launched no more.
  abort_ranks(slot, what);
  // Earlier steps, and what was launched of this one, still use the rings.
  device_->settle();
  slot.error = what;
  try {
    // The record also changes rows that are not in its batch, so it is carried out all the same; a
    // second time gives what the first gave, as the rows have not advanced.
    device_->kernels().apply(ctx_);
    device_->set_word(ctx_.rings.step, slot.step + 1);
  } catch (const std::exception&) {
    // The device is lost: every later step says so itself.
  }
  slot.output->step = slot.step;
  slot.output->num_entries = 0;
  slot.output->begin_ns = 0;
  slot.output->end_ns = 0;
  slot.output->sequence.store(slot.step + 1, std::memory_order_release);
}

// --- graphs ------------------------------------------------------------------------------------

void ModelRunner::warm_up(const StepShape& shape) {
  const uint64_t step = submit({}, shape);
  wait(slot_of(step));
  if (!slot_of(step).error.empty()) fail(ErrorKind::kDevice, "capture", slot_of(step).error);
}

CaptureReport ModelRunner::capture_graphs() {
  return data_ranks_ != nullptr ? data_ranks_->capture_graphs() : capture_own_graphs();
}

CaptureReport ModelRunner::capture_own_graphs() {
  CaptureReport report;
  check_no_cut("capture_graphs");
  if (config_.graph_mode == StepMode::kEager) return report;
  if (followers_ != nullptr) followers_->capture_graphs();
  const size_t free_before = device_->memory().free_bytes;
  captured_ = false;
  device_->synchronize();  // a step in flight may be one of them
  step_->drop_graphs();
  const std::vector<CaptureSize>& full = ladder_.full();
  if (config_.graph_mode == StepMode::kFull) {
    for (size_t i = full.size(); i-- > 0;) {
      const StepSizes sizes = ladder_.sizes_of(full[i]);
      for (const int32_t cut_token : cuts_of_graphs(sizes)) {
        warm_up({.whole = true, .sizes = sizes, .cut_token = cut_token});
        run_on_stream(*device_, [&] { step_->capture_full(i, sizes, cut_token); });
      }
      ++report.full_graphs;
    }
  }
  const std::vector<int32_t>& tokens = ladder_.piecewise();
  for (size_t i = tokens.size(); i-- > 0;) {
    // As for a prompt that fills the step, so that its kernels are loaded.
    const PrefillWork prompt{tokens[i], int64_t{tokens[i]} * tokens[i]};
    warm_up({StepMode::kEager, -1, false, {1, tokens[i], 1}, prompt});
    run_on_stream(*device_, [&] { step_->capture_pieces(i, tokens[i]); });
    ++report.piecewise_graphs;
  }
  captured_ = true;
  if (followers_ != nullptr) followers_->join();
  check_ranks();
  report.bytes =
      static_cast<int64_t>(free_before) - static_cast<int64_t>(device_->memory().free_bytes);
  return report;
}

RunnerStats ModelRunner::stats() const {
  RunnerStats stats;
  {
    std::lock_guard lock(side_mutex_);
    stats = stats_;
  }
  stats.device = device_->counters();
  return stats;
}

// --- results -----------------------------------------------------------------------------------

void ModelRunner::wait(const Slot& slot) const {
  if (communicator_ != nullptr) return wait_among_ranks(slot);
  device_->wait_sequence(slot.output->sequence, slot.step + 1);
}

// Steps end in order, so the one before has outlived all others.
void ModelRunner::wait_before(uint64_t step) const {
  if (step < 2) return;
  const Slot& before = slot_of(step - 1);
  if (before.step == step - 1) wait(before);
}

void ModelRunner::read_output(const Slot& slot, StepOutput& output) {
  if (communicator_ != nullptr && communicator_->is_aborted()) {
    // What other ranks did not send may be missing from its results.
    output = StepOutput{};
    output.step = slot.step;
    output.error = concat("[ranks] ", communicator_->abort_reason());
    return;
  }
  output.step = slot.step;
  output.error = slot.error;
  output.mode = slot.shape.mode;
  output.cut_token = slot.shape.cut_token;
  output.begin_ns = slot.output->begin_ns;
  output.end_ns = slot.output->end_ns;
  const OutputEntry* entries = output_entries(slot.output);
  output.entries.assign(entries, entries + slot.output->num_entries);
  output.tokens_per_entry = 1 + ctx_.rows.max_drafts;
  const int32_t* tokens = output_tokens(slot.output, ctx_.infer.max_requests);
  output.token_ids.assign(tokens, tokens + output.entries.size() * output.tokens_per_entry);
  // A step that failed has no entries.
  if (!slot.marks.empty() && output.entries.size() == slot.marks.size()) {
    num_computed_.clear();
    for (const OutputEntry& entry : output.entries) {
      num_computed_.push_back(entry.masked != 0 ? -1 : entry.num_computed);
    }
    retire_rows(slot.marks, num_computed_);
    if (followers_ != nullptr) followers_->retire_rows(slot.marks, num_computed_);
  }
  output.logprobs.clear();
  output.logprobs_end.clear();
  if (!slot.num_logprobs.empty()) read_logprobs(slot, output);
  output.prompt_scores.clear();
  if (!slot.scored.empty()) {
    scorer_->read(slot.scored, slot.step % slots_.size(), output.entries, output.prompt_scores);
  }
}

void ModelRunner::retire_rows(std::span<const RowTable::Mark> marks,
                              std::span<const int32_t> num_computed) {
  for (size_t i = 0; i < marks.size(); ++i) {
    if (num_computed[i] >= 0) rows_->retire(marks[i], num_computed[i]);
  }
}

void ModelRunner::read_logprobs(const Slot& slot, StepOutput& output) const {
  for (size_t i = 0; i < output.entries.size(); ++i) {
    const int32_t places = slot.num_logprobs[i] < 0 ? 0 : output.entries[i].num_tokens;
    for (int32_t place = 0; place < places; ++place) {
      LogprobRecord* record = output_logprobs(slot.output, ctx_.infer.max_requests, ctx_.rows,
                                              static_cast<int32_t>(i), place);
      append_logprobs(*record, output.logprobs);
    }
    output.logprobs_end.push_back(static_cast<int32_t>(output.logprobs.size()));
  }
}

void ModelRunner::keep_output(Slot& slot) {
  read_output(slot, kept_[slot.step]);
  slot.delivered = true;
}

StepOutput ModelRunner::result(uint64_t step) {
  StepOutput output;
  result(step, output);
  return output;
}

void ModelRunner::result(uint64_t step, StepOutput& output) {
  if (auto it = kept_.find(step); it != kept_.end()) {
    output = std::move(it->second);
    kept_.erase(it);
    return;
  }
  Slot& slot = slot_of(step);
  check(slot.step == step && !slot.delivered, "result", "step ", step,
        " was never launched or its result was taken");
  if (step == cut_step_) refuse_cut("result");
  slot.delivered = true;
  try {
    wait(slot);
  } catch (const Error& error) {
    // The device failed while the step ran. Its rows are lost; the caller frees them.
    output = StepOutput{};
    output.step = step;
    output.error = error.what();
    return;
  }
  read_output(slot, output);
}

void ModelRunner::wait_step(uint64_t step) noexcept {
  const Slot& slot = slot_of(step);
  if (slot.step != step) return;
  try {
    wait(slot);
  } catch (const std::exception&) {
    // result() waits again, and says so.
  }
}

void ModelRunner::discard(uint64_t step) {
  if (step != 0 && step == cut_step_) {
    wait_masks();
    for (size_t i = 0; i < masked_items_.size(); ++i) masks_.allow_all(masked_row(i));
    finish_step();
  }
  kept_.erase(step);
  if (Slot& slot = slot_of(step); slot.step == step) slot.delivered = true;
}

bool ModelRunner::ready(uint64_t step) const {
  check(step > 0 && step < next_step_, "ready", "step ", step, " was never launched");
  const Slot& slot = slot_of(step);
  return slot.step != step ||
         slot.output->sequence.load(std::memory_order_acquire) >= slot.step + 1;
}

uint64_t ModelRunner::retired_step() const {
  // Steps retire in order, so the newest finished slot tells.
  // A slot is taken again only when its step has finished, whatever the newer ones do.
  const auto slots = static_cast<uint64_t>(slots_.size());
  uint64_t retired = next_step_ > slots ? next_step_ - 1 - slots : 0;
  for (const Slot& slot : slots_) {
    if (slot.step != 0 && ready(slot.step)) retired = std::max(retired, slot.step);
  }
  return retired;
}

}  // namespace mrv1
