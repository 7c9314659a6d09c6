// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "runner/model_runner.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "core/error.h"

namespace mrv1 {
namespace {

constexpr int64_t kSlotAlignment = 256;
// Room for changes in a control record besides one command of each kind a row. Longer changes (a
// long prompt) travel in records of their own before the step.
constexpr size_t kControlPayloadBytes = size_t{256} << 10;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

uint64_t nanoseconds_since(std::chrono::steady_clock::time_point start) {
  const auto elapsed = std::chrono::steady_clock::now() - start;
  return std::chrono::duration_cast<std::chrono::nanoseconds>(elapsed).count();
}

int32_t max_blocks_per_row(const RunnerConfig& config) {
  return (config.max_model_len + config.block_size - 1) / config.block_size;
}

size_t control_slot_bytes(const RunnerConfig& config) {
  const size_t per_row = sizeof(FreeRow) + sizeof(NewRow) + 2 * sizeof(TokenWrite) +
                         2 * sizeof(BlockWrite) + sizeof(StopWrite) + sizeof(BatchEntry);
  return round_up(sizeof(ControlHeader) + config.max_num_seqs * per_row + kControlPayloadBytes,
                  kSlotAlignment);
}

size_t output_slot_bytes(const RunnerConfig& config) {
  return round_up(kOutputHeaderBytes + config.max_num_seqs * sizeof(OutputEntry), kSlotAlignment);
}

int32_t vocab_size(const Program& program) {
  return static_cast<int32_t>(program.values()[program.logits_value()].cols);
}

// Sizes of the int32 arrays of InferParams, in the order allocate_state() makes them.
int64_t infer_ints(const RunnerConfig& config) {
  const int64_t requests = config.max_num_seqs, tokens = config.max_num_batched_tokens;
  int64_t ints = requests * 5 + 1 + tokens * 4 + requests * 2 + sizeof(InferCounts) / 4;
  if (config.infer_param_view) {
    ints += 3 * requests + 8 * requests + 3 * (requests + 1) +
            requests * max_blocks_per_row(config) + tokens + 7;
  }
  return ints;
}

// Bytes of StepRings::staged: the header of a record and the entries of the largest batch.
int64_t staged_bytes(const RunnerConfig& config) {
  return round_up(sizeof(ControlHeader), kSlotAlignment) +
         round_up(int64_t{config.max_num_seqs} * sizeof(BatchEntry), kSlotAlignment);
}

}  // namespace

PlanLimits ModelRunner::plan_limits(const RunnerConfig& config) {
  return {config.max_num_batched_tokens, config.max_num_seqs, config.max_num_seqs};
}

MemoryPlan ModelRunner::plan_memory(const Program& program, const RunnerConfig& config,
                                    Device& device) {
  check_limits(program, config);
  MemoryPlan plan;
  for (const WeightView& weight : stored_weights(program, device.kernels().linear_layout)) {
    plan.weights += weight_bytes(weight);
  }
  const PlanLimits limits = plan_limits(config);
  plan.activations =
      Executable::bytes(program, limits, device, config.max_model_len) +
      device.kernels().workspace_bytes(Executable::workspace_limits(program, limits, device));
  const int64_t rows = config.max_num_seqs;
  plan.state =
      rows * (sizeof(Row) + sizeof(SamplingRow)) +
      rows * (int64_t{config.max_model_len} + max_blocks_per_row(config)) * 4 +
      int64_t{config.max_stop_ids} * 4 + infer_ints(config) * 4 + staged_bytes(config) +
      sizeof(uint64_t) +
      kSlots * static_cast<int64_t>(control_slot_bytes(config) + output_slot_bytes(config));
  for (const HeadShape& heads : program.kv_layers()) {
    plan.per_block += 2 * kv_cache_layer(program.dtype(), 1, config.block_size, heads).bytes();
  }
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
  check(config.max_stop_ids >= 0, "runner", "max_stop_ids must not be negative");
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
  for (const int32_t tokens : config.piecewise_sizes) {
    check(tokens >= 1 && tokens <= config.max_num_batched_tokens, "runner",
          "piecewise_sizes asks for ", tokens,
          " tokens; allowed are 1 to max_num_batched_tokens = ", config.max_num_batched_tokens);
  }
  check(program.logits_value() >= 0, "runner", "the program has no logits");
  check(!program.kv_layers().empty(), "runner", "the program has no attention");
  // The sampler's sums of fixed-point weights hold this many (sampling/math.h).
  positive(vocab_size(program), "vocab_size", 1 << 18);
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
         mb(plan.activations), ", state ", mb(plan.state), ", KV cache ",
         mb(plan.per_block * config.num_blocks), " (", config.num_blocks, " blocks of ",
         config.block_size, " tokens)");
  }
  return config;
}

ModelRunner::ModelRunner(std::shared_ptr<Device> device, Program program,
                         const RunnerConfig& config)
    : device_(std::move(device)),
      program_(std::move(program)),
      config_(checked_config(program_, config, *device_)),
      weights_(program_, *device_),
      memory_plan_(plan_memory(program_, config_, *device_)) {
  device_->linear_context();  // a missing library is reported here, not in a step
  allocate_kv();
  executable_ = std::make_unique<Executable>(program_, plan_limits(config_), *device_,
                                             weights_.views(), kv_, config_.max_model_len);
  ladder_ = GraphLadder(config_.graph_mode, config_.capture_sizes, config_.piecewise_sizes);
  allocate_state();
  allocate_rings();
  step_ = std::make_unique<Step>(program_, *executable_, *device_, ctx_);
  if (view_) step_->set_view(view_inputs_, *view_);
}

ModelRunner::~ModelRunner() {
  try {
    device_->synchronize();
  } catch (const Error&) {
    // A device that failed cannot be waited for; its memory goes with it.
  }
}

void ModelRunner::allocate_kv() {
  kv_buffer_ = device_->allocate(static_cast<size_t>(memory_plan_.per_block * config_.num_blocks),
                                 "KV cache");
  char* next = static_cast<char*>(kv_buffer_.data());
  for (const HeadShape& heads : program_.kv_layers()) {
    KvCacheLayer layer =
        kv_cache_layer(program_.dtype(), config_.num_blocks, config_.block_size, heads);
    layer.key = next;
    layer.value = next + layer.bytes();
    next += 2 * layer.bytes();
    kv_.push_back(layer);
  }
  std::vector<CacheArray> arrays;
  for (const KvCacheLayer& layer : kv_) {
    const int64_t block_bytes = layer.block_stride * static_cast<int64_t>(dtype_size(layer.dtype));
    arrays.push_back({layer.key, block_bytes});
    arrays.push_back({layer.value, block_bytes});
  }
  cache_arrays_ = device_->allocate(arrays.size() * sizeof(CacheArray), "KV cache");
  device_->copy_in(cache_arrays_.data(), arrays.data(), arrays.size() * sizeof(CacheArray));
}

void ModelRunner::fill_kv_random(uint64_t seed) {
  const auto bytes = static_cast<size_t>(memory_plan_.per_block * config_.num_blocks);
  fill_random(*device_, {.data = kv_buffer_.data(),
                         .dtype = program_.dtype(),
                         .count = static_cast<int64_t>(bytes / dtype_size(program_.dtype())),
                         .key = seed,
                         .first = 0,
                         .center = 0.0f,
                         .width = 1.0f});
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
  state.num_groups = 1;
  state.block_size = config_.block_size;
  state.max_blocks = max_blocks_per_row(config_);
  state.max_model_len = config_.max_model_len;
  state.vocab_size = vocab_size(program_);
  state.rows = state_array<Row>(rows, "rows");
  state.sampling = state_array<SamplingRow>(rows, "sampling rows");
  state.tokens = state_array<int32_t>(rows * config_.max_model_len, "token history");
  state.block_table = state_array<int32_t>(rows * state.max_blocks, "block tables");
  state.stop_ids = state_array<int32_t>(std::max(1, config_.max_stop_ids), "stop ids");

  InferParams& infer = ctx_.infer;
  infer.max_requests = config_.max_num_seqs;
  infer.max_tokens = config_.max_num_batched_tokens;
  infer.max_logits = config_.max_num_seqs;
  infer.counts = state_array<InferCounts>(1, "infer params");
  infer.row = state_array<int32_t>(rows, "infer params");
  infer.query_start_loc = state_array<int32_t>(rows + 1, "infer params");
  infer.seq_lens = state_array<int32_t>(rows, "infer params");
  infer.entry_batch = state_array<int32_t>(rows, "infer params");
  infer.sampled = state_array<int32_t>(rows, "infer params");
  infer.token_batch = state_array<int32_t>(tokens, "infer params");
  infer.token_ids = state_array<int32_t>(tokens, "infer params");
  infer.positions = state_array<int32_t>(tokens, "infer params");
  infer.slot_mapping = state_array<int32_t>(tokens, "infer params");
  infer.logits_indices = state_array<int32_t>(rows, "infer params");
  infer.logits_batch = state_array<int32_t>(rows, "infer params");
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
                    1};
    InferParamView view{};
    for (int32_t** array :
         {&view.encoder_batch_map, &view.decoder_batch_map, &view.encoder_batch_idx,
          &view.decoder_batch_idx, &view.prefix_len, &view.decoder_context_len,
          &view.decoder_context_len_cache, &view.slot_mapping_dec}) {
      *array = state_array<int32_t>(rows, "infer param view");
    }
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
  ctx_.attention_backend = config_.attention_backend;
  ctx_.batch_invariant = config_.batch_invariant;
  ctx_.sync_launches = config_.sync_launches;
  ctx_.workspace_bytes = static_cast<size_t>(device_->kernels().workspace_bytes(
      Executable::workspace_limits(program_, plan_limits(config_), *device_)));
  workspace_ = device_->allocate(ctx_.workspace_bytes, "workspace");
  ctx_.workspace = workspace_.data();

  rows_.resize(rows);
  block_marks_.assign(config_.num_blocks, 0);
  // The lowest free row is taken first.
  for (int32_t row = config_.max_num_seqs; row-- > 0;) free_rows_.push_back(row);
  if (config_.max_stop_ids > 0) free_stop_ranges_.emplace_back(0, config_.max_stop_ids);
  entries_.reserve(rows);
  staged_.reserve(config_.max_num_seqs);
}

void ModelRunner::allocate_rings() {
  control_slot_bytes_ = control_slot_bytes(config_);
  output_slot_bytes_ = output_slot_bytes(config_);
  control_buffer_ = device_->allocate_mapped(control_slot_bytes_ * kSlots, "control ring");
  output_buffer_ = device_->allocate_mapped(output_slot_bytes_ * kSlots, "output ring");
  StepRings& rings = ctx_.rings;
  rings.control = static_cast<char*>(control_buffer_.data());
  rings.output = static_cast<char*>(output_buffer_.data());
  rings.control_bytes = static_cast<int64_t>(control_slot_bytes_);
  rings.output_bytes = static_cast<int64_t>(output_slot_bytes_);
  rings.num_slots = kSlots;
  rings.step = state_array<uint64_t>(1, "step counter");
  device_->copy_in(rings.step, &next_step_, sizeof(next_step_));
  if (device_->type() == DeviceType::kCuda) {
    rings.staged = state_array<char>(staged_bytes(config_), "staged record");
  }
  slots_.resize(kSlots);
  for (int i = 0; i < kSlots; ++i) {
    slots_[i].runner = this;
    slots_[i].control = reinterpret_cast<ControlHeader*>(
        static_cast<char*>(control_buffer_.host()) + control_slot_bytes_ * i);
    slots_[i].output = reinterpret_cast<OutputHeader*>(static_cast<char*>(output_buffer_.host()) +
                                                       output_slot_bytes_ * i);
  }
}

// --- rows --------------------------------------------------------------------------------------

ModelRunner::HostRow& ModelRunner::checked_row(RowHandle handle, const char* where) {
  const auto& [row, generation] = handle;
  check(row >= 0 && row < config_.max_num_seqs, where, "row ", row, " is outside [0, ",
        config_.max_num_seqs, ")");
  check(rows_[row].active, where, "row ", row, " is free");
  check(generation == kAnyGeneration || rows_[row].generation == generation, where, "row ", row,
        " belongs to another request now: generation ", rows_[row].generation, ", not ",
        generation);
  return rows_[row];
}

void ModelRunner::check_blocks(std::span<const int32_t> held, std::span<const int32_t> block_ids,
                               const char* where) {
  ++block_mark_;
  for (int32_t block : held) block_marks_[block] = block_mark_;
  for (int32_t block : block_ids) {
    check(block > 0 && block < config_.num_blocks, where, "block id ", block, " is outside [1, ",
          config_.num_blocks, ")");
    check(block_marks_[block] != block_mark_, where, "block id ", block, " is in the row twice");
    block_marks_[block] = block_mark_;
  }
}

int32_t ModelRunner::allocate_stop_ids(int32_t count) {
  for (size_t i = 0; i < free_stop_ranges_.size(); ++i) {
    auto& [offset, size] = free_stop_ranges_[i];
    if (size < count) continue;
    const int32_t start = offset;
    offset += count;
    size -= count;
    if (size == 0) free_stop_ranges_.erase(free_stop_ranges_.begin() + i);
    return start;
  }
  fail(ErrorKind::kRequest, "add_row", count, " stop ids do not fit: the running rows hold nearly ",
       config_.max_stop_ids, " (max_stop_ids)");
}

void ModelRunner::release_stop_ids(int32_t offset, int32_t count) {
  if (count == 0) return;
  auto it = std::lower_bound(free_stop_ranges_.begin(), free_stop_ranges_.end(),
                             std::make_pair(offset, 0));
  it = free_stop_ranges_.insert(it, {offset, count});
  const auto merge = [&](auto left) {
    const auto right = left + 1;
    if (right != free_stop_ranges_.end() && left->first + left->second == right->first) {
      left->second += right->second;
      free_stop_ranges_.erase(right);
    }
  };
  merge(it);
  if (it != free_stop_ranges_.begin()) merge(it - 1);
}

int32_t ModelRunner::max_total_length(const RowSpec& spec) const {
  return static_cast<int32_t>(
      std::min<int64_t>(int64_t{spec.prompt_len} + spec.max_tokens, config_.max_model_len));
}

void ModelRunner::check_spec(const RowSpec& spec) {
  const int32_t length = static_cast<int32_t>(spec.token_ids.size());
  const int32_t vocab = ctx_.rows.vocab_size;
  const char* where = "add_row";
  check(!spec.token_ids.empty(), where, "token_ids is empty");
  check(spec.token_ids.size() < static_cast<size_t>(config_.max_model_len), where, "token_ids has ",
        spec.token_ids.size(), " tokens; with one to generate at most ", config_.max_model_len - 1,
        " fit max_model_len ", config_.max_model_len);
  for (int32_t token : spec.token_ids) {
    check(token >= 0 && token < vocab, where, "token id ", token, " is outside [0, ", vocab, ")");
  }
  check(spec.prompt_len >= 1 && spec.prompt_len <= length, where, "prompt_len ", spec.prompt_len,
        " is outside [1, ", length, "]");
  check(spec.num_computed >= 0 && spec.num_computed < length, where, "num_computed ",
        spec.num_computed, " is outside [0, ", length, "): the last token is always computed");
  check(std::isfinite(spec.temperature) && spec.temperature >= 0.0f, where, "temperature ",
        spec.temperature, " must be finite and not negative");
  check(spec.top_p > 0.0f && spec.top_p <= 1.0f, where, "top_p ", spec.top_p, " is outside (0, 1]");
  check(spec.min_p >= 0.0f && spec.min_p <= 1.0f, where, "min_p ", spec.min_p,
        " is outside [0, 1]");
  check(spec.top_k >= 0, where, "top_k ", spec.top_k, " must be 0 (off) or positive");
  check(spec.max_tokens >= 1, where, "max_tokens ", spec.max_tokens, " must be positive");
  check(spec.min_tokens >= 0 && spec.min_tokens <= spec.max_tokens, where, "min_tokens ",
        spec.min_tokens, " is outside [0, max_tokens = ", spec.max_tokens, "]");
  for (int32_t token : spec.stop_ids) {
    check(token >= 0 && token < vocab, where, "stop id ", token, " is outside [0, ", vocab, ")");
  }
  check(spec.stop_ids.size() <= static_cast<size_t>(config_.max_stop_ids), where, "stop_ids has ",
        spec.stop_ids.size(), " ids, all rows together hold ", config_.max_stop_ids);
  check(length < max_total_length(spec), where, "token_ids holds ", length - spec.prompt_len,
        " outputs already, max_tokens is ", spec.max_tokens);
  check(spec.block_ids.size() <= static_cast<size_t>(ctx_.rows.max_blocks), where, "a row holds ",
        ctx_.rows.max_blocks, " blocks, not ", spec.block_ids.size());
  if (!spec.block_ids.empty()) check_blocks({}, spec.block_ids, where);
}

bool ModelRunner::can_add(const RowSpec& spec) const {
  const auto count = static_cast<int32_t>(spec.stop_ids.size());
  const auto holds = [&](const auto& range) { return range.second >= count; };
  return !free_rows_.empty() &&
         (count == 0 || std::any_of(free_stop_ranges_.begin(), free_stop_ranges_.end(), holds));
}

RowHandle ModelRunner::add_row(const RowSpec& spec) {
  check_spec(spec);
  check(!free_rows_.empty(), "add_row", "all ", config_.max_num_seqs, " rows are in use");

  const int32_t stop_count = static_cast<int32_t>(spec.stop_ids.size());
  const int32_t stop_offset = stop_count > 0 ? allocate_stop_ids(stop_count) : 0;
  const int32_t row = free_rows_.back();
  free_rows_.pop_back();
  HostRow& host = rows_[row];
  const int32_t generation = host.generation + 1;
  std::vector<int32_t> blocks = std::move(host.blocks);  // keeps its capacity
  blocks.clear();
  host = HostRow{.active = true,
                 .generation = generation,
                 .prefill_target = static_cast<int32_t>(spec.token_ids.size()),
                 .num_launched = spec.num_computed,
                 .max_total_len = max_total_length(spec),
                 .blocks = std::move(blocks),
                 .stop_offset = stop_offset,
                 .stop_count = stop_count};

  NewRow command{};
  command.row = row;
  Row& state = command.state;
  state.generation = generation;
  state.phase = spec.num_computed > 0 ? RowPhase::kExtend : RowPhase::kPrefill;
  state.prompt_len = spec.prompt_len;
  state.prefill_target = host.prefill_target;
  state.num_computed = spec.num_computed;
  state.total_len = host.prefill_target;
  state.last_token = -1;
  state.min_total_len = static_cast<int32_t>(
      std::min<int64_t>(int64_t{spec.prompt_len} + spec.min_tokens, config_.max_model_len));
  state.max_total_len = host.max_total_len;
  state.adapter = -1;
  SamplingRow& sampling = command.sampling;
  sampling.temperature = spec.temperature;
  sampling.top_p = spec.top_p;
  sampling.min_p = spec.min_p;
  sampling.top_k = spec.top_k;
  sampling.seed = spec.seed;
  sampling.stop_offset = stop_offset;
  sampling.stop_count = stop_count;
  make_room(sizeof(NewRow));
  staged_.new_row(command);
  stage_tokens(row, spec.token_ids);
  stage_stop_ids(stop_offset, spec.stop_ids);
  append_blocks({row, generation}, spec.block_ids);
  host.staged_for = next_step_;
  return {row, generation};
}

void ModelRunner::append_blocks(RowHandle row, std::span<const int32_t> block_ids) {
  HostRow& host = checked_row(row, "append_blocks");
  check(host.blocks.size() + block_ids.size() <= static_cast<size_t>(ctx_.rows.max_blocks),
        "append_blocks", "row ", row.row, " holds ", host.blocks.size(), " of ",
        ctx_.rows.max_blocks, " blocks, ", block_ids.size(), " more do not fit");
  check_blocks(host.blocks, block_ids, "append_blocks");
  stage_blocks(row.row, static_cast<int32_t>(host.blocks.size()), block_ids);
  host.blocks.insert(host.blocks.end(), block_ids.begin(), block_ids.end());
  host.staged_for = next_step_;
}

void ModelRunner::free_row(RowHandle row) {
  HostRow& host = checked_row(row, "free_row");
  // apply() frees before it writes: changes of this row that are still staged must go first.
  if (host.staged_for == next_step_) submit({}, {});
  make_room(sizeof(FreeRow));
  staged_.free_row({row.row, host.generation});
  release_stop_ids(host.stop_offset, host.stop_count);
  host.active = false;
  free_rows_.push_back(row.row);
}

void ModelRunner::copy_blocks(std::span<const BlockCopy> copies) {
  check_copies(copies, config_.num_blocks);
  struct Task {
    ModelRunner* runner;
    CopyBlocksParams params;
  };
  for (size_t first = 0; first < copies.size(); first += CopyBlocksParams::kMaxCopies) {
    const auto piece = copies.subspan(
        first, std::min<size_t>(CopyBlocksParams::kMaxCopies, copies.size() - first));
    auto task =
        std::make_unique<Task>(Task{this,
                                    {.arrays = static_cast<const CacheArray*>(cache_arrays_.data()),
                                     .num_arrays = static_cast<int32_t>(2 * kv_.size()),
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

uint64_t ModelRunner::last_step(RowHandle handle) const {
  const auto& [row, generation] = handle;
  check(row >= 0 && row < config_.max_num_seqs, "last_step", "row ", row, " is outside [0, ",
        config_.max_num_seqs, ")");
  return rows_[row].last_step;
}

// --- staging -----------------------------------------------------------------------------------

void ModelRunner::make_room(size_t bytes) {
  // Commands are padded to 16 bytes in the record; 64 covers the array ends.
  if (staged_.record_bytes(config_.max_num_seqs) + bytes + 64 > control_slot_bytes_) {
    submit({}, {});
  }
}

void ModelRunner::stage_tokens(int32_t row, std::span<const int32_t> tokens) {
  constexpr size_t kPiece = kControlPayloadBytes / 2 / sizeof(int32_t);
  for (size_t start = 0; start < tokens.size(); start += kPiece) {
    const auto piece = tokens.subspan(start, std::min(kPiece, tokens.size() - start));
    make_room(sizeof(TokenWrite) + piece.size_bytes());
    staged_.write_tokens(row, static_cast<int32_t>(start), piece);
  }
}

void ModelRunner::stage_blocks(int32_t row, int32_t start, std::span<const int32_t> blocks) {
  constexpr size_t kPiece = kControlPayloadBytes / 2 / sizeof(int32_t);
  for (size_t i = 0; i < blocks.size(); i += kPiece) {
    const auto piece = blocks.subspan(i, std::min(kPiece, blocks.size() - i));
    make_room(sizeof(BlockWrite) + piece.size_bytes());
    staged_.write_blocks(0, row, start + static_cast<int32_t>(i), piece);
  }
}

void ModelRunner::stage_stop_ids(int32_t offset, std::span<const int32_t> ids) {
  constexpr size_t kPiece = kControlPayloadBytes / 2 / sizeof(int32_t);
  for (size_t i = 0; i < ids.size(); i += kPiece) {
    const auto piece = ids.subspan(i, std::min(kPiece, ids.size() - i));
    make_room(sizeof(StopWrite) + piece.size_bytes());
    staged_.write_stop_ids(offset + static_cast<int32_t>(i), piece);
  }
}

// --- the step ----------------------------------------------------------------------------------

int32_t ModelRunner::checked_tokens(const BatchItem& item, const HostRow& row) const {
  const char* where = "execute";
  const int32_t left = row.prefill_target - row.num_launched;
  if (left > 0) {
    check(item.num_tokens >= 1 && item.num_tokens <= left, where, "row ", item.row, " takes 1 to ",
          left, " prefill tokens, not ", item.num_tokens);
  } else {
    check(item.num_tokens == 1, where, "row ", item.row, " decodes 1 token a step, not ",
          item.num_tokens);
    check(row.num_launched < row.max_total_len - 1, where, "row ", item.row,
          " has reached its length of ", row.max_total_len, " tokens");
  }
  const auto blocks = static_cast<int32_t>(row.blocks.size());
  check(row.num_launched + item.num_tokens <= blocks * config_.block_size, where, "row ", item.row,
        " needs ",
        (row.num_launched + item.num_tokens + config_.block_size - 1) / config_.block_size,
        " blocks for this step, has ", blocks);
  return item.num_tokens;
}

uint64_t ModelRunner::execute(std::span<const BatchItem> batch) {
  const auto start = std::chrono::steady_clock::now();
  waited_ns_ = 0;
  check(batch.size() <= static_cast<size_t>(config_.max_num_seqs), "execute", "a batch holds ",
        config_.max_num_seqs, " rows, not ", batch.size());
  int64_t tokens = 0;
  int32_t samples = 0;
  entries_.clear();
  ++batch_mark_;
  for (const BatchItem& item : batch) {
    HostRow& row = checked_row({item.row, item.generation}, "execute");
    check(row.batch_mark != batch_mark_, "execute", "row ", item.row, " is in the batch twice");
    row.batch_mark = batch_mark_;
    tokens += checked_tokens(item, row);
    const bool draws = row.num_launched + item.num_tokens >= row.prefill_target;
    samples += draws;
    entries_.push_back({item.row, row.generation, item.num_tokens, draws});
  }
  check(tokens <= config_.max_num_batched_tokens, "execute", "the batch has ", tokens,
        " tokens, max_num_batched_tokens is ", config_.max_num_batched_tokens);
  StepShape shape;
  if (!batch.empty()) {
    const StepSizes exact{static_cast<int32_t>(batch.size()), static_cast<int32_t>(tokens),
                          samples};
    shape = ladder_.choose(entries_, exact);
    // Until there are graphs, the same kernels are launched one by one.
    if (!captured_) shape.mode = StepMode::kEager;
    if (shape.mode == StepMode::kEager) {
      StepSizes& sizes = shape.sizes;
      sizes.num_requests = std::max(sizes.num_requests, config_.pad_requests);
      sizes.num_tokens = std::max(sizes.num_tokens, config_.pad_tokens);
      sizes.num_logits = std::max(sizes.num_logits, config_.pad_requests);
    }
  }
  const uint64_t step = submit(entries_, shape);
  slot_of(step).delivered = false;
  for (const BatchItem& item : batch) {
    rows_[item.row].num_launched += item.num_tokens;
    rows_[item.row].last_step = step;
  }
  if (!batch.empty()) {
    newest_sizes_ = shape.sizes;
    newest_entries_ = static_cast<int32_t>(batch.size());
    newest_batch_step_ = step;
    ++stats_.batches;
    ++stats_.steps_by_mode[static_cast<int>(shape.mode)];
  }
  stats_.host_ns += nanoseconds_since(start) - waited_ns_;
  return step;
}

uint64_t ModelRunner::submit(std::span<const BatchEntry> entries, const StepShape& shape) {
  Slot& slot = slot_of(next_step_);
  if (slot.step != 0) {
    const auto start = std::chrono::steady_clock::now();
    wait(slot);
    waited_ns_ += nanoseconds_since(start);
    if (!slot.delivered) keep_output(slot);
  }
  const uint64_t step = next_step_++;
  staged_.write(slot.control, step, entries, shape.sizes.num_requests, shape.sizes.num_tokens,
                shape.sizes.num_logits);
  slot.step = step;
  slot.shape = shape;
  slot.delivered = true;  // execute() asks for delivery; changes alone have nothing to say
  slot.error.clear();
  slot.injected.clear();
  if (!entries.empty()) slot.injected.swap(injected_failure_);
  ++stats_.steps;
  stats_.control_bytes += slot.control->bytes;
  stats_.output_bytes += kOutputHeaderBytes + entries.size() * sizeof(OutputEntry);
  device_->submit(&ModelRunner::run_step, &slot);
  return step;
}

void ModelRunner::run_step(void* arg) {
  Slot& slot = *static_cast<Slot*>(arg);
  ModelRunner& runner = *slot.runner;
  try {
    if (!runner.failed_copy_.empty()) {
      fail(ErrorKind::kDevice, "copy_blocks", std::exchange(runner.failed_copy_, {}));
    }
    if (slot.injected.empty()) {
      runner.step_->run(slot.shape);
    } else {
      runner.step_->run_and_fail(slot.shape, slot.injected);
    }
  } catch (const std::exception& error) {
    runner.fail_step(slot, error.what());
  }
}

// Ends a step that could not be launched as a whole, so that the next one finds the rings in order.
void ModelRunner::fail_step(Slot& slot, const char* what) noexcept {
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
  CaptureReport report;
  if (config_.graph_mode == StepMode::kEager) return report;
  const size_t free_before = device_->memory().free_bytes;
  captured_ = false;
  device_->synchronize();  // a step in flight may be one of them
  step_->drop_graphs();
  const std::vector<CaptureSize>& full = ladder_.full();
  if (config_.graph_mode == StepMode::kFull) {
    for (size_t i = full.size(); i-- > 0;) {
      const StepSizes sizes{full[i].requests, full[i].tokens(), full[i].requests};
      warm_up({StepMode::kEager, -1, true, sizes});
      run_on_stream(*device_, [&] { step_->capture_full(i, full[i]); });
      ++report.full_graphs;
    }
  }
  const std::vector<int32_t>& tokens = ladder_.piecewise();
  for (size_t i = tokens.size(); i-- > 0;) {
    warm_up({StepMode::kEager, -1, false, {1, tokens[i], 1}});
    run_on_stream(*device_, [&] { step_->capture_pieces(i, tokens[i]); });
    ++report.piecewise_graphs;
  }
  captured_ = true;
  report.bytes =
      static_cast<int64_t>(free_before) - static_cast<int64_t>(device_->memory().free_bytes);
  return report;
}

RunnerStats ModelRunner::stats() const {
  RunnerStats stats = stats_;
  stats.device = device_->counters();
  return stats;
}

// --- results -----------------------------------------------------------------------------------

void ModelRunner::wait(const Slot& slot) const {
  device_->wait_sequence(slot.output->sequence, slot.step + 1);
}

void ModelRunner::read_output(const Slot& slot, StepOutput& output) {
  output.step = slot.step;
  output.error = slot.error;
  output.mode = slot.shape.mode;
  output.begin_ns = slot.output->begin_ns;
  output.end_ns = slot.output->end_ns;
  const OutputEntry* entries = output_entries(slot.output);
  output.entries.assign(entries, entries + slot.output->num_entries);
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
  } catch (const Error&) {
    // result() waits again, and says so.
  }
}

void ModelRunner::discard(uint64_t step) {
  kept_.erase(step);
  if (Slot& slot = slot_of(step); slot.step == step) slot.delivered = true;
}

bool ModelRunner::ready(uint64_t step) const {
  check(step > 0 && step < next_step_, "ready", "step ", step, " was never launched");
  const Slot& slot = slots_[step % kSlots];
  return slot.step != step ||
         slot.output->sequence.load(std::memory_order_acquire) >= slot.step + 1;
}

uint64_t ModelRunner::retired_step() const {
  // Steps retire in order, so the newest finished slot tells.
  // A slot is taken again only when its step has finished, whatever the newer ones do.
  uint64_t retired = next_step_ > kSlots ? next_step_ - 1 - kSlots : 0;
  for (const Slot& slot : slots_) {
    if (slot.step != 0 && ready(slot.step)) retired = std::max(retired, slot.step);
  }
  return retired;
}

void ModelRunner::wait_newest() const {
  check(newest_batch_step_ != 0, "runner", "no step has been executed");
  device_->synchronize();
}

std::vector<int32_t> ModelRunner::read_ints(const int32_t* data, int64_t count) {
  std::vector<int32_t> values(static_cast<size_t>(count));
  device_->copy_out(values.data(), data, values.size() * sizeof(int32_t));
  return values;
}

const float* ModelRunner::device_logits(int32_t item) {
  wait_newest();
  check(item >= 0 && item < newest_entries_, "logits", "item ", item, " is outside [0, ",
        newest_entries_, ")");
  const int32_t batch = read_ints(ctx_.infer.entry_batch, newest_entries_)[item];
  const std::vector<int32_t> rows = read_ints(ctx_.infer.logits_batch, newest_sizes_.num_logits);
  const auto it = std::find(rows.begin(), rows.end(), batch);
  if (it == rows.end()) return nullptr;
  const auto* base = static_cast<const float*>(executable_->value(program_.logits_value()));
  return base + (it - rows.begin()) * int64_t{ctx_.rows.vocab_size};
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
  add("logits_indices", infer.logits_indices, sizes.num_logits);
  add("logits_batch", infer.logits_batch, sizes.num_logits);
  add("entry_batch", infer.entry_batch, newest_entries_);
  add("sampled", infer.sampled, sizes.num_requests);
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
    add("slot_mapping_dec", view.slot_mapping_dec, rows);
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
