// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// What steps took, on the devices of all ranks.
#include "runner/model_runner.h"
#include "runner/rank_followers.h"

namespace mrv1 {

void ModelRunner::log_steps(bool on) {
  if (followers_ != nullptr) followers_->join();
  for (int rank = 0; rank < config_.num_ranks; ++rank) {
    ModelRunner& runner = rank_runner(rank);
    runner.log_.stop();
    if (!on) continue;
    const uint64_t newest = runner.next_step_ - 1;
    uint64_t waited_ns = 0;
    if (newest > 0) {
      const Slot& slot = runner.slot_of(newest);
      runner.wait(slot);
      waited_ns = slot.output->waited_ns;
    }
    runner.log_.start(newest + 1, waited_ns);
  }
}

std::vector<StepTime> ModelRunner::take_step_log(int rank) {
  if (followers_ != nullptr) followers_->join();
  ModelRunner& runner = rank_runner(rank);
  const auto slots = static_cast<uint64_t>(runner.slots_.size());
  const uint64_t oldest = runner.next_step_ > slots ? runner.next_step_ - slots : 1;
  for (uint64_t step = oldest; step < runner.next_step_; ++step) {
    const Slot& slot = runner.slot_of(step);
    if (slot.step != step) continue;
    runner.wait(slot);
    runner.log_step(slot);
  }
  return runner.log_.take();
}

// A step that failed has no times.
void ModelRunner::log_step(const Slot& slot) {
  if (!log_.is_on() || slot.output->end_ns == 0) return;
  StepTime time = slot.time;
  time.step = slot.step;
  time.begin_ns = slot.output->begin_ns;
  time.end_ns = slot.output->end_ns;
  time.mode = slot.shape.mode;
  time.cut_token = slot.shape.cut_token;
  log_.add(time, slot.output->waited_ns);
}

}  // namespace mrv1
