// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// The small model on several ranks, as stages of a pipeline.
#pragma once

#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "runner/rank_followers.h"
#include "small_model.h"

namespace mrv1 {

// Weights whose values follow from their names, so that stages have those of the whole.
inline void fill_by_name(WeightStore& weights, const Program& program) {
  for (size_t i = 0; i < program.weights().size(); ++i) {
    const WeightSpec& spec = program.weights()[i];
    std::mt19937 random(static_cast<uint32_t>(std::hash<std::string>{}(spec.name)));
    std::uniform_real_distribution<float> uniform(-0.2f, 0.2f);
    std::vector<float> values(static_cast<size_t>(spec.rows * spec.cols));
    for (float& value : values) value = uniform(random) + (spec.cols == 1 ? 1.0f : 0.0f);
    weights.load_segment(static_cast<int32_t>(i), 0, values.data(), DType::kF32);
  }
  weights.check_complete();
}

// Stages of so many layers, each of so many ranks that have all of their stage.
struct Pipeline {
  std::vector<std::shared_ptr<Device>> devices;
  std::shared_ptr<ModelRunner> runner;

  Pipeline(const std::vector<int32_t>& layers, int stage_ranks, RunnerConfig config,
           const std::vector<int32_t>& windows) {
    const bool ranked = stage_ranks > 1;
    const Program whole = small_model(windows, ranked, /*fused=*/false);
    config.num_stages = static_cast<int32_t>(layers.size());
    config.num_ranks = config.num_stages * stage_ranks;
    std::vector<Program> programs;
    int32_t first = 0;
    for (const int32_t count : layers) {
      Program stage = layers.size() == 1 ? whole : whole.stage(first, first + count);
      first += count;
      stage.fuse();
      for (int rank = 0; rank < stage_ranks; ++rank) {
        programs.push_back(stage);
        devices.push_back(make_cpu_device(1));
      }
    }
    runner = make_runner(devices, std::move(programs),
                         std::vector<RunnerConfig>(devices.size(), config));
    for (int rank = 0; rank < config.num_ranks; ++rank) {
      ModelRunner& each = runner->rank_runner(rank);
      fill_by_name(each.weights(), each.program());
    }
  }
};

}  // namespace mrv1
