// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// The engine over a small random model: whatever is shared, preempted or aborted, a request draws
// the tokens that it draws alone. The CPU's kernels do not depend on the batch, bit for bit.
#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "allocations.h"
#include "core/error.h"
#include "engine_harness.h"

namespace mrv1 {
TEST_CASE("preempted requests draw the tokens that they draw alone") {
  // Three requests of 12 blocks over 20: they start together and cannot all stay.
  for (const bool caching : {false, true}) {
    Harness harness(tiny_config(21), caching);
    for (int32_t slot = 0; slot < 3; ++slot) {
      harness.add(request_of(prompt_of(9, slot), 40), {slot});
    }
    harness.finish();
    const EngineStats stats = harness.engine.stats();
    CHECK(stats.preemptions > 0);
    CHECK((stats.prefix_hit_tokens > 0) == caching);
    for (int32_t slot = 0; slot < 3; ++slot) {
      CHECK(harness.lives[slot].end == RequestEnd::kLength);
      CHECK(harness.lives[slot].tokens == alone(request_of(prompt_of(9, slot), 40)));
      CHECK(harness.lives[slot].num_cached_tokens == 0);  // of the first admission
    }
    // First come, first served: the oldest is never the victim.
    CHECK(harness.ended == std::vector<int32_t>{0, 1, 2});
  }
}

TEST_CASE("an urgent request takes the place of less urgent ones, equals wait") {
  Harness harness(tiny_config(60));
  for (int32_t slot = 0; slot < 4; ++slot) {
    RequestSpec spec = request_of(prompt_of(5, slot), 30);
    spec.priority = 1;
    harness.add(spec, {slot});
  }
  for (int i = 0; i < 5; ++i) harness.step();
  RequestSpec equal = request_of(prompt_of(5, 4), 8), urgent = request_of(prompt_of(5, 5), 8);
  equal.priority = 1;
  harness.add(equal, {4});
  harness.step();
  CHECK(harness.engine.stats().preemptions == 0);
  harness.add(urgent, {5});
  harness.step();
  CHECK(harness.engine.stats().preemptions == 1);
  harness.finish();
  CHECK(harness.ended.front() == 5);
  // The victim is the newest of the four, and still comes before the one that waited.
  CHECK(harness.ended == std::vector<int32_t>{5, 0, 1, 2, 3, 4});
  CHECK(harness.lives[3].tokens == alone(request_of(prompt_of(5, 3), 30)));
}

TEST_CASE("a request that can never fit is refused, one that fits alone ends") {
  Harness harness(tiny_config(12));
  CHECK_THROWS_WITH_AS(harness.engine.check(request_of(prompt_of(20, 1), 26)),
                       doctest::Contains("12 KV blocks"), Error);
  for (int32_t slot = 0; slot < 4; ++slot) {
    harness.add(request_of(prompt_of(20, slot), 25), {slot});  // all 11 blocks
  }
  harness.finish();
  for (int32_t slot = 0; slot < 4; ++slot) {
    CHECK(harness.lives[slot].tokens == alone(request_of(prompt_of(20, slot), 25)));
  }
}

TEST_CASE("a prompt that was computed is found, whole blocks up to the last token") {
  for (const auto& [length, hit] : {std::pair{20, 16}, {21, 20}, {4, 0}, {5, 4}, {3, 0}}) {
    Harness harness(tiny_config(60));
    const auto prompt = prompt_of(length, 7);
    harness.add(request_of(prompt, 6), {0});
    harness.finish();
    const uint64_t computed = harness.engine.stats().prefill_tokens;
    harness.add(request_of(prompt, 6), {1});
    harness.finish();
    CHECK(harness.lives[1].num_cached_tokens == hit);
    CHECK(harness.engine.stats().prefix_hit_tokens == static_cast<uint64_t>(hit));
    CHECK(harness.engine.stats().prefill_tokens - computed == static_cast<uint64_t>(length - hit));
    CHECK(harness.lives[1].tokens == harness.lives[0].tokens);
    // What was generated is found too, by a prompt that continues it.
    std::vector<int32_t> longer = prompt;
    const auto& tokens = harness.lives[0].tokens;
    longer.insert(longer.end(), tokens.begin(), tokens.end());
    harness.add(request_of(longer, 4), {2});
    harness.finish();
    CHECK(harness.lives[2].num_cached_tokens == (length + 5) / 4 * 4);
    CHECK(harness.lives[2].tokens == alone(request_of(longer, 4)));
  }
}

TEST_CASE("salt, skipping and the option keep requests out of the cache") {
  const auto prompt = prompt_of(20, 7);
  Harness harness(tiny_config(60));
  RequestSpec skips = request_of(prompt, 2), salted = request_of(prompt, 2);
  skips.use_prefix_cache = false;
  salted.scope.salt = 9;
  harness.add(skips, {0});
  harness.finish();
  CHECK(harness.engine.stats().cached_blocks == 0);
  harness.add(request_of(prompt, 2), {1});
  harness.finish();
  harness.add(salted, {2});
  harness.add(skips, {3});
  harness.finish();
  CHECK(harness.engine.stats().prefix_hit_tokens == 0);
  harness.add(salted, {4});
  harness.finish();
  CHECK(harness.lives[4].num_cached_tokens == 16);
  Harness off(tiny_config(60), false);
  off.add(request_of(prompt, 2), {0});
  off.finish();
  CHECK(off.engine.stats().cached_blocks == 0);
}

TEST_CASE("a running request shares its computed blocks at once") {
  Harness harness(tiny_config(60));
  const auto prompt = prompt_of(24, 3);
  harness.add(request_of(prompt, 30), {0});
  for (int i = 0; i < 3; ++i) harness.step();
  const int32_t before = harness.engine.stats().free_blocks;
  harness.add(request_of(prompt, 30), {1});
  harness.step();
  CHECK(before - harness.engine.stats().free_blocks <= 2);  // not 6 more
  harness.finish();
  CHECK(harness.lives[1].num_cached_tokens == 20);
  CHECK(harness.lives[1].tokens == harness.lives[0].tokens);
}

TEST_CASE("samples share a prompt that is computed once") {
  for (const bool caching : {false, true}) {
    for (const int32_t length : {1, 3, 4, 5, 16, 17, 40}) {
      CAPTURE(length);
      Harness harness(tiny_config(70), caching);
      harness.add(request_of(prompt_of(length, 5), 9), {3, 1, 0, 2, 4});  // more than rows
      harness.finish();
      CHECK(harness.engine.stats().prefill_tokens == static_cast<uint64_t>(length + 4));
      const int32_t slots[] = {3, 1, 0, 2, 4};
      for (uint64_t sample = 0; sample < 5; ++sample) {
        const Life& life = harness.lives[slots[sample]];
        CHECK(life.tokens == alone(request_of(prompt_of(length, 5), 9), sample));
        CHECK(life.num_cached_tokens == (sample == 0 ? 0 : length - 1));
      }
    }
  }
}

TEST_CASE("samples end well when the first one goes, or memory runs out") {
  const RequestSpec spec = request_of(prompt_of(70, 5), 9);
  Harness harness(tiny_config(60));
  harness.add(spec, {0, 1, 2});
  harness.step();
  harness.end(0, RequestEnd::kAbort);  // before its prompt is computed
  harness.step();
  harness.end(1, RequestEnd::kAbort);
  harness.finish();
  CHECK(harness.lives[2].tokens == alone(spec, 2));

  // Four samples of 20 blocks each would need 23 with the prompt shared; there are 21.
  Harness tight(tiny_config(22));
  const RequestSpec grows = request_of(prompt_of(30, 6), 50);
  tight.add(grows, {0, 1, 2, 3});
  tight.finish();
  CHECK(tight.engine.stats().preemptions > 0);
  for (int32_t slot = 0; slot < 4; ++slot) CHECK(tight.lives[slot].tokens == alone(grows, slot));
}

TEST_CASE("windowed groups give blocks back while they run") {
  const std::vector<int32_t> windows{9, 0};
  Harness harness(tiny_config(60), true, windows);
  harness.add(request_of(prompt_of(10, 1), 70), {0});
  int32_t least = 60;
  while (harness.engine.has_work()) {
    harness.step();
    least = std::min(least, harness.engine.stats().free_blocks);
  }
  // 79 computed tokens have 20 blocks in the full group; the window, 9 positions and what two steps
  // in flight may still name, has at most 5.
  CHECK(least >= 59 - 20 - 5);
  CHECK(harness.lives[0].tokens == alone(request_of(prompt_of(10, 1), 70), 0, windows));
  harness.engine.check_idle();
}

TEST_CASE("all layers windowed: a request longer than the cache ends") {
  const std::vector<int32_t> windows{6};
  for (const int32_t budget : {4, 32}) {
    RunnerConfig config = tiny_config(9);  // 32 tokens
    config.max_num_batched_tokens = budget;
    Harness harness(config, true, windows);
    for (int32_t slot = 0; slot < 3; ++slot) {
      harness.add(request_of(prompt_of(50, slot), 40), {slot});
    }
    harness.finish();
    for (int32_t slot = 0; slot < 3; ++slot) {
      CHECK(harness.lives[slot].tokens == alone(request_of(prompt_of(50, slot), 40), 0, windows));
    }
  }
}

TEST_CASE("a hit needs all blocks of full groups and the window's of others") {
  const std::vector<int32_t> windows{6, 0};
  Harness harness(tiny_config(80), true, windows);
  const auto prompt = prompt_of(41, 2);
  harness.add(request_of(prompt, 20), {0});
  harness.finish();
  // The window has dropped the blocks of the prompt, but they stay cached while nobody needs them.
  harness.add(request_of(prompt, 20), {1});
  harness.step();
  harness.finish();
  CHECK(harness.lives[1].num_cached_tokens == 40);
  CHECK(harness.lives[1].tokens == harness.lives[0].tokens);
  // Blocks that the window left behind were given back first, so they are taken first: what is
  // left of the prompt in the windowed group is its end.
  harness.add(request_of(prompt_of(60, 9), 20), {2});
  harness.finish();
  harness.add(request_of(prompt, 20), {3});
  harness.finish();
  CHECK(harness.lives[3].num_cached_tokens > 0);
  CHECK(harness.lives[3].tokens == harness.lives[0].tokens);
}

TEST_CASE("samples share a prompt in windowed groups too") {
  const std::vector<int32_t> windows{5, 0, 5};
  for (const int32_t length : {1, 4, 8, 9, 31}) {
    CAPTURE(length);
    Harness harness(tiny_config(110), length % 2 == 0, windows);
    harness.add(request_of(prompt_of(length, 5), 12), {0, 1, 2});
    harness.finish();
    for (int32_t slot = 0; slot < 3; ++slot) {
      CHECK(harness.lives[slot].tokens ==
            alone(request_of(prompt_of(length, 5), 12), slot, windows));
    }
  }
}

TEST_CASE("a failed step ends its requests and leaves nothing in the cache") {
  Harness harness(tiny_config(60));
  harness.add(request_of(prompt_of(20, 1), 5), {0});
  harness.engine.runner().fail_next_step("planned");
  harness.step();
  harness.add(request_of(prompt_of(20, 1), 5), {1});
  harness.finish();
  CHECK(harness.lives[0].end == RequestEnd::kError);
  CHECK(harness.lives[0].error.find("planned") != std::string::npos);
  CHECK(harness.lives[1].num_cached_tokens == 0);
  CHECK(harness.lives[1].tokens == alone(request_of(prompt_of(20, 1), 5)));
}

TEST_CASE("an abort in flight holds the blocks until the step has retired") {
  Harness harness(tiny_config(60));
  harness.add(request_of(prompt_of(20, 1), 5), {0});
  harness.add(request_of(prompt_of(20, 2), 5), {1});
  harness.step();
  const int32_t before = harness.engine.stats().free_blocks;
  harness.end(0, RequestEnd::kAbort);
  CHECK(harness.engine.stats().free_blocks == before);
  // The slot is free at once; what still runs is not taken for the new request's.
  harness.add(request_of(prompt_of(6, 3), 5), {0});
  harness.finish();
  CHECK(harness.lives[0].tokens == alone(request_of(prompt_of(6, 3), 5)));
}

TEST_CASE("drafts of decoding requests let no prompt wait") {
  // Three rows of one token and three drafts: with limits around the twelve that they take.
  for (int32_t limit = 4; limit <= 26; ++limit) {
    CAPTURE(limit);
    RunnerConfig config = tiny_config(100);
    config.num_speculative_tokens = 3;
    config.ngram = {1, 1};
    config.max_num_batched_tokens = limit;
    Harness harness(config);
    for (int32_t slot = 0; slot < 3; ++slot) {
      harness.add(request_of(std::vector<int32_t>(20, 5), 60, 0.0f), {slot});
    }
    const auto all_decode = [&] {
      return !harness.lives[0].tokens.empty() && !harness.lives[1].tokens.empty() &&
             !harness.lives[2].tokens.empty();
    };
    while (!all_decode()) harness.step();
    for (int i = 0; i < 3; ++i) harness.step();
    const EngineStats before = harness.engine.stats();
    for (int i = 0; i < 3; ++i) harness.step();
    // While nobody waits, drafts may take all.
    const bool drafts = limit >= 12;
    CHECK(harness.engine.stats().decode_tokens - before.decode_tokens == (drafts ? 36 : 9));

    const int32_t length = 23;
    harness.add(request_of(prompt_of(length, 3), 4), {3});
    const int32_t chunk = (limit - 3 + 1) / 2;
    for (int32_t steps = 0; steps < (length + chunk - 1) / chunk; ++steps) {
      const uint64_t prefilled = harness.engine.stats().prefill_tokens;
      harness.step();
      const auto grown = harness.engine.stats().prefill_tokens - prefilled;
      CHECK((grown >= static_cast<uint64_t>(chunk) ||
             harness.engine.stats().prefill_tokens - before.prefill_tokens == length));
    }
    harness.step();  // the step that ended the prompt is taken in one step later
    CHECK(!harness.lives[3].tokens.empty());
    CHECK(harness.lives[0].end == RequestEnd::kNone);
    harness.finish();
    CHECK(harness.lives[3].tokens == alone(request_of(prompt_of(length, 3), 4)));
    CHECK(harness.lives[0].tokens == alone(request_of(std::vector<int32_t>(20, 5), 60, 0.0f)));
  }
}

TEST_CASE("drafts that fill the step do not keep an urgent request from a row") {
  RunnerConfig config = tiny_config(100);
  config.num_speculative_tokens = 3;
  config.ngram = {1, 1};
  config.max_num_batched_tokens = 16;
  Harness harness(config);
  for (int32_t slot = 0; slot < 4; ++slot) {
    harness.add(request_of(std::vector<int32_t>(4, 5), 60, 0.0f), {slot});
  }
  for (int i = 0; i < 6; ++i) harness.step();
  RequestSpec urgent = request_of(prompt_of(9, 1), 2);
  urgent.priority = -1;
  harness.add(urgent, {4});
  for (int i = 0; i < 6; ++i) harness.step();
  CHECK(harness.ended == std::vector<int32_t>{4});
  CHECK(harness.engine.stats().preemptions == 1);
  harness.finish();
}

TEST_CASE("a steady decode step allocates nothing") {
  Harness harness(small_config());
  for (int32_t slot = 0; slot < 4; ++slot) {
    harness.add(request_of(prompt_of(5, slot), 200), {slot});
  }
  EventBatch events;
  for (int i = 0; i < 20; ++i) harness.engine.step(events);
  for (int i = 0; i < 100; ++i) {
    events.clear();
    const int64_t before = count_allocations();
    harness.engine.step(events);
    CHECK(count_allocations() == before);
    REQUIRE(events.events.size() == 4);
  }
  events.clear();
  harness.engine.end_all(RequestEnd::kAbort, "", events);
  CHECK(events.events.size() == 4);
  harness.finish();
}

TEST_CASE("random lives under memory pressure") {
  std::map<std::tuple<bool, int, int>, Life> known;
  uint64_t preemptions = 0, hits = 0, scored = 0;
  for (uint32_t seed = 0; seed < 12; ++seed) {
    std::mt19937 random(seed);
    const bool windowed = seed % 3 == 0;
    const std::vector<int32_t> windows = windowed ? std::vector<int32_t>{7, 0} : std::vector{0};
    const uint32_t blocks = (windowed ? 40 : 26) + random() % 30;
    RunnerConfig config = tiny_config(static_cast<int32_t>(blocks));
    config.max_num_batched_tokens = static_cast<int32_t>(4 + random() % 30);
    const auto micro_batches = static_cast<int32_t>(1 + seed / 3);
    Harness harness(config, seed % 4 != 1, windows, micro_batches);
    struct Wish {
      int kind;
      uint64_t sample;
      size_t num_samples;
      bool aborted;
    };
    std::map<int32_t, Wish> wishes;
    const auto spec_of = [](int kind) {
      RequestSpec spec =
          request_of(prompt_of(1 + kind * 7, kind % 2), 3 + kind * 5, kind % 3 == 0 ? 0 : 0.8f);
      if (kind % 4 == 1) spec.row.num_prompt_logprobs = kind % 3;
      return spec;
    };
    const auto settle = [&](bool all) {
      std::erase_if(wishes, [&](const auto& entry) {
        const auto& [slot, wish] = entry;
        const Life& life = harness.lives[slot];
        if (life.end == RequestEnd::kNone) {
          REQUIRE(!all);
          return false;
        }
        if (wish.aborted) return true;
        CHECK(life.end == RequestEnd::kLength);
        auto [place, fresh] =
            known.try_emplace({windowed, wish.kind, static_cast<int>(wish.sample)});
        if (fresh) place->second = life_alone(spec_of(wish.kind), wish.sample, windows);
        CHECK(life.tokens == place->second.tokens);
        // Of several samples, whichever computed the prompt has its logprobs.
        if (!life.prompt_logprobs.empty() || wish.num_samples == 1) {
          CHECK(life.prompt_logprobs == place->second.prompt_logprobs);
          scored += !life.prompt_logprobs.empty();
        }
        return true;
      });
    };
    for (int round = 0; round < 300; ++round) {
      const int kind = static_cast<int>(random() % 8);
      if (random() % 3 == 0) {
        std::vector<int32_t> slots;
        const size_t samples = random() % 4 == 0 ? 1 + random() % 3 : 1;
        for (int32_t slot = 0; slots.size() < samples && slot < 12; ++slot) {
          if (!harness.engine.has_request(slot)) slots.push_back(slot);
        }
        if (!slots.empty()) {
          RequestSpec spec = spec_of(kind);
          spec.priority = static_cast<int32_t>(random() % 2);
          for (size_t i = 0; i < slots.size(); ++i)
            wishes[slots[i]] = {kind, i, slots.size(), false};
          harness.add(spec, slots);
        }
      }
      if (!wishes.empty() && random() % 9 == 0) {
        auto place = wishes.begin();
        std::advance(place, random() % wishes.size());
        place->second.aborted = true;
        harness.end(place->first, RequestEnd::kAbort);
        wishes.erase(place);
      }
      harness.step();
      settle(false);
    }
    harness.finish();
    settle(true);
    preemptions += harness.engine.stats().preemptions;
    hits += harness.engine.stats().prefix_hit_tokens;
  }
  CHECK(preemptions > 100);
  CHECK(hits > 1000);
  CHECK(scored > 80);
}

}  // namespace mrv1
