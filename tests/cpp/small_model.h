// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// A random model, small enough to run in tests of what is around it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "program/program.h"
#include "runner/model_runner.h"

namespace mrv1 {

constexpr int32_t kVocab = 96, kHidden = 64, kHeads = 2, kKvHeads = 1, kHeadDim = 32;

inline int32_t matrix(Program& program, const std::string& name, int64_t rows, int64_t cols) {
  return program.weight({.name = name, .rows = rows, .cols = cols, .segments = {{name, 0, rows}}});
}

inline int32_t vector(Program& program, const std::string& name, int64_t size) {
  return program.weight(
      {.name = name, .kind = WeightKind::kVector, .rows = size, .segments = {{name, 0, size}}});
}

// A layer a window; 0 = all positions. `ranked`: what is row-parallel is summed over ranks, each of
// which has the whole model. To be cut into stages, a model is not fused yet.
inline Program small_model(const std::vector<int32_t>& windows, bool ranked = false,
                           bool fused = true) {
  Program program(DType::kBF16);
  const int32_t embed = matrix(program, "embed", kVocab, kHidden);
  std::vector<float> inv_freq(kHeadDim / 2);
  for (size_t i = 0; i < inv_freq.size(); ++i) inv_freq[i] = 1.0f / static_cast<float>(1 + i);
  const int32_t rope = program.rope_table({inv_freq, 1.0f});
  int32_t x = program.embedding(embed, 1.0f);
  const HeadShape heads{kHeads, kKvHeads, kHeadDim};
  const auto row_parallel = [&](int32_t from, int32_t weight, int32_t residual) {
    if (!ranked) return program.linear(from, weight, -1, residual, true);
    const int32_t sum = program.all_reduce(program.linear(from, weight, -1, -1, true), -1);
    return program.add(sum, residual);
  };
  for (size_t layer = 0; layer < windows.size(); ++layer) {
    const auto named = [&](const char* name) {
      return std::string(name).append(std::to_string(layer));
    };
    program.begin_layer(static_cast<int32_t>(layer));
    const int32_t normed = program.rms_norm(x, vector(program, named("norm1"), kHidden), 1e-6f);
    const int32_t qkv = program.linear(
        normed, matrix(program, named("qkv"), heads.qkv_cols(), kHidden), -1, -1, false);
    Program::AttentionSpec spec;
    spec.heads = heads;
    spec.scale = 0.2f;
    spec.window = windows[layer];
    spec.kv_layer = static_cast<int32_t>(layer);
    spec.rope = rope;
    const int32_t mixed = program.attention(qkv, spec);
    x = row_parallel(mixed, matrix(program, named("o"), kHidden, heads.q_cols()), x);
    const int32_t normed2 = program.rms_norm(x, vector(program, named("norm2"), kHidden), 1e-6f);
    const int32_t gate_up =
        program.linear(normed2, matrix(program, named("gate_up"), 2 * 80, kHidden), -1, -1, false);
    x = row_parallel(program.gated_mul(gate_up, Activation::kSilu),
                     matrix(program, named("down"), kHidden, 80), x);
    program.end_layer();
  }
  program.logits(program.rms_norm(x, vector(program, "norm", kHidden), 1e-6f), embed, 0.0f);
  if (fused) program.fuse();
  return program;
}

inline RunnerConfig small_config() {
  RunnerConfig config;
  config.max_num_seqs = 4;
  config.max_num_batched_tokens = 32;
  config.max_model_len = 256;
  config.block_size = 16;
  config.num_blocks = 4 * 16 + 1;
  return config;
}

inline std::shared_ptr<ModelRunner> small_runner(const RunnerConfig& config = small_config(),
                                                 const std::vector<int32_t>& windows = {0},
                                                 std::shared_ptr<Device> device = nullptr) {
  if (device == nullptr) device = make_cpu_device(2);
  auto runner = std::make_shared<ModelRunner>(device, small_model(windows), config);
  for (size_t i = 0; i < runner->program().weights().size(); ++i) {
    runner->weights().fill_random(static_cast<int32_t>(i), 7, 0.2f);
  }
  runner->weights().check_complete();
  return runner;
}

}  // namespace mrv1
