// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// What a runner does as one of several ranks.
#include <algorithm>
#include <chrono>
#include <new>
#include <thread>
#include <utility>

#include "core/error.h"
#include "core/side_stream.h"
#include "runner/data_ranks.h"
#include "runner/model_runner.h"
#include "runner/rank_followers.h"

namespace mrv1 {
namespace {

// Between two looks whether the ranks have ended, and how long a rank may take to come back then.
constexpr std::chrono::milliseconds kRankLook{50};
constexpr std::chrono::seconds kRankGrace{1};

}  // namespace

GroupOptions group_options(const Program& program, const RunnerConfig& config) {
  const PlanLimits limits = ModelRunner::plan_limits(config);
  GroupOptions options;
  options.num_stages = config.num_stages;
  options.timeout = config.rank_timeout;
  options.kernels = config.collectives;
  options.nccl = config.nccl;
  for (const Op& op : program.ops()) {
    if (op.kind == OpKind::kMoeDispatch) {
      const int64_t halves = TwoBatch::applies(program, config) ? 2 : 0;
      options.choices = (limits.max_tokens + halves * TwoBatch::max_tokens(config)) *
                        program.values()[op.inputs[1]].cols;
    }
    if (op.kind != OpKind::kAllReduce && op.kind != OpKind::kAllGather) continue;
    options.max_bytes =
        std::max(options.max_bytes, value_bytes(program.values()[op.inputs[0]], limits));
  }
  // The logits are gathered on the last stage alone, but all stages have as large groups.
  const int32_t stage_ranks = tensor_ranks(config);
  if (config.num_stages > 1 && stage_ranks > 1) {
    Value logits;
    logits.space = RowSpace::kLogits;
    logits.cols = program.vocab_size() / stage_ranks;
    options.max_bytes = std::max(options.max_bytes, value_bytes(logits, limits));
  }
  return options;
}

void check_sums(const Communicator& group, const Program& program, const RunnerConfig& config) {
  if (group.sums_anything()) return;
  constexpr std::string_view kWhere = "ranks";
  for (const Op& op : program.ops()) {
    if (op.kind != OpKind::kAllReduce) continue;
    if (config.batch_invariant) {
      fail(ErrorKind::kDevice, kWhere, group.note(),
           ", whose sums have an order of their own: batch_invariant = True needs GPUs that reach "
           "each other's memory; must be False");
    }
    if (!op.weights.empty()) {
      fail(ErrorKind::kDevice, kWhere, group.note(), ", which adds no bias to sums: '",
           program.weights()[op.weights[0]].name,
           "' of the model needs GPUs that reach each other's memory");
    }
    const DType from = program.values()[op.inputs[0]].dtype;
    const DType to = program.values()[op.outputs[0]].dtype;
    if (from != to) {
      fail(ErrorKind::kDevice, kWhere, group.note(), ", which keeps the dtype of sums: those of ",
           dtype_name(from), " to ", dtype_name(to), " need GPUs that reach each other's memory");
    }
  }
}

void ModelRunner::lead(std::unique_ptr<RankFollowers> followers) {
  followers_ = std::move(followers);
}

ModelRunner& ModelRunner::rank_runner(int rank) {
  if (rank == global_rank()) return *this;
  check(rank >= 0 && rank < config_.num_ranks && !follows(), "runner", "there is no rank ", rank);
  return data_ranks_ != nullptr ? data_ranks_->runner(rank) : followers_->runner(rank);
}

// A GPU may have to be idle, and with it those that reach its memory, before memory can be had. So
// while a rank allocates no device may wait for a step that another has not launched: the leader
// allocates when all have launched what it has, and launches more when all have allocated.
// Of ranks with requests of their own none may have launched a batch that this one has not; that
// they launch what it has needs nothing of it.
void ModelRunner::begin_allocation() {
  if (followers_ != nullptr) followers_->join();
  check(data_ranks_ == nullptr || !data_ranks_->is_behind(global_rank()), "runner",
        "needs memory of the device while other ranks wait for its next step; launch that first");
}

void ModelRunner::end_allocation() {
  if (followers_ == nullptr) return;
  try {
    followers_->join();
  } catch (const Error&) {
    // The group has ended: execute() says so.
  }
}

std::vector<ExpertBuffers> ModelRunner::expert_buffers() const {
  if (executable_->expert_buffers().x == nullptr) return {};  // ranks send each other nothing
  std::vector<ExpertBuffers> sets{executable_->expert_buffers()};
  for (int half = 0; halves_ != nullptr && half < 2; ++half) {
    sets.push_back(halves_->executable(half).expert_buffers());
  }
  return sets;
}

StageBuffers ModelRunner::stage_buffers() const {
  StageBuffers buffers;
  buffers.sends = program_.sent().schema;
  buffers.receives = program_.received().schema;
  for (const int32_t id : program_.received().ids) {
    buffers.received.push_back(executable_->value(id));
  }
  if (!has_logits()) {
    buffers.outputs = adopted_buffer_.data();
    buffers.outputs_bytes = static_cast<int64_t>(output_slot_bytes_);
    buffers.num_slots = num_slots();
  }
  return buffers;
}

void ModelRunner::fail_next_step(std::string message, int rank) {
  if (rank != kAllRanks && rank != global_rank()) {
    return rank_runner(rank).fail_next_step(std::move(message), rank);
  }
  std::lock_guard lock(side_mutex_);
  injected_failure_ = std::move(message);
  fails_alone_ = rank != kAllRanks || data_ranks_ != nullptr;
}

// What the other ranks are told to fail with as this one does.
std::string ModelRunner::take_injected(std::span<const BatchItem> batch) {
  std::lock_guard lock(side_mutex_);
  if (batch.empty() || fails_alone_) return {};
  return std::exchange(injected_failure_, {});
}

// Where the graphs of whole steps of a size are cut. Ranks with requests of their own have both
// kinds, as whether a step runs in halves does not depend on its own size alone.
std::vector<int32_t> ModelRunner::cuts_of_graphs(const StepSizes& sizes) const {
  if (halves_ == nullptr || sizes.num_tokens < 2) return {0};
  const int32_t cut = halves_->cut_of(sizes.num_tokens, sizes.num_tokens, sizes.speculates);
  if (config_.data_parallel) return {0, cut};
  const StepLoad load{sizes.num_tokens, /*has_prompts=*/false};
  return {runs_in_halves(config_.two_batch, {&load, 1}) ? cut : 0};
}

bool ModelRunner::has_written(uint64_t step) const {
  return slot_of(step).output->sequence.load(std::memory_order_acquire) >= step + 1;
}

void ModelRunner::count_batch(Slot& slot) {
  uint64_t batch = launched_batches_.load(std::memory_order_relaxed);
  if (slot.shape.sizes.num_requests > 0) {
    batch_steps_[++batch % kRememberedBatches].store(slot.step, std::memory_order_relaxed);
    launched_batches_.store(batch, std::memory_order_release);
  }
  slot.batch = batch;
}

bool ModelRunner::has_ended_batch(uint64_t batch) const {
  if (batch == 0) return true;
  return launched_batches() >= batch &&
         has_written(batch_steps_[batch % kRememberedBatches].load(std::memory_order_relaxed));
}

// Whether all other ranks have ended the step, or what corresponds to it.
bool ModelRunner::others_have_ended(const Slot& slot) const {
  if (data_ranks_ != nullptr) return data_ranks_->others_have_ended(global_rank(), slot.batch);
  return followers_ != nullptr && followers_->has_retired(slot.step);
}

// A step failed here that may have gone well elsewhere. In a pipeline others count on what it would
// have given them, even if it failed everywhere.
void ModelRunner::abort_ranks(const Slot& slot, const char* what) noexcept {
  if (communicator_ == nullptr) return;
  const bool all_alike = !slot.injected.empty() && !slot.alone;
  if (all_alike && config_.num_stages == 1) return;
  try {
    communicator_->abort(concat(communicator_->name(), " failed in step ", slot.step, ": ", what));
  } catch (const std::bad_alloc&) {
    communicator_->abort("a rank ran out of host memory");
  }
}

bool ModelRunner::settles(std::chrono::steady_clock::time_point until) {
  if (followers_ != nullptr && !followers_->settles(until)) return false;
  try {
    std::unique_ptr<Fence> fence = device_->make_fence();
    fence->record(nullptr);
    while (!fence->passed()) {
      if (std::chrono::steady_clock::now() > until) {
        fence.release();  // the device may still pass it
        return false;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  } catch (const Error&) {
    // A device that failed has no work left. Those of other ranks may have.
  }
  return true;
}

// A rank that hangs is missed by those who wait for what it sends; one that hangs behind the last
// such place, by whoever reads its results, once the others have ended the step and this one comes
// no further.
void ModelRunner::wait_among_ranks(const Slot& slot) const {
  using Clock = std::chrono::steady_clock;
  constexpr auto kNever = Clock::time_point::max();
  auto too_late = kNever, give_up = kNever;
  uint64_t seen = 0;
  for (;;) {
    const auto now = Clock::now();
    if (device_->wait_sequence_until(slot.output->sequence, slot.step + 1, now + kRankLook)) return;
    if (communicator_->is_aborted()) {
      if (give_up == kNever) give_up = now + kRankGrace;
      if (now > give_up || given_up_) {
        given_up_ = true;  // what comes after a step that does not end does not either
        fail(ErrorKind::kDevice, "ranks", communicator_->name(), " does not end step ", slot.step,
             ": ", communicator_->abort_reason());
      }
    } else if (others_have_ended(slot)) {
      const uint64_t signs = retired_step() + communicator_->signs_of_life();
      if (too_late == kNever || signs != seen) too_late = now + config_.rank_timeout;
      seen = signs;
      if (now > too_late) {
        communicator_->abort(concat(communicator_->name(), " did not end step ", slot.step,
                                    " within ", config_.rank_timeout.count(), " ms of the others"));
      }
    }
  }
}

}  // namespace mrv1
