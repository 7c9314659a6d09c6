// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "runner/stage_probe.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "core/error.h"
#include "dist/probe_support.h"
#include "dist/stage_link.h"
#include "ops/kernels.h"

namespace mrv1 {
namespace {

constexpr std::string_view kWhere = "stage_probe";
// Between two looks whether the group has ended.
constexpr std::chrono::milliseconds kLook{20};
// Room for the header of a record and for arrays that begin at aligned places.
constexpr int64_t kRecordBytes = 512;
// Deviations of the model's numbers: the token, more than the layers, says which one comes next.
constexpr float kTable = 3.0f, kShift = 0.5f;

bool is_folded(const StageProbe::Options& options, size_t value) {
  const StageProbe::Value& of = options.values[value];
  return of.dtype == DType::kF32 && of.cols == options.vocab_size;
}

StageProbe::Options checked(const StageProbe::Options& options, size_t num_devices) {
  const auto positive = [](int64_t value, const char* name) {
    check(value > 0 && value <= 1 << 20, kWhere, name, " is ", value, "; must be in [1, 2^20]");
  };
  positive(options.num_stages, "num_stages");
  positive(options.vocab_size, "vocab_size");
  positive(options.num_rows, "num_rows");
  positive(options.max_tokens, "max_tokens");
  positive(options.max_model_len, "max_model_len");
  positive(options.num_slots, "num_slots");
  check(options.num_layers >= options.num_stages, kWhere, "num_layers is ", options.num_layers,
        "; each of the ", options.num_stages, " stages needs one");
  check(options.num_drafts >= 0 && options.num_drafts <= kMaxSpeculativeTokens, kWhere,
        "num_drafts is ", options.num_drafts, "; must be in [0, ", kMaxSpeculativeTokens, "]");
  check(num_devices > 0 && num_devices % static_cast<size_t>(options.num_stages) == 0, kWhere,
        num_devices, " devices do not make ", options.num_stages, " stages");
  check(!options.values.empty() && options.values.size() <= kMaxStageValues, kWhere, "there are ",
        options.values.size(), " values; must be 1 to ", kMaxStageValues);
  for (const StageProbe::Value& value : options.values) positive(value.cols, "cols");
  check(is_folded(options, 0), kWhere, "the first value must be float32 and have ",
        options.vocab_size, " columns");
  return options;
}

}  // namespace

StageProbe::StageProbe(std::vector<std::shared_ptr<Device>> devices, GroupOptions group,
                       const Options& options, uint64_t seed)
    : options_(checked(options, devices.size())), seed_(seed) {
  group.num_stages = options_.num_stages;
  std::vector<std::unique_ptr<Communicator>> communicators = make_group(devices, group);
  control_bytes_ = kRecordBytes +
                   options_.num_rows * (int64_t{sizeof(FreeRow)} + int64_t{sizeof(NewRow)} +
                                        int64_t{sizeof(TokenWrite)} + int64_t{sizeof(BatchEntry)} +
                                        options_.max_model_len * int64_t{sizeof(int32_t)});
  control_bytes_ = (control_bytes_ + kLogprobAlignment - 1) / kLogprobAlignment * kLogprobAlignment;
  output_bytes_ = output_tokens_end(options_.num_rows, options_.num_drafts);
  for (size_t i = 0; i < devices.size(); ++i) {
    Rank& rank = *ranks_.emplace_back(std::make_unique<Rank>());
    rank.device = std::move(devices[i]);
    rank.communicator = std::move(communicators[i]);
    rank.random.seed(seed + i);
    make_rank(rank);
  }
  link_ranks();
  if (!options_.graphs) return;
  // Once before, as a step does: what is made at a first launch cannot be captured.
  warms_up_ = true;
  const ProbeStep empty;
  const StepSizes sizes = sizes_of(empty);
  run({&empty, 1});
  warms_up_ = false;
  run_ranks(size(), -1, [&](int i) {
    Rank& rank = *ranks_[i];
    run_on_stream(*rank.device, [&] {
      rank.graph = rank.device->capture([this, &rank, sizes] { launch_step(rank, sizes); });
    });
  });
}

// --- what ranks have ---------------------------------------------------------------------------

StageProbe::Rank& StageProbe::rank_at(int rank) const {
  check(rank >= 0 && rank < size(), kWhere, "there is no rank ", rank);
  return *ranks_[static_cast<size_t>(rank)];
}

const StageProbe::Value& StageProbe::value_at(int32_t value) const {
  check(value >= 0 && static_cast<size_t>(value) < options_.values.size(), kWhere,
        "there is no value ", value);
  return options_.values[static_cast<size_t>(value)];
}

std::vector<float> StageProbe::numbers(int64_t count, uint64_t kind, DType dtype,
                                       float deviation) const {
  std::mt19937_64 random(seed_ * 1000003 + kind);
  std::vector<float> values(static_cast<size_t>(count));
  std::normal_distribution<float> normal(0.0f, deviation);
  for (float& value : values) value = normal(random);
  return loaded_values(stored_values(values, dtype), dtype);
}

std::vector<float> StageProbe::table(int32_t value) const {
  const Value& of = value_at(value);
  return numbers(options_.vocab_size * of.cols, static_cast<uint64_t>(value), of.dtype, kTable);
}

std::vector<float> StageProbe::shift(int32_t layer, int32_t value) const {
  check(layer >= 0 && layer < options_.num_layers, kWhere, "there is no layer ", layer);
  const Value& of = value_at(value);
  return numbers(of.cols, static_cast<uint64_t>(100 + layer * kMaxStageValues + value), of.dtype,
                 kShift);
}

template <typename T>
T* StageProbe::allocate(Rank& rank, int64_t count, const char* what) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(T);
  rank.buffers.push_back(rank.device->allocate(bytes, what));
  const std::vector<char> zeros(bytes);
  rank.device->copy_in(rank.buffers.back().data(), zeros.data(), bytes);
  return static_cast<T*>(rank.buffers.back().data());
}

void* StageProbe::put(Rank& rank, const std::vector<float>& values, DType dtype) {
  const std::vector<char> bytes = stored_values(values, dtype);
  rank.buffers.push_back(rank.device->allocate(bytes.size(), "numbers"));
  rank.device->copy_in(rank.buffers.back().data(), bytes.data(), bytes.size());
  return rank.buffers.back().data();
}

void StageProbe::make_rank(Rank& rank) {
  const int64_t rows = options_.num_rows, tokens = options_.max_tokens;
  const int64_t logits = rows * (1 + options_.num_drafts);
  const Communicator& group = *rank.communicator;
  StepContext& ctx = rank.ctx;
  ctx.device = rank.device.get();
  ctx.stream = rank.device->stream();
  ctx.pool = rank.device->pool();
  ctx.communicator = rank.communicator.get();

  RowState& state = ctx.rows;
  state.num_rows = options_.num_rows;
  state.num_groups = 1;  // without blocks: nothing is cached
  state.block_size = state.max_model_len = options_.max_model_len;
  state.max_blocks = 1;
  state.vocab_size = options_.vocab_size;
  state.rows = allocate<Row>(rank, rows, "rows");
  state.sampling = allocate<SamplingRow>(rank, rows, "sampling rows");
  state.tokens = allocate<int32_t>(rank, rows * options_.max_model_len, "token history");
  state.block_table = allocate<int32_t>(rank, rows, "block table");
  state.max_drafts = options_.num_drafts;
  state.max_logprobs = -1;
  state.ngram = {1, 3};

  InferParams& infer = ctx.infer;
  infer.max_requests = options_.num_rows;
  infer.max_tokens = options_.max_tokens;
  infer.max_logits = static_cast<int32_t>(logits);
  infer.counts = allocate<InferCounts>(rank, 1, "infer params");
  for (int32_t** array : {&infer.row, &infer.query_start_loc, &infer.seq_lens, &infer.entry_batch,
                          &infer.logits_start}) {
    *array = allocate<int32_t>(rank, rows + 1, "infer params");
  }
  for (int32_t** array :
       {&infer.token_batch, &infer.token_ids, &infer.positions, &infer.slot_mapping}) {
    *array = allocate<int32_t>(rank, tokens, "infer params");
  }
  for (int32_t** array : {&infer.logits_indices, &infer.logits_batch, &infer.logits_place,
                          &infer.logits_entry, &infer.sampled}) {
    *array = allocate<int32_t>(rank, logits, "infer params");
  }

  StepRings& rings = ctx.rings;
  rings.num_slots = options_.num_slots;
  rings.control_bytes = control_bytes_;
  rings.output_bytes = output_bytes_;
  const auto ring = [&](int64_t slot_bytes, const char* what, char** host) {
    const auto bytes = static_cast<size_t>(slot_bytes * options_.num_slots);
    rank.buffers.push_back(rank.device->allocate_mapped(bytes, what));
    *host = static_cast<char*>(rank.buffers.back().host());
    std::memset(*host, 0, bytes);
    return static_cast<char*>(rank.buffers.back().data());
  };
  rings.control = ring(control_bytes_, "control ring", &rank.control);
  rings.output = ring(output_bytes_, "output ring", &rank.host_output);
  rings.step = allocate<uint64_t>(rank, 1, "step counter");
  rank.device->copy_in(rings.step, &next_step_, sizeof(next_step_));
  if (rank.device->type() == DeviceType::kCuda) {
    rings.staged =
        allocate<char>(rank, kRecordBytes + rows * int64_t{sizeof(BatchEntry)}, "staged");
  }
  if (!group.is_last_stage()) {
    rank.stage_outputs =
        allocate<char>(rank, output_bytes_ * options_.num_slots, "outputs of the last stage");
  }

  const int32_t layers = options_.num_layers, stages = options_.num_stages;
  for (size_t value = 0; value < options_.values.size(); ++value) {
    const auto& [cols, dtype] = options_.values[value];
    const auto number = static_cast<int32_t>(value);
    const std::vector<float> none(static_cast<size_t>(tokens * cols));
    rank.values.push_back(put(rank, none, dtype));
    if (group.stage() == 0) rank.tables.push_back(put(rank, table(number), dtype));
    if (group.stage() > 0) rank.received.push_back(put(rank, none, dtype));
    size_t i = 0;
    for (int32_t layer = group.stage() * layers / stages;
         layer < (group.stage() + 1) * layers / stages; ++layer) {
      const std::vector<float> row = shift(layer, number);
      std::vector<float> all;
      for (int64_t token = 0; token < tokens; ++token) {
        all.insert(all.end(), row.begin(), row.end());
      }
      if (rank.shifts.size() <= i) rank.shifts.emplace_back();
      rank.shifts[i++].push_back(put(rank, all, dtype));
    }
  }
  rank.logits = allocate<float>(rank, logits * options_.vocab_size, "logits");
  WorkspaceLimits limits{};
  limits.vocab_size = options_.vocab_size;
  limits.max_tokens = tokens;
  limits.max_logits = logits;
  limits.num_threads = ctx.pool != nullptr ? ctx.pool->num_threads() : 1;
  ctx.workspace_bytes = static_cast<size_t>(rank.device->kernels().workspace_bytes(limits));
  ctx.workspace = allocate<char>(rank, static_cast<int64_t>(ctx.workspace_bytes) + 1, "workspace");
}

void StageProbe::link_ranks() {
  std::vector<Communicator*> group;
  std::vector<StageBuffers> buffers;
  for (const std::unique_ptr<Rank>& rank : ranks_) {
    group.push_back(rank->communicator.get());
    StageBuffers& own = buffers.emplace_back();
    for (size_t value = 0; value < options_.values.size(); ++value) {
      const StageValue schema{concat("x", value), options_.values[value].cols,
                              options_.values[value].dtype};
      if (!rank->communicator->is_last_stage()) own.sends.push_back(schema);
      if (rank->communicator->stage() > 0) own.receives.push_back(schema);
    }
    own.received = rank->received;
    own.outputs = rank->stage_outputs;
    own.outputs_bytes = output_bytes_;
    own.num_slots = options_.num_slots;
  }
  link_stages(group, buffers);
}

// --- steps -------------------------------------------------------------------------------------

void StageProbe::check_step(const ProbeStep& step, uint64_t number) const {
  check(step.adopt_through < number, kWhere, "step ", number, " adopts those up to ",
        step.adopt_through, "; must be older ones");
  std::set<int32_t> rows;
  int64_t tokens = 0;
  const auto is_row = [&](int32_t row) { return row >= 0 && row < options_.num_rows; };
  for (const FreeRow& freed : step.freed) {
    check(is_row(freed.row), kWhere, "there is no row ", freed.row);
  }
  for (const NewProbeRow& added : step.added) {
    const auto length = static_cast<int32_t>(added.tokens.size());
    check(is_row(added.row), kWhere, "there is no row ", added.row);
    check(length > 0 && length < added.max_total_len &&
              added.max_total_len + options_.num_drafts <= options_.max_model_len,
          kWhere, "row ", added.row, " has ", length, " tokens and at most ", added.max_total_len);
    check(added.num_drafts >= 0 && added.num_drafts <= options_.num_drafts, kWhere, "row ",
          added.row, " takes ", added.num_drafts, " drafts; must be in [0, ", options_.num_drafts,
          "]");
    for (const int32_t token : added.tokens) {
      check(token >= 0 && token < options_.vocab_size, kWhere, "token ", token,
            " is outside of the vocabulary");
    }
  }
  for (const BatchEntry& entry : step.entries) {
    check(is_row(entry.row) && rows.insert(entry.row).second, kWhere, "row ", entry.row,
          " is twice in step ", number, ", or nowhere");
    check(entry.num_tokens > 0 && entry.samples >= 0 && entry.samples <= 1 + options_.num_drafts &&
              entry.samples <= entry.num_tokens,
          kWhere, "row ", entry.row, " cannot have ", entry.num_tokens, " tokens and ",
          entry.samples, " samples");
    tokens += entry.num_tokens;
  }
  check(tokens <= options_.max_tokens, kWhere, "step ", number, " has ", tokens,
        " tokens; at most ", options_.max_tokens);
}

std::vector<StageProbe::ProbeStep> StageProbe::random_steps(int32_t count, uint64_t seed) const {
  struct Life {
    bool active = false;
    int32_t generation = 0, prompt_len = 0, num_drafts = 0, length = 0;
    int32_t num_computed = 0;  // of the prompt
    int32_t num_draws = 0;     // steps that have drawn for it
    uint64_t last_draw = 0;
  };
  std::mt19937_64 random(seed);
  const auto draw = [&](int64_t first, int64_t last) {
    return static_cast<int32_t>(std::uniform_int_distribution<int64_t>(first, last)(random));
  };
  std::vector<Life> lives(static_cast<size_t>(options_.num_rows));
  std::vector<ProbeStep> steps(static_cast<size_t>(count));
  for (size_t i = 0; i < steps.size(); ++i) {
    ProbeStep& step = steps[i];
    const uint64_t number = next_step_ + i;
    const bool is_last = i + 1 == steps.size();
    uint64_t needs = number > static_cast<uint64_t>(options_.num_slots)
                         ? number + 1 - static_cast<uint64_t>(options_.num_slots)
                         : 0;
    int32_t room = is_last || draw(0, 9) == 0 ? 0 : options_.max_tokens;
    for (int32_t row = 0; row < options_.num_rows; ++row) {
      Life& life = lives[static_cast<size_t>(row)];
      const bool is_over = life.prompt_len + life.num_draws > life.length + 2;
      if (life.active && !is_last && (is_over || draw(0, 29) == 0)) {
        step.freed.push_back({row, life.generation});
        life.active = false;
      }
      if (!life.active && !is_last && draw(0, 2) == 0) {
        const int32_t generation = life.generation + 1;
        life = Life{.active = true, .generation = generation};
        life.length = draw(2, options_.max_model_len - options_.num_drafts);
        life.prompt_len = draw(1, std::min(life.length - 1, 12));
        life.num_drafts = draw(0, options_.num_drafts);
        NewProbeRow& added =
            step.added.emplace_back(NewProbeRow{row, generation, {}, life.length, life.num_drafts});
        for (int32_t j = 0; j < life.prompt_len; ++j) {
          added.tokens.push_back(draw(0, options_.vocab_size - 1));
        }
      }
      if (!life.active || room == 0 || draw(0, 1) == 0) continue;
      BatchEntry entry{row, life.generation, 1 + life.num_drafts, 1 + life.num_drafts};
      if (life.num_computed < life.prompt_len) {
        entry.num_tokens = draw(1, std::min(life.prompt_len - life.num_computed, room));
        entry.samples = life.num_computed + entry.num_tokens == life.prompt_len ? 1 : 0;
      }
      if (entry.num_tokens > room) continue;
      if (life.num_computed < life.prompt_len) life.num_computed += entry.num_tokens;
      room -= entry.num_tokens;
      life.num_draws += entry.samples > 0 ? 1 : 0;
      needs = std::max(needs, life.last_draw);
      if (entry.samples > 0) life.last_draw = number;
      step.entries.push_back(entry);
    }
    std::shuffle(step.entries.begin(), step.entries.end(), random);
    step.adopt_through = needs;
    if (draw(0, 9) == 0) {
      step.adopt_through = static_cast<uint64_t>(
          draw(static_cast<int64_t>(needs), static_cast<int64_t>(number) - 1));
    }
    if (is_last) step.adopt_through = number - 1;
  }
  return steps;
}

StepSizes StageProbe::sizes_of(const ProbeStep& step) const {
  if (warms_up_ || (options_.graphs && !step.entries.empty())) {
    return {options_.num_rows, options_.max_tokens, options_.num_rows * (1 + options_.num_drafts),
            options_.num_drafts > 0};
  }
  StepSizes sizes;
  for (const BatchEntry& entry : step.entries) {
    sizes.num_requests += 1;
    sizes.num_tokens += entry.num_tokens;
    sizes.num_logits += entry.samples;
  }
  sizes.num_logits = std::max(sizes.num_logits, sizes.num_requests > 0 ? 1 : 0);
  sizes.speculates = sizes.num_requests > 0 && options_.num_drafts > 0;
  return sizes;
}

void StageProbe::run(std::span<const ProbeStep> steps, int absent, uint64_t from) {
  const uint64_t first = next_step_;
  for (size_t i = 0; i < steps.size(); ++i) check_step(steps[i], first + i);
  ranks_[0]->communicator->check_alive();
  const uint64_t left = std::clamp(from, first, first + steps.size()) - first;
  run_ranks(size(), -1, [&](int i) {
    run_rank(*ranks_[i], i == absent ? steps.first(static_cast<size_t>(left)) : steps);
  });
  next_step_ = first + steps.size();
  ranks_[0]->communicator->check_alive();
}

// Takes in what a step has written; false if the group has ended before.
bool StageProbe::collect(Rank& rank, uint64_t step) {
  auto* slot = reinterpret_cast<OutputHeader*>(
      rank.host_output + static_cast<int64_t>(step % options_.num_slots) * output_bytes_);
  const auto is_written = [&] {
    return rank.device->wait_sequence_until(slot->sequence, step + 1,
                                            std::chrono::steady_clock::now() + kLook);
  };
  try {
    while (!is_written()) {
      if (rank.communicator->is_aborted()) return false;
    }
  } catch (const Error&) {
    // Steps that the group's end has kept from being launched never write it.
    if (rank.communicator->is_aborted()) return false;
    throw;
  }
  const OutputEntry* entries = output_entries(slot);
  const int32_t* tokens = output_tokens(slot, options_.num_rows);
  Output& output = rank.outputs.emplace_back();
  output.step = slot->step;
  output.waited_ns = slot->waited_ns;
  output.entries.assign(entries, entries + slot->num_entries);
  for (const OutputEntry& entry : output.entries) {
    for (int32_t place = 0; place <= options_.num_drafts; ++place) {
      output.tokens.push_back(place < entry.num_tokens ? tokens[place] : kNoToken);
    }
    tokens += 1 + options_.num_drafts;
  }
  return true;
}

void StageProbe::run_rank(Rank& rank, std::span<const ProbeStep> steps) {
  const auto num_slots = static_cast<uint64_t>(options_.num_slots);
  uint64_t collected = next_step_;
  rank.outputs.clear();
  rank.tasks.clear();
  rank.tasks.reserve(steps.size());  // the stream has their addresses
  for (uint64_t step = next_step_; step < next_step_ + steps.size(); ++step) {
    const ProbeStep& spec = steps[step - next_step_];
    if (step >= collected + num_slots && !collect(rank, collected++)) break;
    for (const FreeRow& freed : spec.freed) rank.writer.free_row(freed);
    for (const NewProbeRow& added : spec.added) {
      const auto length = static_cast<int32_t>(added.tokens.size());
      NewRow row{};
      row.row = added.row;
      row.state.generation = added.generation;
      row.state.phase = RowPhase::kPrefill;
      row.state.prompt_len = row.state.prefill_target = row.state.total_len = length;
      row.state.last_token = -1;
      row.state.max_total_len = added.max_total_len;
      row.state.adapter = -1;
      row.sampling.num_speculative_tokens = added.num_drafts;
      rank.writer.new_row(row);
      rank.writer.write_tokens(added.row, 0, added.tokens);
    }
    check_internal(
        rank.writer.record_bytes(spec.entries.size()) <= static_cast<size_t>(control_bytes_),
        kWhere, "a record is too long");
    auto* record = reinterpret_cast<ControlHeader*>(
        rank.control + static_cast<int64_t>(step % num_slots) * control_bytes_);
    const StepSizes sizes = sizes_of(spec);
    rank.writer.write(record, step, spec.adopt_through, spec.entries, sizes.num_requests,
                      sizes.num_tokens, sizes.num_logits);
    rank.tasks.push_back({this, &rank, sizes});
    rank.device->submit(&StageProbe::run_task, &rank.tasks.back());
  }
  while (collected < next_step_ + rank.tasks.size() && collect(rank, collected)) ++collected;
  rank.device->synchronize();
}

void StageProbe::run_task(void* arg) {
  const Task& task = *static_cast<Task*>(arg);
  Rank& rank = *task.rank;
  if (rank.communicator->is_aborted()) return;
  try {
    if (rank.graph != nullptr && task.sizes.num_requests > 0) {
      rank.device->launch(*rank.graph);
    } else {
      task.probe->launch_step(rank, task.sizes);
    }
  } catch (const std::exception& error) {
    rank.communicator->abort(error.what());
  }
}

void StageProbe::launch_step(Rank& rank, const StepSizes& sizes) const {
  const Kernels& kernels = rank.device->kernels();
  StepContext ctx = rank.ctx;
  ctx.sizes = sizes;
  const int slow = options_.slow_rank;
  const std::chrono::nanoseconds most = options_.delay;
  const bool dawdles = most.count() > 0 && (slow < 0 || slow == rank.communicator->global_rank());
  const std::function<void()> dawdle = [&] {
    if (!dawdles) return;
    hold_stream(*rank.device, std::chrono::nanoseconds(std::uniform_int_distribution<int64_t>(
                                  0, most.count())(rank.random)));
  };
  dawdle();
  if (!rank.communicator->is_last_stage()) kernels.adopt(ctx);
  kernels.apply(ctx);
  if (sizes.num_requests > 0) {
    if (sizes.speculates) kernels.propose(ctx);
    kernels.infer_params(ctx);
    launch_model(rank, ctx, dawdle);
  }
  dawdle();
  kernels.advance(ctx);
}

void StageProbe::launch_model(Rank& rank, const StepContext& ctx,
                              const std::function<void()>& dawdle) const {
  const Kernels& kernels = rank.device->kernels();
  const Communicator& group = *rank.communicator;
  const bool is_first = group.stage() == 0;
  const size_t count = options_.values.size();
  if (is_first) {
    for (size_t value = 0; value < count; ++value) {
      const auto& [cols, dtype] = options_.values[value];
      const WeightView table{rank.tables[value], dtype, WeightLayout::kRowMajor,
                             options_.vocab_size, cols};
      kernels.embedding({table, rank.values[value], dtype, 1.0f, 0}, ctx);
    }
  } else {
    kernels.stage_receive(ctx);
    dawdle();
  }
  for (size_t layer = 0; layer < rank.shifts.size(); ++layer) {
    for (size_t value = 0; value < count; ++value) {
      const auto& [cols, dtype] = options_.values[value];
      const bool crosses = !is_first && layer == 0;
      kernels.add({crosses ? rank.received[value] : rank.values[value], rank.shifts[layer][value],
                   rank.values[value], cols, dtype},
                  ctx);
    }
    if (!is_first && layer == 0) kernels.stage_release(ctx);
  }
  if (!group.is_last_stage()) {
    StageSendParams params{};
    params.num_values = static_cast<int32_t>(count);
    for (size_t value = 0; value < count; ++value) {
      const auto& [cols, dtype] = options_.values[value];
      params.values[value] = rank.values[value];
      params.row_bytes[value] = cols * static_cast<int64_t>(dtype_size(dtype));
    }
    dawdle();
    kernels.stage_send(params, ctx);
    return;
  }
  const int64_t vocab = options_.vocab_size;
  for (size_t value = 1; value < count; ++value) {
    if (!is_folded(options_, value)) continue;
    kernels.add({rank.values[0], rank.values[value], rank.values[0], vocab, DType::kF32}, ctx);
  }
  kernels.gather_rows({rank.values[0], rank.logits, vocab, DType::kF32}, ctx);
  kernels.sample({rank.logits, vocab}, ctx);
}

// --- what came of it ---------------------------------------------------------------------------

StageProbe::RowView StageProbe::row(int rank, int32_t row) {
  Rank& of = rank_at(rank);
  check(row >= 0 && row < options_.num_rows, kWhere, "there is no row ", row);
  RowView view;
  of.device->copy_out(&view.row, of.ctx.rows.rows + row, sizeof(Row));
  view.tokens.resize(static_cast<size_t>(view.row.total_len));
  of.device->copy_out(view.tokens.data(),
                      of.ctx.rows.tokens + int64_t{row} * options_.max_model_len,
                      view.tokens.size() * sizeof(int32_t));
  return view;
}

std::vector<float> StageProbe::received(int rank, int32_t value) {
  Rank& of = rank_at(rank);
  const auto& [cols, dtype] = value_at(value);
  check(!of.received.empty(), kWhere, "rank ", rank, " takes no values");
  std::vector<char> bytes(static_cast<size_t>(options_.max_tokens * cols) * dtype_size(dtype));
  of.device->copy_out(bytes.data(), of.received[static_cast<size_t>(value)], bytes.size());
  return loaded_values(bytes, dtype);
}

}  // namespace mrv1
