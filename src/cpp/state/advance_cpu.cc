// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <atomic>
#include <cstring>

#include "core/clock.h"
#include "dist/cpu_communicator.h"
#include "dist/stage_link.h"
#include "state/output_ring.h"
#include "state/step_context.h"

namespace mrv1 {
namespace {

// Writes the outputs of a step to the stages before the last, each once it has adopted those that
// were in their place.
void publish(OutputHeader& slot, uint64_t step, CpuCommunicator& group, const StepContext& ctx) {
  const StageLink& link = *group.stage_link();
  const auto num_slots = static_cast<uint64_t>(link.num_slots);
  const auto count = static_cast<size_t>(slot.num_entries);
  const int32_t max_requests = ctx.infer.max_requests;
  const auto place_of = [&](int stage) {
    return reinterpret_cast<OutputHeader*>(
        link.stage_outputs[stage] + static_cast<int64_t>(step % num_slots) * link.outputs_bytes);
  };
  for (int stage = 0; stage + 1 < link.num_stages; ++stage) {
    const uint64_t before = step > num_slots ? step - num_slots : 0;
    link.counters->waited_ns +=
        group.wait_for({stage * group.size() + group.rank(), "adopt the outputs of", before}, [&] {
          return std::atomic_ref(link.port->adopted[stage]).load(std::memory_order_acquire) >=
                 before;
        });
    OutputHeader* place = place_of(stage);
    place->step = step;
    place->num_entries = slot.num_entries;
    std::memcpy(output_entries(place), output_entries(&slot), count * sizeof(OutputEntry));
    std::memcpy(output_tokens(place, max_requests), output_tokens(&slot, max_requests),
                count * static_cast<size_t>(1 + ctx.rows.max_drafts) * sizeof(int32_t));
  }
  group.post([&] {
    for (int stage = 0; stage + 1 < link.num_stages; ++stage) {
      place_of(stage)->sequence.store(step + 1, std::memory_order_release);
    }
  });
}

}  // namespace

void advance_cpu(const StepContext& ctx) {
  const ControlHeader& record = *ctx.rings.record();
  const InferParams& infer = ctx.infer;
  auto* group = static_cast<CpuCommunicator*>(ctx.communicator);
  const StageLink* link = group == nullptr ? nullptr : group->stage_link();
  if (group != nullptr) group->show_life();
  OutputHeader* slot = ctx.rings.output_slot();
  slot->step = record.step;
  const bool draws = link == nullptr || link->is_last();
  slot->num_entries = draws ? record.num_entries : 0;
  const auto* entries = record_array<BatchEntry>(&record, record.entries_offset);
  for (int32_t i = 0; !draws && i < record.num_entries; ++i) {
    advance_unfinished(ctx.rows, entries[i]);
  }
  OutputEntry* out = output_entries(slot);
  int32_t* tokens = output_tokens(slot, infer.max_requests);
  for (int32_t i = 0; i < slot->num_entries; ++i) {
    const int32_t start = infer.logits_start[infer.entry_batch[i]];
    out[i] = advance_row(ctx.rows, entries[i], start < 0 ? nullptr : infer.sampled + start,
                         tokens + int64_t{i} * (1 + ctx.rows.max_drafts));
  }
  slot->waited_ns = 0;
  if (link != nullptr) {
    if (link->is_last()) publish(*slot, record.step, *group, ctx);
    slot->waited_ns = link->counters->waited_ns;
  }
  slot->end_ns = clock_ns();
  *ctx.rings.step = record.step + 1;
  slot->sequence.store(record.step + 1, std::memory_order_release);
}

}  // namespace mrv1
