// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Runners of a pipeline: whatever rows live through, stages give the bits of one device; a rank
// that fails or hangs ends all, and is named.
#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "allocations.h"
#include "core/error.h"
#include "error_text.h"
#include "hold.h"
#include "pipeline.h"

namespace mrv1 {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using std::chrono::seconds;

const std::vector<int32_t> kWindows{0, 8, 8, 0};
constexpr int32_t kRows = 5, kBlocksEach = 14, kBlockTokens = 4;

RunnerConfig life_config(int32_t num_drafts = 0) {
  RunnerConfig config;
  config.max_num_seqs = kRows;
  config.max_num_batched_tokens = 24;
  config.max_model_len = kBlocksEach * kBlockTokens;
  config.block_size = kBlockTokens;
  // Two sets for each row and KV group.
  config.num_blocks = 1 + kRows * 2 * 2 * kBlocksEach;
  config.max_logprobs = 2;
  config.num_speculative_tokens = num_drafts;
  config.force_tokens = true;
  config.capture_sizes = {{1, 1}, {2, 1}, {4, 1}};
  if (num_drafts > 0) config.capture_sizes.push_back({2, 1 + num_drafts});
  config.piecewise_sizes = {8, 24};
  return config;
}

// What a step has said, without what was never written.
struct Said {
  std::vector<std::vector<int32_t>> entries, tokens;
  std::vector<TokenLogprob> logprobs;
  std::vector<std::tuple<int32_t, int32_t, bool, std::vector<TokenLogprob>>> scores;
  bool operator==(const Said&) const = default;
};

Said said(const StepOutput& output) {
  REQUIRE(output.error == "");
  Said all;
  for (size_t i = 0; i < output.entries.size(); ++i) {
    const OutputEntry& entry = output.entries[i];
    all.entries.push_back({entry.row, entry.generation, entry.num_computed, entry.total_len,
                           entry.num_tokens, entry.num_drafts, entry.num_accepted, entry.masked,
                           static_cast<int32_t>(entry.finish_reason), entry.stop_sequence});
    const std::span<const int32_t> tokens = output.tokens(i);
    all.tokens.emplace_back(tokens.begin(), tokens.end());
  }
  all.logprobs = output.logprobs;
  for (const PromptScores& scores : output.prompt_scores) {
    all.scores.emplace_back(scores.entry, scores.position, scores.complete, scores.logprobs);
  }
  return all;
}

using Ints = std::vector<std::pair<std::string, std::vector<int32_t>>>;

// Those of stages that draw nothing lack what is drawn.
Ints without_draws(Ints params) {
  std::erase_if(params, [](const auto& param) { return param.first == "sampled"; });
  return params;
}

// What has happened in random lives, so that a test knows that it did.
struct Seen {
  int masked = 0, accepted = 0, cuts = 0, forks = 0, pieces_in_row = 0, reused = 0, scored = 0;
};

// What a runner has shown in the course of random lives.
struct Trace {
  Seen seen;
  std::vector<Said> steps;
  std::vector<std::vector<float>> logits;
  std::vector<Ints> params;
  std::vector<std::vector<int32_t>> rows;  // at the end
};

// Random lives of rows, the same for every runner that gives the same results: prompts in pieces,
// decoding with drafts, masks, penalties and forced tokens, forks, ends, and rows that are freed
// and taken again while steps are in flight.
class Lives {
 public:
  Lives(ModelRunner& runner, uint32_t seed, size_t ahead) : runner_(runner), random_(seed) {
    ahead_ = ahead;
  }

  // `looks`: at what each step leaves on the devices of all ranks.
  Trace run(int num_steps, bool looks) {
    for (int i = 0; i < num_steps; ++i) {
      while (rows_.size() < static_cast<size_t>(kRows) && chance(60)) add();
      execute();
      if (looks) look();
      while (unread_.size() >= ahead_) read();
      for (size_t row = rows_.size(); row-- > 0;) {
        if (chance(rows_[row].ended ? 70 : 3)) remove(row);
      }
    }
    while (!unread_.empty()) read();
    for (int32_t row = 0; row < kRows; ++row) {
      const Row state = runner_.row_state(row);
      trace_.rows.push_back({state.generation, static_cast<int32_t>(state.phase),
                             state.num_computed, state.total_len, state.last_token,
                             static_cast<int32_t>(state.finish_reason)});
    }
    return std::move(trace_);
  }

 private:
  struct Life {
    RowHandle handle;
    RowSpec spec;
    int32_t set = 0;       // of blocks
    int32_t launched = 0;  // of the prompt
    int32_t decodes = 0;   // steps
    uint64_t piece = 0;    // newest step that left the prompt unfinished
    bool ended = false;
  };

  int32_t below(int32_t bound) {
    return static_cast<int32_t>(random_() % static_cast<uint32_t>(bound));
  }
  bool chance(int32_t percent) { return below(100) < percent; }
  int32_t groups() const { return static_cast<int32_t>(runner_.kv_layout().groups.size()); }

  std::vector<int32_t> blocks(int32_t row, int32_t set, int32_t group) const {
    std::vector<int32_t> ids(kBlocksEach);
    std::iota(ids.begin(), ids.end(), 1 + ((row * 2 + set) * 2 + group) * kBlocksEach);
    return ids;
  }

  void add() {
    Life life;
    RowSpec& spec = life.spec;
    // A prompt whose keys and values some row has is copied from it.
    const Life* source = nullptr;
    for (const Life& other : rows_) {
      if (other.launched == other.spec.prompt_len && other.spec.prompt_len > 1 && chance(20)) {
        source = &other;
      }
    }
    if (source != nullptr) {
      spec.token_ids = source->spec.token_ids;
    } else {
      spec.token_ids.resize(static_cast<size_t>(1 + below(30)));
      for (int32_t& token : spec.token_ids) token = below(chance(50) ? kVocab : 4);
    }
    spec.prompt_len = static_cast<int32_t>(spec.token_ids.size());
    spec.max_tokens = 1 + below(20);
    spec.temperature = chance(50) ? 0.0f : 0.9f;
    spec.top_k = chance(30) ? 10 : 0;
    spec.seed = random_();
    for (int32_t id = below(12); id < kVocab; id += 12) spec.stop_ids.push_back(id);
    if (chance(30)) spec.repetition_penalty = 1.2f;
    if (chance(30)) spec.num_logprobs = below(3);
    if (chance(20)) spec.grammar = true;
    if (chance(20)) spec.forced_token_ids = {below(kVocab), below(kVocab), below(kVocab)};
    if (chance(20) && source == nullptr) spec.num_prompt_logprobs = below(3);
    if (source != nullptr) spec.num_computed = life.launched = spec.prompt_len - 1;
    const std::vector<int32_t> from = source == nullptr ? std::vector<int32_t>{} : [&] {
      std::vector<int32_t> all;
      for (int32_t group = 0; group < groups(); ++group) {
        const auto ids = blocks(source->handle.row, source->set, group);
        all.insert(all.end(), ids.begin(), ids.end());
      }
      return all;
    }();
    life.handle = runner_.add_row(spec);
    const int32_t row = life.handle.row;
    life.set = life.handle.generation % 2;
    const auto before = used_until_.find({row, 1 - life.set});
    if (before != used_until_.end() && !unread_.empty() && unread_.front() <= before->second) {
      ++trace_.seen.reused;
    }
    trace_.seen.forks += source != nullptr;
    // Blocks are free once the steps of whoever had them have retired.
    while (!unread_.empty() && unread_.front() <= used_until_[{row, life.set}]) read();
    std::vector<BlockCopy> copies;
    for (int32_t group = 0; group < groups(); ++group) {
      const std::vector<int32_t> own = blocks(row, life.set, group);
      runner_.append_blocks(life.handle, group, own);
      for (size_t i = 0; source != nullptr && i < own.size(); ++i) {
        copies.push_back({from[static_cast<size_t>(group) * own.size() + i], own[i]});
      }
    }
    if (!copies.empty()) runner_.copy_blocks(copies);
    rows_.push_back(std::move(life));
  }

  void remove(size_t index) {
    const Life& life = rows_[index];
    used_until_[{life.handle.row, life.set}] = runner_.last_step(life.handle);
    runner_.free_row(life.handle);
    rows_.erase(rows_.begin() + static_cast<std::ptrdiff_t>(index));
  }

  void execute() {
    std::vector<size_t> order(rows_.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::shuffle(order.begin(), order.end(), random_);
    const int32_t share = chance(50) ? 100 : 50;
    std::vector<BatchItem> batch;
    int32_t room = runner_.config().max_num_batched_tokens;
    const int32_t most = 1 + runner_.config().num_speculative_tokens;
    for (const size_t index : order) {
      Life& life = rows_[index];
      const int32_t left = life.spec.prompt_len - life.launched;
      if (room == 0 || !chance(share)) continue;
      int32_t tokens = std::min({1 + below(12), room, left});
      if (left > 0) {
        life.launched += tokens;
      } else {
        // With drafts a step may have taken the row so far.
        if (1 + (life.decodes + 1) * most > life.spec.max_tokens) continue;
        ++life.decodes;
        tokens = life.spec.grammar ? 1 : std::min(1 + below(most), room);
      }
      room -= tokens;
      batch.push_back({life.handle.row, tokens, life.handle.generation});
    }
    if (batch.empty()) return;
    const uint64_t step = runner_.execute(batch);
    for (Life& life : rows_) {
      if (runner_.last_step(life.handle) != step || life.decodes > 0) continue;
      trace_.seen.pieces_in_row += life.piece != 0 && life.piece + 1 == step;
      life.piece = life.launched < life.spec.prompt_len ? step : 0;
    }
    if (runner_.cut_step() != 0) {
      ++trace_.seen.cuts;
      runner_.wait_masks();
      for (size_t i = 0; i < runner_.masked_items().size(); ++i) {
        for (uint32_t& word : runner_.masks().mask(runner_.masked_row(i))) {
          word = static_cast<uint32_t>(random_()) | 1;
        }
      }
      runner_.finish_step();
    }
    unread_.push_back(step);
    newest_ = static_cast<int32_t>(batch.size());
  }

  void look() {
    if (newest_ == 0) return;
    for (int32_t item = 0; item < newest_; ++item) trace_.logits.push_back(runner_.logits(item));
    const Ints params = runner_.infer_params();
    REQUIRE(runner_.settles(Clock::now() + seconds(20)));
    for (int rank = 0; rank < runner_.config().num_ranks; ++rank) {
      CAPTURE(rank);
      CHECK(without_draws(runner_.rank_runner(rank).infer_params()) == without_draws(params));
    }
    trace_.params.push_back(params);
  }

  void read() {
    const StepOutput output = runner_.result(unread_.front());
    unread_.erase(unread_.begin());
    trace_.steps.push_back(said(output));
    trace_.seen.scored += static_cast<int>(output.prompt_scores.size());
    for (const OutputEntry& entry : output.entries) {
      trace_.seen.masked += entry.masked;
      trace_.seen.accepted += entry.num_accepted;
      for (Life& life : rows_) {
        if (life.handle.row != entry.row || life.handle.generation != entry.generation) continue;
        life.ended |= entry.finish_reason != FinishReason::kNone;
      }
    }
  }

  ModelRunner& runner_;
  std::mt19937 random_;
  size_t ahead_;
  std::vector<Life> rows_;
  std::vector<uint64_t> unread_;
  std::map<std::pair<int32_t, int32_t>, uint64_t> used_until_;  // by row and set
  int32_t newest_ = 0;                                          // items
  Trace trace_;
};

void check_same(const Trace& trace, const Trace& expected) {
  CHECK(trace.steps == expected.steps);
  CHECK(trace.logits == expected.logits);
  CHECK(trace.params == expected.params);
  CHECK(trace.rows == expected.rows);
}

struct Layout {
  std::vector<int32_t> layers;
  int stage_ranks;
};

// Blocks for all that a row may hold.
std::vector<std::vector<int32_t>> simple_blocks(int32_t row) {
  std::vector<std::vector<int32_t>> blocks;
  for (int32_t group = 0; group < 2; ++group) {
    std::vector<int32_t>& ids = blocks.emplace_back(kBlocksEach);
    std::iota(ids.begin(), ids.end(), 1 + (row * 2 + group) * kBlocksEach);
  }
  return blocks;
}

// Decoded greedily.
RowHandle add_simple_row(ModelRunner& runner, int32_t row, int32_t max_tokens) {
  RowSpec spec;
  spec.token_ids = {5, 6, 7 + row};
  spec.prompt_len = 3;
  spec.temperature = 0.0f;
  spec.max_tokens = max_tokens;
  spec.block_ids = simple_blocks(row);
  return runner.add_row(spec);
}

}  // namespace

TEST_CASE("stages give the bits of one device, whatever rows live through") {
  for (const int32_t drafts : {0, 3}) {
    CAPTURE(drafts);
    for (const int stage_ranks : {1, 2}) {
      CAPTURE(stage_ranks);
      std::map<size_t, Trace> expected;  // by how far it runs ahead
      const std::vector<std::vector<int32_t>> cuts =
          stage_ranks == 2 ? std::vector<std::vector<int32_t>>{{4}, {1, 3}}
                           : std::vector<std::vector<int32_t>>{{4}, {2, 2}, {1, 2, 1}};
      for (const std::vector<int32_t>& layers : cuts) {
        CAPTURE(layers.size());
        for (const size_t ahead : {size_t{1}, size_t{4}}) {
          const bool looks = ahead == 1;
          CAPTURE(ahead);
          Pipeline pipeline(layers, stage_ranks, life_config(drafts), kWindows);
          const uint32_t seed = 7 + static_cast<uint32_t>(drafts);
          const Trace trace = Lives(*pipeline.runner, seed, ahead).run(looks ? 40 : 150, looks);
          if (ahead > 1) {
            const Seen& seen = trace.seen;
            CHECK(seen.masked * seen.cuts * seen.forks * seen.scored > 0);
            CHECK(seen.pieces_in_row * seen.reused > 0);
            CHECK((seen.accepted > 0) == (drafts > 0));
          }
          const auto [known, is_first] = expected.try_emplace(ahead, trace);
          if (!is_first) check_same(trace, known->second);
        }
      }
    }
  }
}

TEST_CASE("stages give the same bits in every mode of steps") {
  Trace expected;
  for (const StepMode mode : {StepMode::kEager, StepMode::kPiecewise, StepMode::kFull}) {
    CAPTURE(static_cast<int>(mode));
    RunnerConfig config = life_config(2);
    config.graph_mode = mode;
    Pipeline pipeline({1, 2, 1}, 1, config, kWindows);
    ModelRunner& runner = *pipeline.runner;
    runner.capture_graphs();
    const Trace trace = Lives(runner, 3, 3).run(100, false);
    if (mode == StepMode::kEager) {
      expected = trace;
    } else {
      check_same(trace, expected);
    }
    REQUIRE(runner.settles(Clock::now() + seconds(20)));
    for (int rank = 0; rank < 3; ++rank) {
      const RunnerStats stats = runner.rank_runner(rank).stats();
      for (int each = 0; each < kNumStepModes; ++each) {
        CHECK(stats.steps_by_mode[each] == runner.stats().steps_by_mode[each]);
      }
    }
    CHECK(runner.stats().steps_by_mode[static_cast<int>(mode)] > 0);
  }
}

TEST_CASE("a pipeline runs ahead of its outputs, with micro-batches and with one row") {
  for (const int32_t num_rows : {1, 3}) {
    CAPTURE(num_rows);
    std::vector<std::vector<int32_t>> expected;
    for (const std::vector<int32_t>& layers :
         std::vector<std::vector<int32_t>>{{4}, {2, 2}, {1, 2, 1}}) {
      Pipeline pipeline(layers, 1, life_config(), kWindows);
      ModelRunner& runner = *pipeline.runner;
      CHECK(runner.num_slots() == (layers.size() == 1 ? 4 : static_cast<int>(layers.size()) + 3));
      std::vector<uint64_t> steps;
      for (int32_t row = 0; row < num_rows; ++row) add_simple_row(runner, row, 40);
      // Far past the end of the rings, with nothing read.
      for (int i = 0; i < 15; ++i) {
        for (int32_t row = 0; row < num_rows; ++row) {
          steps.push_back(runner.execute(std::vector<BatchItem>{{row, i == 0 ? 3 : 1}}));
        }
      }
      std::vector<std::vector<int32_t>> tokens(static_cast<size_t>(num_rows));
      for (size_t i = 0; i < steps.size(); ++i) {
        const StepOutput output = runner.result(steps[i]);
        REQUIRE(output.error == "");
        tokens[i % tokens.size()].push_back(output.tokens(0)[0]);
      }
      if (expected.empty()) expected = tokens;
      CHECK(tokens == expected);
    }
  }
}

TEST_CASE("pieces of a prompt follow each other without news from the last stage") {
  std::vector<std::vector<int32_t>> expected;
  for (const bool held : {false, true}) {
    Pipeline pipeline({1, 2, 1}, 1, life_config(), kWindows);
    ModelRunner& runner = *pipeline.runner;
    RowSpec spec;
    for (int32_t token = 5; token < 20; ++token) spec.token_ids.push_back(token);
    spec.prompt_len = static_cast<int32_t>(spec.token_ids.size());
    spec.temperature = 0.0f;
    spec.max_tokens = 10;
    spec.block_ids = simple_blocks(0);
    const RowHandle row = runner.add_row(spec);
    std::optional<Hold> hold;
    if (held) hold.emplace(*pipeline.devices[2]);
    std::vector<uint64_t> steps;
    for (const int32_t tokens : {6, 5, 4, 1}) {
      steps.push_back(runner.execute(std::vector<BatchItem>{{row.row, tokens}}));
      if (!held || steps.size() != 2) continue;
      // The first stage ends both steps.
      while (runner.rank_runner(0).stats().steps < runner.stats().steps) std::this_thread::yield();
      pipeline.devices[0]->synchronize();
      CHECK_NOTHROW(runner.check_ranks());
      CHECK(!runner.ready(steps[0]));
      hold->let_go();
    }
    std::vector<std::vector<int32_t>> tokens;
    for (const uint64_t step : steps) tokens.push_back(said(runner.result(step)).tokens[0]);
    if (expected.empty()) expected = tokens;
    CHECK(tokens == expected);
    CHECK(tokens[2].size() == 1);
  }
}

TEST_CASE("a row that takes more records than the rings hold reaches every stage") {
  RunnerConfig config = small_config();
  config.sampling_words = 1 << 19;
  Pipeline pipeline({1, 1}, 1, config, {0, 0});
  ModelRunner& runner = *pipeline.runner;
  RowSpec spec;
  spec.token_ids = {5};
  spec.prompt_len = 1;
  spec.bad_words.assign(8, std::vector<int32_t>(60000, 7));
  const uint64_t before = runner.stats().steps;
  runner.add_row(spec);
  CHECK(runner.stats().steps - before > static_cast<uint64_t>(runner.num_slots()) + 1);
  REQUIRE(runner.settles(Clock::now() + seconds(20)));
  CHECK_NOTHROW(runner.check_ranks());
  for (int rank = 0; rank < 2; ++rank) {
    CHECK(runner.rank_runner(rank).stats().steps == runner.stats().steps);
  }
}

TEST_CASE("followers learn how far rows with drafts have come") {
  RunnerConfig config = life_config(3);
  Pipeline pipeline({1, 2, 1}, 1, config, kWindows);
  ModelRunner& runner = *pipeline.runner;
  RowSpec spec;
  spec.token_ids = {5, 6, 7};
  spec.prompt_len = 3;
  spec.temperature = 0.0f;
  spec.max_tokens = 45;
  const RowHandle row = runner.add_row(spec);
  // Blocks for as much as the next step may take, from what results have said.
  int32_t num_blocks = 0, num_computed = 0;
  for (int32_t tokens = 3; num_computed < 44;) {
    const int32_t needed = std::min(num_computed + tokens, spec.prompt_len + spec.max_tokens - 1);
    while (num_blocks * kBlockTokens < needed) {
      for (int32_t group = 0; group < 2; ++group) {
        const int32_t block = 1 + 2 * num_blocks + group;
        runner.append_blocks(row, group, std::span(&block, 1));
      }
      ++num_blocks;
    }
    const StepOutput output =
        runner.result(runner.execute(std::vector<BatchItem>{{row.row, tokens}}));
    REQUIRE(output.error == "");
    num_computed = output.entries[0].num_computed;
    tokens = 4;
  }
  REQUIRE(runner.settles(Clock::now() + seconds(20)));
  CHECK_NOTHROW(runner.check_ranks());
}

TEST_CASE("a steady step of a pipeline allocates nothing") {
  Pipeline pipeline({1, 2, 1}, 1, life_config(2), kWindows);
  ModelRunner& runner = *pipeline.runner;
  for (int32_t row = 0; row < 3; ++row) {
    add_simple_row(runner, row, 50);
    runner.result(runner.execute(std::vector<BatchItem>{{row, 3}}));
  }
  std::vector<std::vector<BatchItem>> batches;
  for (int32_t row = 0; row < 3; ++row) batches.push_back({{row, 1}});
  StepOutput output;
  std::vector<uint64_t> steps(3);
  const auto rounds = [&](int count) {
    for (int i = 0; i < count; ++i) {
      for (size_t j = 0; j < batches.size(); ++j) steps[j] = runner.execute(batches[j]);
      for (const uint64_t step : steps) runner.result(step, output);
    }
    for (int rank = 0; rank < 2; ++rank) {
      while (runner.rank_runner(rank).stats().batches < runner.stats().batches) {
        std::this_thread::yield();
      }
    }
  };
  rounds(12);
  REQUIRE(runner.settles(Clock::now() + seconds(20)));
  const int64_t before = count_allocations();
  rounds(25);
  CHECK(count_allocations() == before);
  CHECK(output.error == "");
}

TEST_CASE("a step that fails on a rank of a pipeline ends the group, and names the rank") {
  for (const int rank : {0, 1, 2, ModelRunner::kAllRanks}) {
    CAPTURE(rank);
    Pipeline pipeline({1, 2, 1}, 1, life_config(), kWindows);
    ModelRunner& runner = *pipeline.runner;
    add_simple_row(runner, 0, 40);
    for (int i = 0; i < 3; ++i) {
      CHECK(runner.result(runner.execute(std::vector<BatchItem>{{0, i == 0 ? 3 : 1}})).error == "");
    }
    runner.fail_next_step("no luck", rank);
    const auto start = Clock::now();
    std::vector<uint64_t> steps;
    try {
      for (int i = 0; i < 4; ++i) steps.push_back(runner.execute(std::vector<BatchItem>{{0, 1}}));
    } catch (const Error&) {
      // The rank may have failed before the last one is launched.
    }
    REQUIRE(!steps.empty());
    for (size_t i = 0; i < steps.size(); ++i) {
      const std::string error = runner.result(steps[i]).error;
      // A stage before the last has sent what the step needs of it when it fails.
      const bool may_succeed = i == 0 && (rank == 0 || rank == 1);
      if (may_succeed && error.empty()) continue;
      CHECK(has(error, "no luck"));
      if (rank >= 0) {
        CHECK(has(error, concat("rank ", rank, " (stage ", rank, ") failed in step ")));
      }
    }
    CHECK_THROWS_WITH_AS(runner.check_ranks(), doctest::Contains("no luck"), Error);
    CHECK(Clock::now() - start < seconds(5));
  }
}

TEST_CASE("a rank of a pipeline that hangs ends the group, wherever the others wait for it") {
  RunnerConfig config = life_config();
  config.rank_timeout = milliseconds(250);
  for (const int rank : {0, 1, 2}) {
    CAPTURE(rank);
    auto pipeline = std::make_unique<Pipeline>(std::vector<int32_t>{1, 2, 1}, 1, config, kWindows);
    const std::shared_ptr<Device> stuck = pipeline->devices[static_cast<size_t>(rank)];
    ModelRunner* runner = pipeline->runner.get();
    for (int32_t row = 0; row < 3; ++row) {
      add_simple_row(*runner, row, 40);
      CHECK(runner->result(runner->execute(std::vector<BatchItem>{{row, 3}})).error == "");
    }
    Hold hold(*stuck);
    const auto start = Clock::now();
    const std::string name = concat("rank ", rank, " (stage ", rank, ") did not ");
    std::vector<uint64_t> steps;
    // Until others wait for outputs, values, or places for either.
    const std::string error = message_of([&] {
      for (int i = 0; i < 12; ++i) {
        steps.push_back(runner->execute(std::vector<BatchItem>{{i % 3, 1}}));
      }
    });
    REQUIRE(!steps.empty());
    CHECK((error.empty() || has(error, name)));
    CHECK_THROWS_WITH_AS(runner->check_ranks(), doctest::Contains(name.c_str()), Error);
    hold.let_go();
    CHECK(has(runner->result(steps[0]).error, name));
    pipeline.reset();
    CHECK(Clock::now() - start < seconds(10));
    CHECK(stuck.use_count() == 1);  // all is given back
  }
}

TEST_CASE("no rank goes on before all have allocated what a row needs") {
  RunnerConfig config = life_config();
  config.sampling_words = 64;
  for (const bool grammar : {false, true}) {
    CAPTURE(grammar);
    // Two ranks have masks.
    Pipeline pipeline({3, 1}, 2, config, kWindows);
    ModelRunner& runner = *pipeline.runner;
    RowSpec spec;
    spec.token_ids = {5, 6, 7};
    spec.prompt_len = 3;
    spec.grammar = grammar;
    if (!grammar) spec.bad_words.assign(40, {1, 2, 3});
    for (int i = 0; i < 3; ++i) {
      runner.add_row(spec);
      if (grammar && i > 0) continue;
      for (int rank = 0; rank < 4; ++rank) {
        CAPTURE(rank);
        CHECK(runner.rank_runner(rank).free_rows() == runner.free_rows());
      }
    }
  }
}

TEST_CASE("rows are given back at once when the group has ended, whoever is stuck") {
  RunnerConfig config = life_config();
  config.rank_timeout = milliseconds(100);
  Pipeline pipeline({3, 1}, 1, config, kWindows);
  ModelRunner& runner = *pipeline.runner;
  // The rank's device takes no more work, so that its thread hangs too.
  Hold hold(*pipeline.devices[0]);
  for (int i = 0; i < 63; ++i) pipeline.devices[0]->submit([](void*) {}, nullptr);
  const RowHandle row = add_simple_row(runner, 0, 40);
  const uint64_t step = runner.execute(std::vector<BatchItem>{{0, 3}});
  CHECK(has(runner.result(step).error, "rank 0 (stage 0) did not "));
  runner.free_row(row);
  // More than a rank that is stuck has places for.
  const std::string error = message_of([&] {
    for (int i = 0; i < 200; ++i) runner.free_row(add_simple_row(runner, 0, 40));
  });
  CHECK(error == "");
  hold.let_go();
}

TEST_CASE("a last stage that hangs alone is missed by whoever waits for its outputs") {
  RunnerConfig config = life_config();
  config.rank_timeout = milliseconds(250);
  Pipeline pipeline({3, 1}, 1, config, kWindows);
  ModelRunner& runner = *pipeline.runner;
  add_simple_row(runner, 0, 40);
  Hold hold(*pipeline.devices[1]);
  const uint64_t step = runner.execute(std::vector<BatchItem>{{0, 3}});
  CHECK(has(runner.result(step).error, "rank 1 (stage 1) did not end step 1 within 250 ms"));
  hold.let_go();
}

TEST_CASE("stages that do not fit each other are refused") {
  const Program whole = small_model(kWindows, false, false);
  const auto make = [&](std::vector<Program> programs, int32_t num_stages) {
    RunnerConfig config = life_config();
    config.num_ranks = static_cast<int32_t>(programs.size());
    config.num_stages = num_stages;
    std::vector<std::shared_ptr<Device>> devices;
    for (size_t i = 0; i < programs.size(); ++i) devices.push_back(make_cpu_device(1));
    make_runner(devices, programs, std::vector<RunnerConfig>(programs.size(), config));
  };
  CHECK_NOTHROW(make({whole.stage(0, 1), whole.stage(1, 4)}, 2));
  CHECK_THROWS_WITH_AS(make({whole.stage(0, 1), whole.stage(1, 4)}, 1),
                       doctest::Contains("no logits"), Error);
  CHECK_THROWS_WITH_AS(make({whole.stage(1, 4), whole.stage(0, 1)}, 2), doctest::Contains("stage"),
                       Error);
  CHECK_THROWS_WITH_AS(make({whole, whole}, 2), doctest::Contains("stage"), Error);
  CHECK_THROWS_WITH_AS(make({whole.stage(0, 1), whole.stage(1, 2), whole.stage(2, 4)}, 2),
                       doctest::Contains("stages"), Error);
}

}  // namespace mrv1
