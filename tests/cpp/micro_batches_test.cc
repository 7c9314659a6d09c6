// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Requests spread over micro-batches, as for the stages of a pipeline, over a runner that has one:
// who is in which step does not depend on how many devices compute it.
#include <doctest/doctest.h>

#include <algorithm>
#include <set>
#include <vector>

#include "allocations.h"
#include "engine_harness.h"

namespace mrv1 {
namespace {

RunnerConfig roomy_config(int32_t rows) {
  RunnerConfig config = tiny_config(400);
  config.max_num_seqs = rows;
  return config;
}

// Takes a step; returns the slots of the step that was taken in and drew tokens.
std::set<int32_t> step_slots(Harness& harness) {
  EventBatch events;
  harness.engine.step(events);
  harness.take(events);
  harness.engine.check_invariants();
  std::set<int32_t> slots;
  for (const RequestEvent& event : events.events) CHECK(slots.insert(event.slot).second);
  return slots;
}

bool all_decode(const Harness& harness) {
  return std::ranges::all_of(harness.lives, [](const auto& entry) {
    return !entry.second.tokens.empty() && entry.second.end == RequestEnd::kNone;
  });
}

}  // namespace

TEST_CASE("decoding rows take turns in micro-batches of one size") {
  for (const auto& [rows, micro_batches] :
       {std::pair{7, 2}, {7, 3}, {6, 3}, {8, 4}, {3, 3}, {2, 3}, {1, 3}, {1, 2}}) {
    CAPTURE(rows);
    CAPTURE(micro_batches);
    Harness harness(roomy_config(rows), true, {0}, micro_batches);
    for (int32_t slot = 0; slot < rows; ++slot) {
      harness.add(request_of(prompt_of(4 + slot, slot), 40), {slot});
    }
    while (!all_decode(harness)) harness.step();
    for (int i = 0; i < 2 * micro_batches; ++i) harness.step();
    std::vector<std::set<int32_t>> steps;
    const int32_t turns = std::min(rows, micro_batches);  // steps of a round
    for (int i = 0; i < 5 * turns; ++i) steps.push_back(step_slots(harness));
    for (size_t first = 0; first + turns <= steps.size(); ++first) {
      // Each row once in a round, wherever one begins.
      std::set<int32_t> round;
      for (int32_t i = 0; i < turns; ++i) {
        const std::set<int32_t>& step = steps[first + i];
        CHECK(step.size() <= static_cast<size_t>((rows + micro_batches - 1) / micro_batches));
        for (const int32_t slot : step) CHECK(round.insert(slot).second);
      }
      CHECK(round.size() == static_cast<size_t>(rows));
    }
    harness.finish();
    for (int32_t slot = 0; slot < rows; ++slot) {
      CHECK(harness.lives[slot].tokens == alone(request_of(prompt_of(4 + slot, slot), 40)));
    }
    // A row that stops is launched again in the steps that run ahead, if nobody else is there.
    CHECK(harness.engine.stats().masked_results == 0);  // their lengths were known
  }
}

TEST_CASE("chunks of a prompt are in every step, beside those whose turn it is") {
  RunnerConfig config = roomy_config(4);
  config.max_num_batched_tokens = 8;
  Harness harness(config, true, {0}, 2);
  for (int32_t slot = 0; slot < 2; ++slot) harness.add(request_of(prompt_of(3, slot), 60), {slot});
  while (!all_decode(harness)) harness.step();
  for (int i = 0; i < 4; ++i) harness.step();
  harness.add(request_of(prompt_of(48, 2), 4), {2});
  harness.add(request_of(prompt_of(40, 3), 4), {3});
  // One of the two decoding rows a step, and all that is left of it for the first prompt.
  for (int i = 0; i < 6; ++i) {
    const EngineStats before = harness.engine.stats();
    harness.step();
    const EngineStats now = harness.engine.stats();
    CHECK(now.decode_tokens - before.decode_tokens == 1);
    CHECK(now.prefill_tokens - before.prefill_tokens == 7);
    CHECK(now.running == 3);
  }
  harness.finish();
  CHECK(harness.lives[2].tokens == alone(request_of(prompt_of(48, 2), 4)));
  CHECK(harness.lives[3].tokens == alone(request_of(prompt_of(40, 3), 4)));
}

TEST_CASE("urgent requests that keep coming let the others have their turns") {
  const int32_t micro_batches = 3;
  Harness harness(roomy_config(4), true, {0}, micro_batches);
  harness.add(request_of(prompt_of(5, 0), 60), {0});
  while (!all_decode(harness)) harness.step();
  int since = 0, longest = 0;
  for (int i = 0; i < 150 && harness.lives[0].end == RequestEnd::kNone; ++i) {
    for (int32_t slot = 1; slot < 4; ++slot) {
      if (harness.engine.has_request(slot)) continue;
      RequestSpec urgent = request_of(prompt_of(3, i), 2);
      urgent.priority = -1;
      harness.add(urgent, {slot});
    }
    since = step_slots(harness).contains(0) ? 0 : since + 1;
    longest = std::max(longest, since);
  }
  CHECK(harness.lives[0].end == RequestEnd::kLength);
  CHECK(longest <= 2 * micro_batches);
  harness.finish();
}

TEST_CASE("as many steps run ahead as there are micro-batches") {
  for (const int32_t micro_batches : {1, 2, 4}) {
    Harness harness(roomy_config(4), true, {0}, micro_batches);
    RequestSpec spec = request_of(prompt_of(5, 1), 60);
    const std::vector<int32_t> outputs = alone(spec);
    const auto last = std::ranges::find(outputs, outputs[20]) - outputs.begin();
    spec.row.stop_ids = {outputs[20]};
    harness.add(spec, {0});
    for (int32_t i = 0; i < micro_batches; ++i) CHECK(step_slots(harness).empty());
    CHECK(step_slots(harness).size() == 1);
    harness.finish();
    CHECK(harness.lives[0].tokens.size() == static_cast<size_t>(last + 1));
    CHECK(harness.engine.stats().masked_results == static_cast<uint64_t>(micro_batches));
  }
}

TEST_CASE("a steady step of micro-batches allocates nothing") {
  Harness harness(roomy_config(6), true, {0}, 3);
  REQUIRE(harness.engine.runner().num_slots() == 4);  // a place for each step in flight
  for (int32_t slot = 0; slot < 6; ++slot) {
    harness.add(request_of(prompt_of(5, slot), 80), {slot});
  }
  EventBatch events;
  for (int i = 0; i < 30; ++i) harness.engine.step(events);
  for (int i = 0; i < 60; ++i) {
    events.clear();
    const int64_t before = count_allocations();
    harness.engine.step(events);
    CHECK(count_allocations() == before);
    REQUIRE(events.events.size() == 2);
  }
  events.clear();
  harness.engine.end_all(RequestEnd::kAbort, "", events);
  harness.finish();
}

}  // namespace mrv1
