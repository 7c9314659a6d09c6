// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Stages of a pipeline give what one stage gives, bit for bit, however late each of them is.
#include <doctest/doctest.h>

#include <cstring>
#include <memory>
#include <vector>

#include "core/error.h"
#include "runner/stage_probe.h"

namespace mrv1 {
namespace {

StageProbe::Options options_of(int32_t num_stages) {
  StageProbe::Options options;
  options.num_stages = num_stages;
  options.num_layers = 5;
  options.vocab_size = 101;
  options.values = {{101, DType::kF32}, {101, DType::kF32}, {13, DType::kBF16}};
  options.num_rows = 6;
  options.max_tokens = 20;
  options.max_model_len = 40;
  return options;
}

std::unique_ptr<StageProbe> probe_of(int size, const StageProbe::Options& options) {
  std::vector<std::shared_ptr<Device>> devices;
  for (int i = 0; i < size * options.num_stages; ++i) devices.push_back(make_cpu_device(1));
  return std::make_unique<StageProbe>(devices, GroupOptions{}, options, 11);
}

void check_equal(const StageProbe::Output& a, const StageProbe::Output& b) {
  REQUIRE(a.step == b.step);
  CAPTURE(a.step);
  REQUIRE(a.entries.size() == b.entries.size());
  const size_t bytes = a.entries.size() * sizeof(OutputEntry);
  CHECK((bytes == 0 || std::memcmp(a.entries.data(), b.entries.data(), bytes) == 0));
  CHECK(a.tokens == b.tokens);
}

}  // namespace

TEST_CASE("stages draw what one stage draws, and end up with its rows") {
  struct Case {
    int num_stages, size;
    int32_t num_slots, num_drafts;
    bool graphs;
    int delay;
  };
  for (const Case& each : {Case{2, 1, 2, 0, false, 0}, Case{2, 2, 5, 2, true, 60},
                           Case{3, 1, 4, 3, false, 60}, Case{4, 1, 7, 0, true, 60}}) {
    CAPTURE(each.num_stages);
    StageProbe::Options options = options_of(1);
    options.num_slots = each.num_slots;
    options.num_drafts = each.num_drafts;
    options.graphs = each.graphs;
    const auto whole = probe_of(1, options);
    options.num_stages = each.num_stages;
    options.delay = std::chrono::microseconds(each.delay);
    const auto staged = probe_of(each.size, options);
    const std::vector<StageProbe::ProbeStep> steps = staged->random_steps(300, 5);
    whole->run(steps);
    staged->run(steps);
    const int last = (each.num_stages - 1) * each.size;
    int64_t drawn = 0, accepted = 0;
    for (int rank = 0; rank < staged->size(); ++rank) {
      REQUIRE(staged->outputs(rank).size() == steps.size());
      for (size_t i = 0; i < steps.size(); ++i) {
        const StageProbe::Output& output = staged->outputs(rank)[i];
        if (rank < last) {
          CHECK(output.entries.empty());
          continue;
        }
        check_equal(output, whole->outputs(0)[i]);
        for (const OutputEntry& entry : output.entries) {
          drawn += entry.num_tokens;
          accepted += entry.num_accepted;
        }
      }
      for (int32_t row = 0; row < options.num_rows; ++row) {
        const StageProbe::RowView a = whole->row(0, row);
        const StageProbe::RowView b = staged->row(rank, row);
        CHECK(a.row.phase == b.row.phase);
        // Outputs of a row that was freed before they came are nobody's.
        if (a.row.phase == RowPhase::kFree) continue;
        CHECK(std::memcmp(&a.row, &b.row, sizeof(Row)) == 0);
        CHECK(a.tokens == b.tokens);
      }
    }
    CHECK(drawn > 300);
    CHECK((accepted > 0) == (each.num_drafts > 0));
    if (each.delay > 0) CHECK(staged->outputs(0).back().waited_ns > 0);
    CHECK(whole->outputs(0).back().waited_ns == 0);
  }
}

}  // namespace mrv1
