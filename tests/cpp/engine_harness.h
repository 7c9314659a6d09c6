// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "small_model.h"

namespace mrv1 {

inline std::vector<int32_t> prompt_of(int32_t length, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(length);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % kVocab);
  return tokens;
}

inline RequestSpec request_of(std::vector<int32_t> prompt, int32_t max_tokens,
                              float temperature = 0.8f) {
  RequestSpec spec;
  spec.row.token_ids = std::move(prompt);
  spec.row.prompt_len = static_cast<int32_t>(spec.row.token_ids.size());
  spec.row.temperature = temperature;
  spec.row.seed = 11;
  spec.row.max_tokens = max_tokens;
  return spec;
}

inline RunnerConfig tiny_config(int32_t num_blocks) {
  RunnerConfig config = small_config();
  config.block_size = 4;
  config.num_blocks = num_blocks;
  config.max_model_len = 96;
  config.max_logprobs = 3;
  return config;
}

struct Life {
  std::vector<int32_t> tokens;
  RequestEnd end = RequestEnd::kNone;
  std::string error;
  int32_t num_cached_tokens = 0;
  std::vector<TokenLogprob> prompt_logprobs;
};

// Steps an engine, checks it after each step, and keeps what came by slot.
class Harness {
 public:
  explicit Harness(const RunnerConfig& config, bool caching = true,
                   const std::vector<int32_t>& windows = {0}, int32_t micro_batches = 0)
      : engine(small_runner(config, windows), caching, nullptr, micro_batches) {}

  void add(RequestSpec spec, const std::vector<int32_t>& slots) {
    engine.check(spec);
    for (const int32_t slot : slots) lives[slot] = {};
    engine.add(std::move(spec), slots);
    engine.check_invariants();
  }

  void step() {
    EventBatch events;
    engine.step(events);
    take(events);
    engine.check_invariants();
  }

  void take(const EventBatch& events) {
    auto token = events.tokens.begin();
    for (const RequestEvent& event : events.events) {
      Life& life = lives.at(event.slot);
      CHECK(life.end == RequestEnd::kNone);
      life.tokens.insert(life.tokens.end(), token, token + event.num_tokens);
      token += event.num_tokens;
      life.end = event.end;
      life.num_cached_tokens = event.num_cached_tokens;
      if (event.error >= 0) life.error = events.errors[event.error];
      if (event.prompt_logprobs >= 0) {
        CHECK(life.prompt_logprobs.empty());
        life.prompt_logprobs = events.prompt_logprobs[event.prompt_logprobs].tokens;
      }
      if (event.end != RequestEnd::kNone) ended.push_back(event.slot);
    }
  }

  void end(int32_t slot, RequestEnd reason) {
    EventBatch events;
    engine.end(slot, reason, "", events);
    take(events);
    engine.check_invariants();
  }

  void finish() {
    for (int steps = 0; engine.has_work(); ++steps) {
      REQUIRE(steps < 5000);
      step();
    }
    engine.check_idle();
  }

  Engine engine;
  std::map<int32_t, Life> lives;
  std::vector<int32_t> ended;  // slots in order
};

// Nothing is shared or preempted. One group holds all layers' blocks if no window drops any.
inline Life life_alone(RequestSpec spec, uint64_t sample, const std::vector<int32_t>& windows) {
  Harness harness(tiny_config(160), false, windows);
  spec.row.seed += sample;
  harness.add(std::move(spec), {0});
  harness.finish();
  return harness.lives[0];
}

inline std::vector<int32_t> alone(RequestSpec spec, uint64_t sample = 0,
                                  const std::vector<int32_t>& windows = {0}) {
  return life_alone(std::move(spec), sample, windows).tokens;
}

}  // namespace mrv1
