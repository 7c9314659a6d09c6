// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Ranks whose GPUs do not reach each other: what NCCL cannot do is refused at the start, and what
// it sends has memory of its own.
#include <doctest/doctest.h>

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/error.h"
#include "dist/expert_link.h"
#include "error_text.h"
#include "runner/model_runner.h"
#include "runner/two_batch.h"
#include "small_model.h"

namespace mrv1 {
namespace {

// A rank that writes to no other one.
class LoneRank final : public Communicator {
 public:
  LoneRank(int rank, int size) : Communicator(rank, size) {}

  void abort(std::string_view /*reason*/) noexcept override {}
  bool is_aborted() const noexcept override { return false; }
  std::string abort_reason() const override { return {}; }
  std::string note() const override { return "NCCL carries all"; }
  bool sums_anything() const override { return false; }
  StagePort* stage_port() override { return nullptr; }
  StageCounters* stage_counters() override { return nullptr; }

  std::array<char, 4> staged{};

 protected:
  void stage_experts(std::span<ExpertLink> links) override {
    for (size_t rank = 0; rank < links.size(); ++rank) {
      for (size_t peer = 0; peer < links.size(); ++peer) {
        if (peer != rank) links[rank].ranks[peer].x = &staged[rank];
      }
    }
  }
};

// What check_sums() says of a program with one sum.
std::string refusal(bool with_bias, bool wide, bool batch_invariant) {
  Program program(DType::kBF16);
  const int32_t x = program.embedding(matrix(program, "embed", kVocab, kHidden), 1.0f);
  const int32_t part =
      program.linear(x, matrix(program, "o", kHidden, kHidden), -1, -1, true, wide);
  program.all_reduce(part, with_bias ? vector(program, "o.bias", kHidden) : -1);
  RunnerConfig config = small_config();
  config.batch_invariant = batch_invariant;
  return message_of([&] { check_sums(LoneRank(0, 2), program, config); });
}

}  // namespace

TEST_CASE("sums that NCCL does not make are refused at the start") {
  CHECK(refusal(false, false, false).empty());
  CHECK(refusal(true, false, false) ==
        "[ranks] NCCL carries all, which adds no bias to sums: 'o.bias' of the model needs GPUs "
        "that reach each other's memory");
  CHECK(has(refusal(false, true, false), "keeps the dtype of sums: those of float32 to bfloat16"));
  CHECK(has(refusal(false, false, true), "batch_invariant = True needs GPUs"));
}

TEST_CASE("ranks that do not reach each other have memory to send from in place of buffers") {
  LoneRank first(0, 2), second(1, 2);
  const std::array<Communicator*, 2> ranks{&first, &second};
  std::array<char, 8> memory{};
  std::array<int32_t, 4> ints{};
  std::array<float, 2> weights{};
  std::array<ExpertBuffers, 2> buffers;
  for (size_t rank = 0; rank < 2; ++rank) {
    buffers[rank] = {.region_rows = 1,
                     .hidden = 1,
                     .top_k = 1,
                     .x = &memory[rank],
                     .experts = &ints[rank],
                     .weights = &weights[rank],
                     .counts = &ints[2 + rank],
                     .sums = &memory[4 + rank]};
  }
  link_experts(ranks, buffers);
  for (size_t rank = 0; rank < 2; ++rank) {
    const ExpertLink& link = *ranks[rank]->expert_link(0);
    CHECK(link.ranks[rank].x == &memory[rank]);
    CHECK(link.ranks[1 - rank].x == &first.staged[rank]);
  }
}

TEST_CASE("a group is told of the experts that all sets of buffers have room for") {
  Program program(DType::kBF16);
  const int32_t x = program.embedding(matrix(program, "embed", kVocab, kHidden), 1.0f);
  const int32_t experts = program.input("experts", 3, RowSpace::kTokens, DType::kI32);
  const int32_t shares = program.input("shares", 3, RowSpace::kTokens, DType::kF32);
  const auto stacked = [&](const char* name, int64_t rows, int64_t cols) {
    return program.weight(
        {.name = name, .rows = rows, .cols = cols, .segments = {{name, 0, rows}}, .matrices = 2});
  };
  program.moe_exchange(x, experts, shares, stacked("gate_up", 2 * 32, kHidden),
                       stacked("down", 2 * kHidden, 16), {.num_experts = 4},
                       {.num_experts = 4, .ranks = 2});
  RunnerConfig config = small_config();
  config.num_ranks = 2;
  config.data_parallel = true;
  config.nccl = {"libnccl.so.2"};
  const int64_t tokens = config.max_num_batched_tokens;
  const GroupOptions options = group_options(program, config);
  CHECK(options.choices == 3 * tokens);
  CHECK(options.kernels == CollectiveKernels::kAuto);
  CHECK(options.nccl == config.nccl);
  config.two_batch.mode = TwoBatchMode::kOn;
  CHECK(group_options(program, config).choices == 3 * (tokens + 2 * TwoBatch::max_tokens(config)));
}

}  // namespace mrv1
