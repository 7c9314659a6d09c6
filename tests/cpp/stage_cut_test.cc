// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Programs of stages: what each has of the whole, and that one after the other they compute its
// bits. What passes between them is copied by hand here.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "core/error.h"
#include "io/weight_store.h"
#include "program/executable.h"
#include "program/kv_store.h"
#include "program/stage.h"
#include "small_model.h"

namespace mrv1 {
namespace {

constexpr int32_t kTokens = 8, kBlocks = 40, kBlockSize = 4, kMaxBlocks = 4;
constexpr PlanLimits kLimits{kTokens, 1, 1, 0};

// A model whose layers read more than what the layer before leaves behind: the embedding, and what
// the first layer wrote, which the last one adds to its own.
Program model_with_carried_values(int32_t num_layers) {
  Program program(DType::kF32);
  const int32_t table = matrix(program, "embed", kVocab, kHidden);
  const int32_t embedded = program.embedding(table, 1.0f);
  const HeadShape heads{kHeads, kKvHeads, kHeadDim};
  int32_t x = embedded, early = -1;
  for (int32_t layer = 0; layer < num_layers; ++layer) {
    const std::string name = std::to_string(layer);
    program.begin_layer(layer);
    const int32_t normed = program.rms_norm(x, vector(program, "norm" + name, kHidden), 1e-6f);
    const int32_t qkv = program.linear(
        normed, matrix(program, "qkv" + name, heads.qkv_cols(), kHidden), -1, -1, false);
    Program::AttentionSpec spec;
    spec.heads = heads;
    spec.scale = 0.2f;
    spec.kv_layer = layer;
    const int32_t mixed = program.attention(qkv, spec);
    x = program.linear(mixed, matrix(program, "o" + name, kHidden, heads.q_cols()), -1, embedded,
                       true);
    if (layer == 0) early = normed;
    if (layer == num_layers - 1) x = program.add(x, early);
    program.end_layer();
  }
  program.logits(x, matrix(program, "head", kVocab, kHidden), 0.0f);
  return program;
}

// A program with weights that follow from their names, and memory of its own.
class Part {
 public:
  explicit Part(Program program)
      : device_(make_cpu_device(1)),
        program_(std::move(program)),
        weights_(program_, *device_),
        kv_(*device_, {}, program_, kBlocks, kBlockSize),
        executable_(program_, kLimits, *device_, weights_.views(), kv_.layers(), kTokens * 2) {
    for (size_t i = 0; i < program_.weights().size(); ++i) fill(static_cast<int32_t>(i));
    weights_.check_complete();
    const auto bytes = device_->kernels().workspace_bytes(
        Executable::workspace_limits(program_, kLimits, *device_));
    workspace_.resize(static_cast<size_t>(bytes));
  }

  const Program& program() const { return program_; }
  char* value(int32_t id) { return static_cast<char*>(executable_.value(id)); }

  // What the last run sent.
  const std::vector<std::vector<char>>& sent() const { return sent_; }

  // All ops but those that talk to other stages.
  void run(StepContext ctx) {
    ctx.device = device_.get();
    ctx.pool = device_->pool();
    ctx.workspace = workspace_.data();
    ctx.workspace_bytes = workspace_.size();
    executable_.plan_attention(ctx);
    for (size_t i = 0; i < program_.ops().size(); ++i) {
      const OpKind kind = program_.ops()[i].kind;
      if (kind == OpKind::kStageReceive) continue;
      if (kind == OpKind::kStageSend) {
        sent_.clear();
        for (const int32_t id : program_.sent().ids) {
          sent_.emplace_back(value(id), value(id) + bytes_of(id));
        }
        continue;
      }
      if (kind == OpKind::kStageRelease) {
        // Whoever reads a received value later would read this.
        for (const int32_t id : program_.received().ids) {
          std::memset(value(id), 0xff, static_cast<size_t>(bytes_of(id)));
        }
        continue;
      }
      executable_.run(ctx, i, i + 1);
    }
  }

 private:
  int64_t bytes_of(int32_t id) const {
    const Value& value = program_.values()[id];
    return kTokens * value.cols * static_cast<int64_t>(dtype_size(value.dtype));
  }

  void fill(int32_t weight) {
    const WeightSpec& spec = program_.weights()[weight];
    std::mt19937 random(static_cast<uint32_t>(std::hash<std::string>{}(spec.name)));
    std::uniform_real_distribution<float> uniform(-0.3f, 0.3f);
    std::vector<float> values(static_cast<size_t>(spec.rows * spec.cols));
    for (float& value : values) value = uniform(random);
    weights_.load_segment(weight, 0, values.data(), DType::kF32);
  }

  std::shared_ptr<Device> device_;
  Program program_;
  WeightStore weights_;
  KvStore kv_;
  Executable executable_;
  std::vector<char> workspace_;
  std::vector<std::vector<char>> sent_;
};

// One request: its whole prompt, then a token at a time.
class Request {
 public:
  explicit Request(int32_t num_groups) : table_(num_groups * kMaxBlocks) {
    for (size_t i = 0; i < table_.size(); ++i) table_[i] = static_cast<int32_t>(i) + 1;
    slots_.resize(static_cast<size_t>(num_groups * kTokens));
    ctx_.rows.num_rows = 1;
    ctx_.rows.num_groups = num_groups;
    ctx_.rows.block_size = kBlockSize;
    ctx_.rows.max_blocks = kMaxBlocks;
    ctx_.rows.max_model_len = kMaxBlocks * kBlockSize;
    ctx_.rows.block_table = table_.data();
    InferParams& infer = ctx_.infer;
    infer.counts = &counts_;
    infer.row = infer.logits_batch = &row_;
    infer.query_start_loc = starts_;
    infer.seq_lens = &length_;
    infer.token_batch = batch_.data();
    infer.token_ids = ids_.data();
    infer.positions = positions_.data();
    infer.slot_mapping = slots_.data();
    infer.logits_indices = &last_;
    infer.max_requests = infer.max_logits = 1;
    infer.max_tokens = kTokens;
  }

  const StepContext& next(int32_t num_tokens) {
    const bool is_prompt = length_ == 0;
    for (int32_t i = 0; i < num_tokens; ++i) {
      positions_[i] = length_ + i;
      ids_[i] = (positions_[i] * 37 + 11) % kVocab;
      for (int32_t group = 0; group < ctx_.rows.num_groups; ++group) {
        slots_[group * kTokens + i] = token_slot(ctx_.rows, group, 0, positions_[i]);
      }
    }
    length_ += num_tokens;
    last_ = num_tokens - 1;
    starts_[1] = num_tokens;
    counts_ = {1, num_tokens, 1, is_prompt ? 0 : 1, 0, is_prompt ? 1 : 0};
    ctx_.sizes = {1, num_tokens, 1};
    return ctx_;
  }

 private:
  InferCounts counts_{};
  int32_t row_ = 0, length_ = 0, last_ = 0;
  int32_t starts_[2] = {};
  std::vector<int32_t> batch_ = std::vector<int32_t>(kTokens), ids_ = std::vector<int32_t>(kTokens),
                       positions_ = std::vector<int32_t>(kTokens);
  std::vector<int32_t> table_, slots_;
  StepContext ctx_;
};

// Logits of all steps of a request.
std::vector<std::vector<char>> run_stages(std::vector<Program> programs) {
  const auto groups = static_cast<int32_t>(programs[0].kv_layout().groups.size());
  std::vector<std::unique_ptr<Part>> parts;
  for (Program& program : programs) parts.push_back(std::make_unique<Part>(std::move(program)));
  Request request(groups);
  std::vector<std::vector<char>> logits;
  for (const int32_t tokens : {7, 1, 1, 1}) {
    const StepContext& ctx = request.next(tokens);
    for (size_t stage = 0; stage < parts.size(); ++stage) {
      if (stage > 0) {
        const std::vector<int32_t>& received = parts[stage]->program().received().ids;
        const std::vector<std::vector<char>>& sent = parts[stage - 1]->sent();
        for (size_t i = 0; i < received.size(); ++i) {
          std::memcpy(parts[stage]->value(received[i]), sent.at(i).data(), sent[i].size());
        }
      }
      parts[stage]->run(ctx);
    }
    const char* row = parts.back()->value(parts.back()->program().logits_value());
    logits.emplace_back(row, row + kVocab * sizeof(float));
  }
  return logits;
}

std::vector<Program> cut(const Program& whole, const std::vector<int32_t>& counts, bool fused) {
  std::vector<Program> parts;
  int32_t first = 0;
  for (const int32_t count : counts) {
    parts.push_back(whole.stage(first, first + count));
    first += count;
    if (fused) parts.back().fuse();
  }
  return parts;
}

// All ways to cut so many layers in two, and a layer a stage.
std::vector<std::vector<int32_t>> ways_to_cut(int32_t layers) {
  std::vector<std::vector<int32_t>> ways = {std::vector<int32_t>(layers, 1)};
  for (int32_t first = 1; first < layers; ++first) ways.push_back({first, layers - first});
  return ways;
}

std::vector<std::string> keys_of(const CrossingValues& values) {
  std::vector<std::string> keys;
  for (const StageValue& value : values.schema) keys.push_back(value.name);
  return keys;
}

std::vector<std::string> op_names(const Program& program) {
  std::vector<std::string> names;
  for (const Op& op : program.ops()) names.emplace_back(op_name(op));
  return names;
}

std::vector<Program> test_models() {
  return {small_model({0, 0, 0}, false, false), small_model({8, 0, 8, 4, 8, 0}, false, false),
          model_with_carried_values(4)};
}

TEST_CASE("stages one after the other give the bits of the whole") {
  for (const Program& model : test_models()) {
    for (const bool fused : {false, true}) {
      CAPTURE(fused);
      Program whole = model;
      if (fused) whole.fuse();
      const auto expected = run_stages({whole});
      CHECK(expected[0] != expected[1]);
      for (const std::vector<int32_t>& counts : ways_to_cut(model.num_layers())) {
        CAPTURE(counts.size());
        CAPTURE(counts[0]);
        CHECK(run_stages(cut(model, counts, fused)) == expected);
      }
    }
  }
}

TEST_CASE("stages share out the ops, weights and kv layers of the whole") {
  for (const Program& model : test_models()) {
    for (const std::vector<int32_t>& counts : ways_to_cut(model.num_layers())) {
      std::vector<std::string> names;
      std::set<std::string> weights;
      size_t kv_layers = 0;
      const std::vector<Program> parts = cut(model, counts, false);
      for (size_t stage = 0; stage < parts.size(); ++stage) {
        const Program& part = parts[stage];
        std::vector<std::string> own = op_names(part);
        if (stage > 0) {
          CHECK(own.front() == "stage_receive");
          own.erase(own.begin());
          CHECK(std::count(own.begin(), own.end(), "stage_release") == 1);
          std::erase(own, "stage_release");
          CHECK(part.received().schema == parts[stage - 1].sent().schema);
        }
        if (stage + 1 < parts.size()) {
          CHECK(std::count(own.begin(), own.end(), "stage_send") == 1);
          CHECK(own.back() == "stage_send");
          own.pop_back();
        }
        names.insert(names.end(), own.begin(), own.end());
        std::set<int32_t> used;
        for (const Op& op : part.ops()) used.insert(op.weights.begin(), op.weights.end());
        CHECK(used.size() == part.weights().size());
        for (const WeightSpec& weight : part.weights()) weights.insert(weight.name);
        kv_layers += part.kv_layers().size();
        CHECK(part.vocab_size() == kVocab);
        CHECK((part.logits_value() >= 0) == (stage + 1 == parts.size()));
        CHECK((part.hidden_value() >= 0) == (part.logits_value() >= 0));
        CHECK(part.outputs().size() == (stage + 1 == parts.size() ? 1 : 0));
      }
      CHECK(names == op_names(model));
      CHECK(weights.size() == model.weights().size());
      CHECK(kv_layers == model.kv_layers().size());
    }
  }
}

TEST_CASE("a tied embedding is on the first stage and on the last") {
  const Program model = small_model({0, 0, 0}, false, false);
  for (const int32_t stage : {0, 1, 2}) {
    const std::vector<WeightSpec> weights = model.stage(stage, stage + 1).weights();
    const bool has_table = std::any_of(weights.begin(), weights.end(),
                                       [](const auto& weight) { return weight.name == "embed"; });
    CHECK(has_table == (stage != 1));
  }
}

TEST_CASE("values that cross are known by what they are") {
  const Program plain = small_model({0, 0, 0}, false, false);
  CHECK(plain.stage(1, 2).received().schema ==
        std::vector<StageValue>{{"hidden", kHidden, DType::kBF16}});
  CHECK(plain.stage(0, 3).received().ids.empty());
  CHECK(plain.stage(0, 3).sent().ids.empty());

  const Program carried = model_with_carried_values(4);
  const std::vector<std::string> keys = keys_of(carried.stage(1, 2).received());
  CHECK(keys == std::vector<std::string>{"embedding.0", "rms_norm.1", "hidden"});
  // What passes through a stage keeps its name.
  CHECK(keys_of(carried.stage(1, 2).sent()) == keys);
  CHECK(keys_of(carried.stage(3, 4).received()) == keys);

  Program many(DType::kF32);
  std::vector<int32_t> values;
  const int32_t norm = vector(many, "norm", 16);
  const int32_t input = many.input("x", 16, RowSpace::kTokens);
  many.begin_layer(0);
  for (int i = 0; i < kMaxStageValues; ++i) values.push_back(many.rms_norm(input, norm, 1e-6f));
  many.end_layer();
  many.begin_layer(1);
  int32_t sum = input;
  for (const int32_t value : values) sum = many.add(sum, value);
  many.end_layer();
  many.output(sum);
  CHECK_THROWS_WITH_AS(many.stage(0, 1), doctest::Contains("5 values from before it, at most 4"),
                       Error);
}

TEST_CASE("received values lie where nothing else does") {
  const Program part = model_with_carried_values(4).stage(1, 3);
  const Plan plan = plan_buffers(part, kLimits);
  for (const int32_t id : part.received().ids) {
    const int64_t first = plan.offsets[id];
    const int64_t last = first + value_bytes(part.values()[id], kLimits);
    for (size_t other = 0; other < part.values().size(); ++other) {
      if (static_cast<int32_t>(other) == id || plan.offsets[other] < 0) continue;
      const int64_t end = plan.offsets[other] + value_bytes(part.values()[other], kLimits);
      CHECK((end <= first || plan.offsets[other] >= last));
    }
  }
}

// In a fused stage the last reader may be another op than before.
TEST_CASE("values are let go of behind their last reader") {
  for (const Program& model : test_models()) {
    for (const bool fused : {false, true}) {
      for (int32_t first = 1; first < model.num_layers(); ++first) {
        Program part = model.stage(first, model.num_layers());
        if (fused) part.fuse();
        const std::vector<Op>& ops = part.ops();
        size_t last = 0;
        for (size_t i = 0; i < ops.size(); ++i) {
          for (const int32_t id : part.received().ids) {
            if (std::count(ops[i].inputs.begin(), ops[i].inputs.end(), id) > 0) last = i;
          }
        }
        CHECK(ops.at(last + 1).kind == OpKind::kStageRelease);
      }
    }
  }
}

// The output head may run several times a step, so that the release must not be part of it.
TEST_CASE("values that the head reads are let go of at the end") {
  Program model(DType::kF32);
  const int32_t x = model.embedding(matrix(model, "embed", kVocab, kHidden), 1.0f);
  for (const int32_t layer : {0, 1}) {
    model.begin_layer(layer);
    model.rms_norm(x, vector(model, "norm" + std::to_string(layer), kHidden), 1e-6f);
    model.end_layer();
  }
  model.logits(x, matrix(model, "head", kVocab, kHidden), 3.0f);
  CHECK(op_names(model.stage(1, 2)) == std::vector<std::string>{"stage_receive", "rms_norm",
                                                                "gather_rows", "linear", "soft_cap",
                                                                "stage_release"});
}

TEST_CASE("kv layouts of stages have the groups of the whole and no unused slots") {
  const Program model = small_model({8, 0, 8, 4, 8, 0}, false, false);
  const KvLayout whole = model.kv_layout();
  REQUIRE(whole.num_slots == 1);
  const KvCacheSpec spec;
  const auto check_part = [&](const Program& from, int32_t first, int32_t last) {
    const Program part = from.stage(first, last);
    const KvLayout all = from.kv_layout(), layout = part.kv_layout();
    REQUIRE(layout.groups.size() == all.groups.size());
    std::map<int32_t, std::set<int32_t>> slots;  // by group
    size_t most = 0;
    for (size_t i = 0; i < layout.layers.size(); ++i) {
      const KvPlace& place = layout.layers[i];
      CHECK(place.group == all.layers[static_cast<size_t>(first) + i].group);
      CHECK(slots[place.group].insert(place.slot).second);
      most = std::max(most, slots[place.group].size());
    }
    for (const auto& [group, taken] : slots) {
      CHECK(*taken.rbegin() == static_cast<int32_t>(taken.size()) - 1);
    }
    CHECK(layout.num_slots == static_cast<int32_t>(most));
    CHECK(layout.slot_layers().size() == most);
    const int64_t layer = KvStore::block_bytes(spec, from, kBlockSize) / all.num_slots;
    CHECK(KvStore::block_bytes(spec, part, kBlockSize) == static_cast<int64_t>(most) * layer);
  };
  for (int32_t first = 0; first < 6; ++first) {
    for (int32_t last = first + 1; last <= 6; ++last) check_part(model, first, last);
  }
  // Groups of several layers, some of which are on no stage but one.
  const Program wide = small_model({0, 0, 0, 8, 8, 8, 8}, false, false);
  REQUIRE(wide.kv_layout().num_slots == 3);
  for (int32_t first = 0; first < 7; ++first) {
    for (int32_t last = first + 1; last <= 7; ++last) check_part(wide, first, last);
  }
}

TEST_CASE("what cannot be cut is refused") {
  const Program model = small_model({0, 0}, false, false);
  CHECK_THROWS_WITH_AS(model.stage(0, 3), doctest::Contains("none of a model of 2"), Error);
  CHECK_THROWS_WITH_AS(model.stage(1, 1), doctest::Contains("layers [1, 1)"), Error);
  CHECK_THROWS_WITH_AS(model.stage(-1, 1), doctest::Contains("layers [-1, 1)"), Error);
  CHECK_THROWS_WITH_AS(small_model({0, 0}).stage(0, 1), doctest::Contains("fused already"), Error);
  CHECK_THROWS_WITH_AS(model.stage(0, 1).stage(0, 1), doctest::Contains("a stage already"), Error);
  Program backwards(DType::kF32);
  int32_t x = backwards.input("x", 16, RowSpace::kTokens);
  const int32_t norm = vector(backwards, "norm", 16);
  for (const int32_t layer : {1, 0}) {
    backwards.begin_layer(layer);
    x = backwards.rms_norm(x, norm, 1e-6f);
    backwards.end_layer();
  }
  CHECK_THROWS_WITH_AS(backwards.stage(0, 1), doctest::Contains("must follow each other"), Error);
}

// The least cost of the costliest stage, by trying everything.
int64_t best_of_all(const std::vector<int64_t>& costs, size_t first, int stages) {
  if (stages == 1) {
    int64_t sum = 0;
    for (size_t i = first; i < costs.size(); ++i) sum += costs[i];
    return sum;
  }
  int64_t best = std::numeric_limits<int64_t>::max(), sum = 0;
  for (size_t next = first + 1; next + stages - 1 <= costs.size(); ++next) {
    sum += costs[next - 1];
    best = std::min(best, std::max(sum, best_of_all(costs, next, stages - 1)));
  }
  return best;
}

TEST_CASE("layers are shared out so that the costliest stage costs least") {
  std::mt19937 random(3);
  for (int run = 0; run < 60; ++run) {
    std::vector<int64_t> costs(1 + random() % 9);
    for (int64_t& cost : costs) cost = static_cast<int64_t>(random() % 20);
    for (int stages = 1; stages <= static_cast<int>(std::min<size_t>(costs.size(), 5)); ++stages) {
      const std::vector<int32_t> counts = balance_layers(costs, stages);
      REQUIRE(static_cast<int>(counts.size()) == stages);
      int64_t most = 0;
      size_t next = 0;
      for (const int32_t count : counts) {
        REQUIRE(count >= 1);
        int64_t sum = 0;
        for (int32_t i = 0; i < count; ++i) sum += costs.at(next++);
        most = std::max(most, sum);
      }
      CHECK(next == costs.size());
      CHECK(most == best_of_all(costs, 0, stages));
    }
  }
  const auto shared = [](std::vector<int64_t> costs, int32_t stages) {
    return balance_layers(costs, stages);
  };
  CHECK(shared({5, 5, 5, 5, 5}, 2) == std::vector<int32_t>{3, 2});
  CHECK(shared(std::vector<int64_t>(8, 5), 4) == std::vector<int32_t>{2, 2, 2, 2});
  // The stage that is costliest anyway takes nothing from the others' balance.
  CHECK(shared({1, 1, 1, 1, 9}, 3) == std::vector<int32_t>{2, 2, 1});
  CHECK_THROWS_WITH_AS(shared({1, 1}, 3), doctest::Contains("a model of 2 layers cannot have 3"),
                       Error);
}

TEST_CASE("the head weighs for the last layer, the embedding for none") {
  const Program model = small_model({0, 0, 0}, false, false);
  const std::vector<int64_t> costs = layer_costs(model);
  REQUIRE(costs.size() == 3);
  const int64_t layer =
      2 * (kHidden * (4 * kHeadDim) + kHidden * 64 + 3 * 80 * kHidden) + 4 * (2 * kHidden);
  CHECK(costs[0] == layer);
  CHECK(costs[1] == layer);
  CHECK(costs[2] == layer + 2 * kVocab * kHidden + 4 * kHidden);
  // As of Llama 3 8B: a head as heavy as 2.4 of 32 layers.
  std::vector<int64_t> llama(32, 436);
  llama.back() += 1051;
  CHECK(balance_layers(llama, 2) == std::vector<int32_t>{17, 15});
}

}  // namespace
}  // namespace mrv1
