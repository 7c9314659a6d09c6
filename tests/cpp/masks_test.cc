// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Steps that are cut before the draw: in the runner, and in an engine with a source of masks whose
// grammar can be told from the tokens. For the sanitizers too.
#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "allocations.h"
#include "core/error.h"
#include "engine/engine_thread.h"
#include "small_model.h"

namespace mrv1 {
namespace {

// Each token follows from the one before it: sample s counts up by 1 + s, from its first.
class Counting final : public Grammar {
 public:
  static constexpr int32_t kFirst = 5;

  static int32_t next(int32_t token, int32_t sample) { return (token + 1 + sample) % kVocab; }
  static std::vector<int32_t> outputs(int32_t count, int32_t sample) {
    std::vector<int32_t> tokens;
    for (int32_t token = kFirst; static_cast<int32_t>(tokens.size()) < count;) {
      tokens.push_back(token);
      token = next(token, sample);
    }
    return tokens;
  }

  int32_t fails_at = INT32_MAX;  // outputs of sample 0 at which there is no mask
  std::vector<std::vector<int32_t>> heard = std::vector<std::vector<int32_t>>(8);
};

class CountingSource final : public MaskSource {
 public:
  void fill(std::span<MaskRequest> requests, uint32_t* masks, int32_t num_rows,
            int32_t words) override {
    ++calls;
    if (calls == throws_in) throw std::runtime_error("no masks today");
    std::set<int32_t> rows;
    for (MaskRequest& request : requests) {
      auto& grammar = static_cast<Counting&>(*request.grammar);
      std::vector<int32_t>& heard = grammar.heard[request.sample];
      heard.insert(heard.end(), request.tokens.begin(), request.tokens.end());
      CHECK(heard == Counting::outputs(static_cast<int32_t>(heard.size()), request.sample));
      CHECK(request.row < num_rows);
      CHECK(rows.insert(request.row).second);
      if (request.sample == 0 && static_cast<int32_t>(heard.size()) >= grammar.fails_at) {
        request.error = "that is enough";
        continue;
      }
      const int32_t token =
          heard.empty() ? Counting::kFirst : Counting::next(heard.back(), request.sample);
      uint32_t* mask = masks + int64_t{request.row} * words;
      std::fill_n(mask, words, 0);
      mask[token / 32] |= uint32_t{1} << (token % 32);
    }
    most_rows = std::max(most_rows, requests.size());
  }

  int calls = 0, throws_in = -1;
  size_t most_rows = 0;
};

NamedRequest named(std::string id, int32_t length, int32_t max_tokens, int32_t samples = 1) {
  NamedRequest request;
  request.id = std::move(id);
  request.samples = samples;
  for (int32_t i = 0; i < length; ++i) request.spec.row.token_ids.push_back((7 * i + 3) % kVocab);
  request.spec.row.prompt_len = length;
  request.spec.row.seed = 3;
  request.spec.row.max_tokens = max_tokens;
  return request;
}

NamedRequest bound(std::string id, int32_t length, int32_t max_tokens, int32_t samples = 1,
                   int32_t fails_at = INT32_MAX) {
  NamedRequest request = named(std::move(id), length, max_tokens, samples);
  auto grammar = std::make_shared<Counting>();
  grammar->fails_at = fails_at;
  request.spec.row.grammar = true;
  request.spec.grammar = std::move(grammar);
  return request;
}

struct Life {
  std::vector<int32_t> tokens;
  RequestEnd end = RequestEnd::kNone;
  std::string error;
};
using Lives = std::map<std::pair<std::string, int32_t>, Life>;

void take(const std::vector<RequestOutput>& outputs, Lives& lives) {
  for (const RequestOutput& output : outputs) {
    Life& life = lives[{output.id, output.index}];
    life.tokens.insert(life.tokens.end(), output.token_ids.begin(), output.token_ids.end());
    life.end = output.end;
    life.error = output.error;
  }
}

Lives drain(EngineThread& engine, bool background = false) {
  Lives lives;
  while (engine.has_unfinished()) {
    take(background ? engine.wait_outputs(10.0) : engine.step(), lives);
    if (!background) engine.check_invariants();
  }
  engine.check_idle();
  return lives;
}

constexpr EngineOptions stepped(int32_t micro_batches) {
  return {.enable_prefix_caching = true, .background = false, .micro_batches = micro_batches};
}
constexpr EngineOptions kStepped = stepped(1);

int32_t add_row(ModelRunner& runner, int32_t place, bool grammar) {
  RowSpec spec;
  spec.token_ids = {1, 2, 3, 4, 5};
  spec.prompt_len = 5;
  spec.temperature = 0.7f;
  spec.seed = 11;
  spec.max_tokens = 200;
  spec.grammar = grammar;
  std::vector<int32_t>& blocks = spec.block_ids.emplace_back(16);
  std::iota(blocks.begin(), blocks.end(), 1 + place * 16);
  return runner.add_row(spec).row;
}

void allow_only(ModelRunner& runner, int32_t row, int32_t token) {
  const std::span<uint32_t> mask = runner.masks().mask(row);
  std::ranges::fill(mask, 0);
  mask[token / 32] = uint32_t{1} << (token % 32);
}

}  // namespace

TEST_CASE("a step with rows that draw under a mask is finished by the host") {
  const auto runner = small_runner();
  const int32_t free = add_row(*runner, 0, false), masked = add_row(*runner, 1, true);
  const uint64_t alone = runner->execute(std::vector<BatchItem>{{free, 5}, {masked, 4}});
  CHECK(runner->cut_step() == 0);  // nothing is drawn for the row yet
  CHECK(runner->result(alone).entries[0].num_tokens == 1);
  CHECK_THROWS_AS(runner->finish_step(), Error);
  const uint64_t step = runner->execute(std::vector<BatchItem>{{free, 1}, {masked, 1}});
  CHECK(runner->cut_step() == step);
  CHECK(runner->masked_items().size() == 1);
  CHECK(runner->masked_items()[0] == 1);
  CHECK(runner->masked_row(0) == masked);
  CHECK(!runner->ready(step));
  CHECK_THROWS_AS(runner->result(step), Error);
  CHECK_THROWS_AS(runner->execute({}), Error);
  CHECK_THROWS_AS(runner->free_row({masked, kAnyGeneration}), Error);
  runner->wait_masks();
  allow_only(*runner, masked, 77);
  runner->finish_step();
  const StepOutput output = runner->result(step);
  CHECK(output.tokens(0).size() == 1);
  CHECK(output.tokens(1)[0] == 77);
}

TEST_CASE("a steady step that is cut allocates nothing") {
  const auto runner = small_runner();
  std::vector<BatchItem> prefill, decode;
  for (int32_t place = 0; place < 4; ++place) {
    const int32_t row = add_row(*runner, place, place % 2 == 1);
    prefill.push_back({row, 5});
    decode.push_back({row, 1});
  }
  StepOutput output;
  for (int32_t i = 0; i < 50; ++i) {
    const int64_t before = count_allocations();
    const uint64_t step = runner->execute(i == 0 ? prefill : decode);
    for (size_t index = 0; index < runner->masked_items().size(); ++index) {
      allow_only(*runner, runner->masked_row(index), i);
    }
    runner->finish_step();
    runner->result(step, output);
    if (i >= 5) CHECK(count_allocations() == before);
    CHECK(output.tokens(1)[0] == i);
    CHECK(output.tokens(3)[0] == i);
  }
}

TEST_CASE("a step that fails before its masks are there ends once") {
  const auto runner = small_runner();
  const int32_t row = add_row(*runner, 0, true);
  runner->fail_next_step("no luck");
  const uint64_t step = runner->execute(std::vector<BatchItem>{{row, 5}});
  allow_only(*runner, row, 1);
  runner->finish_step();
  CHECK(runner->result(step).error == "[step] no luck");
  runner->free_row({row, kAnyGeneration});
  const int32_t other = add_row(*runner, 1, true);
  const uint64_t next = runner->execute(std::vector<BatchItem>{{other, 5}});
  allow_only(*runner, other, 9);
  runner->finish_step();
  CHECK(runner->result(next).tokens(0)[0] == 9);
}

TEST_CASE("a step that nobody asks for is finished all the same") {
  const auto runner = small_runner();
  const int32_t row = add_row(*runner, 0, true);
  runner->discard(runner->execute(std::vector<BatchItem>{{row, 5}}));
  CHECK(runner->cut_step() == 0);
  const uint64_t step = runner->execute(std::vector<BatchItem>{{row, 1}});
  allow_only(*runner, row, 9);
  runner->finish_step();
  const StepOutput output = runner->result(step);
  CHECK(output.tokens(0)[0] == 9);
  CHECK(output.entries[0].num_computed == 6);
}

TEST_CASE("the source hears each output once, and its masks are drawn under") {
  const auto source = std::make_shared<CountingSource>();
  EngineThread engine(small_runner(), kStepped, source);
  engine.add_request(named("free", 9, 30));
  engine.add_request(bound("a", 9, 30));
  engine.add_request(bound("b", 40, 20));
  const Lives lives = drain(engine);
  CHECK(lives.at({"a", 0}).tokens == Counting::outputs(30, 0));
  CHECK(lives.at({"b", 0}).tokens == Counting::outputs(20, 0));
  CHECK(source->most_rows == 2);
  // One call for each step with such rows: those of "a" begin before those of "b".
  CHECK(source->calls >= 30);
  CHECK(source->calls <= 32);

  EngineThread other(small_runner(), kStepped);
  other.add_request(named("free", 9, 30));
  CHECK(drain(other).at({"free", 0}).tokens == lives.at({"free", 0}).tokens);
  CHECK_THROWS_AS(other.add_request(bound("a", 9, 30)), Error);
}

TEST_CASE("samples and preempted requests go on where they were") {
  for (const int32_t micro_batches : {1, 2, 4}) {
    RunnerConfig config = small_config();
    config.block_size = 4;
    config.num_blocks = 22;
    config.max_model_len = 64;
    config.num_speculative_tokens = 2;  // for the others
    const auto source = std::make_shared<CountingSource>();
    EngineThread engine(small_runner(config), stepped(micro_batches), source);
    engine.add_request(bound("many", 10, 25, 3));
    engine.add_request(bound("a", 13, 30));
    engine.add_request(named("free", 9, 40));
    const Lives lives = drain(engine);
    CHECK(engine.stats().preemptions > 0);
    for (int32_t sample = 0; sample < 3; ++sample) {
      CHECK(lives.at({"many", sample}).tokens == Counting::outputs(25, sample));
    }
    CHECK(lives.at({"a", 0}).tokens == Counting::outputs(30, 0));
    CHECK(lives.at({"free", 0}).tokens.size() == 40);
  }
}

TEST_CASE("a sample without a mask ends with the source's error, and no other") {
  const auto source = std::make_shared<CountingSource>();
  EngineThread engine(small_runner(), kStepped, source);
  engine.add_request(bound("bad", 9, 30, 2, 7));
  // The others wait for its prompt, which the next of them computes then.
  engine.add_request(bound("never", 5, 30, 3, 0));
  engine.add_request(bound("good", 9, 20));
  const Lives lives = drain(engine);
  const Life& bad = lives.at({"bad", 0});
  CHECK(bad.tokens == Counting::outputs(7, 0));
  CHECK(bad.end == RequestEnd::kError);
  CHECK(bad.error == "that is enough");
  CHECK(lives.at({"never", 0}).tokens.empty());
  CHECK(lives.at({"never", 0}).end == RequestEnd::kError);
  for (const int32_t sample : {1, 2}) {
    CHECK(lives.at({"never", sample}).tokens == Counting::outputs(30, sample));
  }
  CHECK(lives.at({"bad", 1}).tokens == Counting::outputs(30, 1));
  CHECK(lives.at({"good", 0}).tokens == Counting::outputs(20, 0));
}

TEST_CASE("what a source throws ends those that asked") {
  for (const int call : {1, 2, 9}) {
    const auto source = std::make_shared<CountingSource>();
    source->throws_in = call;
    EngineThread engine(small_runner(), kStepped, source);
    engine.add_request(named("free", 9, 30));
    engine.add_request(bound("a", 9, 30));
    engine.add_request(bound("b", 9, 30));
    const Lives lives = drain(engine);
    for (const char* name : {"a", "b"}) {
      CHECK(lives.at({name, 0}).error == "no masks today");
      CHECK(lives.at({name, 0}).tokens.size() == static_cast<size_t>(call - 1));
    }
    CHECK(lives.at({"free", 0}).end == RequestEnd::kLength);
    engine.add_request(bound("c", 9, 12));
    CHECK(drain(engine).at({"c", 0}).tokens == Counting::outputs(12, 0));
  }
}

TEST_CASE("a step that fails while masks are made ends its requests") {
  const auto runner = small_runner();
  EngineThread engine(runner, kStepped, std::make_shared<CountingSource>());
  engine.add_request(bound("a", 9, 30));
  Lives lives;
  for (int i = 0; i < 3; ++i) take(engine.step(), lives);
  runner->fail_next_step("no luck");
  while (engine.has_unfinished()) take(engine.step(), lives);
  engine.check_idle();
  CHECK(lives.at({"a", 0}).end == RequestEnd::kError);
  CHECK(lives.at({"a", 0}).error == "[step] no luck");
  engine.add_request(bound("b", 9, 12));
  CHECK(drain(engine).at({"b", 0}).tokens == Counting::outputs(12, 0));
}

TEST_CASE("a thread of the engine's own asks for masks while others add and abort") {
  EngineThread engine(small_runner(), {.micro_batches = 2}, std::make_shared<CountingSource>());
  Lives lives;
  for (int round = 0; round < 20; ++round) {
    const std::string name = std::to_string(round);
    engine.add_request(bound("bound" + name, 5 + round, 15, 1 + round % 3));
    engine.add_request(named("free" + name, 5, 10));
    if (round % 4 == 3) engine.abort("bound" + std::to_string(round - 1), -1, true);
    take(engine.wait_outputs(0.001), lives);
  }
  for (const auto& [name, life] : drain(engine, true)) {
    Life& whole = lives[name];
    whole.tokens.insert(whole.tokens.end(), life.tokens.begin(), life.tokens.end());
    whole.end = life.end;
  }
  int ended = 0;
  for (const auto& [name, life] : lives) {
    if (life.end != RequestEnd::kLength || !name.first.starts_with("bound")) continue;
    CHECK(life.tokens == Counting::outputs(15, name.second));
    ++ended;
  }
  CHECK(ended > 20);
}

}  // namespace mrv1
