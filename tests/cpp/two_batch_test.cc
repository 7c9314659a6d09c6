// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// When steps run as two halves, and where they are cut.
#include <doctest/doctest.h>

#include <vector>

#include "runner/two_batch.h"
#include "small_model.h"

namespace mrv1 {
namespace {

TEST_CASE("the fullest rank decides for all whether a step runs in halves") {
  TwoBatchConfig config{TwoBatchMode::kAuto, /*min_prefill_tokens=*/100, /*min_decode_tokens=*/10};
  const auto decide = [&](const std::vector<StepLoad>& ranks) {
    return runs_in_halves(config, ranks);
  };
  CHECK_FALSE(decide({{9, false}, {3, false}}));
  CHECK(decide({{3, false}, {10, false}}));
  CHECK_FALSE(decide({{10, false}, {3, true}}));  // as long as a prompt of 10 takes
  CHECK_FALSE(decide({{99, true}}));
  CHECK(decide({{0, false}, {100, true}}));
  config = {TwoBatchMode::kAuto, /*min_prefill_tokens=*/0, /*min_decode_tokens=*/0};
  CHECK_FALSE(decide({{1, true}, {0, false}}));  // of which no two halves can be made
  CHECK_FALSE(decide({{1, false}}));
  CHECK(decide({{2, false}}));
  config.mode = TwoBatchMode::kOn;
  CHECK_FALSE(decide({{1, true}, {0, false}}));
  CHECK(decide({{1, true}, {2, false}}));
  config.mode = TwoBatchMode::kOff;
  CHECK_FALSE(decide({{1000, true}}));
}

TEST_CASE("a step is cut where halves have room, between requests if it can be") {
  RunnerConfig config = small_config();
  config.num_ranks = 2;
  config.two_batch.mode = TwoBatchMode::kOn;
  for (const int32_t drafts : {0, 4}) {
    config.num_speculative_tokens = drafts;
    for (const int32_t most : {8, 31, 32}) {
      config.max_num_batched_tokens = most;
      const Program program = small_model({0}, /*ranked=*/true);
      const std::shared_ptr<Device> device = make_cpu_device(1);
      const PlanLimits limits = ModelRunner::plan_limits(config);
      const WeightStore weights(program, *device);
      const KvStore kv(*device, {}, program, config.num_blocks, config.block_size);
      const Executable whole(program, limits, *device, weights.views(), kv.layers(),
                             config.max_model_len);
      const TwoBatch halves(program, whole, config, limits, *device, weights.views(), kv.layers());
      CHECK(TwoBatch::bytes(program, config, limits, *device) > 0);
      const int32_t room = TwoBatch::max_tokens(config);
      CHECK(room >= (most + 1) / 2);
      CHECK(room <= (most + 1) / 2 + drafts);
      for (int32_t padded = 2; padded <= most; ++padded) {
        for (int32_t tokens = 0; tokens <= padded; ++tokens) {
          CAPTURE(padded);
          CAPTURE(tokens);
          for (const bool speculates : {false, true}) {
            const int32_t cut = halves.cut_of(tokens, padded, speculates);
            REQUIRE(cut >= 1);
            REQUIRE(cut < padded);
            REQUIRE(cut <= room);
            REQUIRE(padded - cut <= room);
            if (padded == tokens && !speculates) REQUIRE(cut == (tokens + 1) / 2);
            // Up to the next request's places, if tokens are left behind them.
            const int32_t unit = speculates ? 1 + drafts : 1;
            if (tokens < padded) continue;
            const int32_t between = ((tokens + 1) / 2 + unit - 1) / unit * unit;
            if (between < padded && between <= room) REQUIRE(cut == between);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace mrv1
