// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// The engine without memory and without a device: each request ends once, each wait ends.
#include <doctest/doctest.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "allocations.h"
#include "core/error.h"
#include "engine/engine_thread.h"
#include "ops/kernels.h"
#include "small_model.h"

namespace mrv1 {
namespace {

constexpr int32_t kRequests = 5;
constexpr int32_t kOutputs = 14;

// Little memory, so that requests are also preempted, and drafts.
RunnerConfig tight_config() {
  RunnerConfig config = small_config();
  config.block_size = 4;
  config.num_blocks = 24;
  config.max_model_len = 64;
  config.num_speculative_tokens = 2;
  config.max_logprobs = 2;
  return config;
}

// Masks that allow every token, so that requests with a grammar draw what they draw without.
class OpenSource final : public MaskSource {
 public:
  void fill(std::span<MaskRequest> requests, uint32_t* masks, int32_t num_rows,
            int32_t words) override {
    for (const MaskRequest& request : requests) {
      REQUIRE(request.row < num_rows);
      std::fill_n(masks + int64_t{request.row} * words, words, ~uint32_t{0});
    }
  }
};

NamedRequest numbered(int32_t number) {
  NamedRequest request;
  request.id = std::to_string(number);
  request.samples = number % 3 == 1 ? 2 : 1;
  RowSpec& row = request.spec.row;
  for (int32_t i = 0; i < 9 + 3 * number; ++i) row.token_ids.push_back((7 * i + number) % kVocab);
  row.prompt_len = static_cast<int32_t>(row.token_ids.size());
  row.temperature = 0.8f;
  row.seed = 11;
  row.max_tokens = kOutputs;
  row.num_logprobs = number % 3 - 1;
  if (number % 2 == 0) row.num_prompt_logprobs = number / 2;
  if (number % 2 == 1) {
    row.grammar = true;
    request.spec.grammar = std::make_shared<Grammar>();
  }
  return request;
}

struct Life {
  std::vector<int32_t> tokens;
  RequestEnd end = RequestEnd::kNone;
  std::string error;
  std::vector<TokenLogprob> logprobs, prompt_logprobs;
};
using Lives = std::map<std::pair<std::string, int32_t>, Life>;

void take(const std::vector<RequestOutput>& outputs, Lives& lives) {
  for (const RequestOutput& output : outputs) {
    Life& life = lives[{output.id, output.index}];
    CHECK(life.end == RequestEnd::kNone);
    life.tokens.insert(life.tokens.end(), output.token_ids.begin(), output.token_ids.end());
    life.end = output.end;
    life.error = output.error;
    life.logprobs.insert(life.logprobs.end(), output.logprobs.begin(), output.logprobs.end());
    if (output.prompt_logprobs.num_logprobs >= 0) {
      CHECK(life.prompt_logprobs.empty());
      life.prompt_logprobs = output.prompt_logprobs.tokens;
    }
  }
}

// The engine's thread may have ended it by now: a request that is refused has ended too.
void add(EngineThread& engine, int32_t number, Lives& lives) {
  const NamedRequest request = numbered(number);
  try {
    engine.add_request(request);
  } catch (const Error& error) {
    CHECK(error.kind() == ErrorKind::kOutOfMemory);
    for (int32_t i = 0; i < request.samples; ++i) {
      lives[{request.id, i}] = {{}, RequestEnd::kError, error.what(), {}, {}};
    }
  }
}

std::vector<RequestOutput> next_outputs(EngineThread& engine, bool background) {
  return background ? engine.wait_outputs(30.0) : engine.step();
}

void finish(EngineThread& engine, bool background, Lives& lives) {
  for (int turns = 0; engine.has_unfinished(); ++turns) {
    REQUIRE(turns < 2000);
    take(next_outputs(engine, background), lives);
  }
}

// What all requests give where nothing fails.
const Lives& unhurt() {
  static const Lives lives = [] {
    Lives made;
    EngineThread engine(small_runner(tight_config()), {true, /*background=*/false},
                        std::make_shared<OpenSource>());
    for (int32_t i = 0; i < kRequests; ++i) engine.add_request(numbered(i));
    finish(engine, false, made);
    return made;
  }();
  return lives;
}

// All have ended once: by an error that says `why`, or whole. Returns how many by an error.
int check_ends(const Lives& lives, const char* why) {
  REQUIRE(lives.size() == unhurt().size());
  int errors = 0;
  for (const auto& [name, life] : lives) {
    const Life& expected = unhurt().at(name);
    const std::vector<int32_t>& whole = expected.tokens;
    REQUIRE(life.tokens.size() <= whole.size());
    CHECK(std::equal(life.tokens.begin(), life.tokens.end(), whole.begin()));
    REQUIRE(life.logprobs.size() <= expected.logprobs.size());
    CHECK(std::equal(life.logprobs.begin(), life.logprobs.end(), expected.logprobs.begin()));
    CHECK(life.prompt_logprobs.size() ==
          (life.tokens.empty() ? 0 : expected.prompt_logprobs.size()));
    if (!life.tokens.empty()) CHECK(life.prompt_logprobs == expected.prompt_logprobs);
    if (life.end == RequestEnd::kError) {
      ++errors;
      CHECK(life.error.find(why) != std::string::npos);
    } else {
      CHECK(life.end == RequestEnd::kLength);
      CHECK(life.tokens.size() == whole.size());
    }
  }
  return errors;
}

// A CPU device that can be lost as a GPU is: from then on all that is asked of it fails.
class LosableDevice final : public Device {
 public:
  // After so many waits for a step; negative never.
  explicit LosableDevice(int waits) : waits_left_(waits), kernels_(cpu_->kernels()) {
    lost_ = false;
    real_apply_ = kernels_.apply;
    kernels_.apply = [](const StepContext& ctx) {
      throw_if_lost();
      real_apply_(ctx);
    };
  }

  DeviceType type() const override { return cpu_->type(); }
  std::string name() const override { return "losable"; }
  const Kernels& kernels() const override { return kernels_; }
  MemoryInfo memory() const override { return cpu_->memory(); }
  ThreadPool* pool() override { return cpu_->pool(); }
  // From now on it has no memory left.
  void fill() { is_full_ = true; }
  Buffer allocate(size_t bytes, std::string_view what) override {
    if (is_full_) fail(ErrorKind::kOutOfMemory, "losable", "no memory for ", what);
    return cpu_->allocate(bytes, what);
  }
  Buffer allocate_mapped(size_t bytes, std::string_view what) override {
    return cpu_->allocate_mapped(bytes, what);
  }
  void copy_in(void* device_dst, const void* host_src, size_t bytes) override {
    throw_if_lost();
    cpu_->copy_in(device_dst, host_src, bytes);
  }
  void copy_out(void* host_dst, const void* device_src, size_t bytes) override {
    throw_if_lost();
    cpu_->copy_out(host_dst, device_src, bytes);
  }
  void set_word(uint64_t* device_word, uint64_t value) override {
    throw_if_lost();
    cpu_->set_word(device_word, value);
  }
  void submit(void (*fn)(void* arg), void* arg) override { cpu_->submit(fn, arg); }
  void wait_sequence(const std::atomic<uint64_t>& sequence, uint64_t value) override {
    if (waits_left_ == 0) lost_ = true;
    if (waits_left_ > 0) --waits_left_;
    throw_if_lost();
    cpu_->wait_sequence(sequence, value);
  }
  bool wait_sequence_until(const std::atomic<uint64_t>& sequence, uint64_t value,
                           std::chrono::steady_clock::time_point until) override {
    throw_if_lost();
    return cpu_->wait_sequence_until(sequence, value, until);
  }
  void synchronize() override {
    cpu_->synchronize();  // the memory is still the CPU's
    throw_if_lost();
  }
  std::unique_ptr<Graph> capture(std::function<void()> fn) override {
    return cpu_->capture(std::move(fn));
  }
  void launch(const Graph& graph) override {
    throw_if_lost();
    cpu_->launch(graph);
  }

 private:
  static void throw_if_lost() {
    if (lost_) fail(ErrorKind::kDevice, "losable", "the device is lost");
  }
  void release(void*, void*, size_t) noexcept override { std::terminate(); }  // all is the CPU's

  // Kernels are functions, so what one of them looks at belongs to no object.
  static inline std::atomic<bool> lost_;
  static inline void (*real_apply_)(const StepContext&) = nullptr;

  const std::unique_ptr<Device> cpu_ = make_cpu_device(1);
  bool is_full_ = false;
  int waits_left_;
  Kernels kernels_;
};

}  // namespace

TEST_CASE("an engine without memory ends its requests and every wait") {
  int endings = 0;
  for (const bool background : {true, false}) {
    for (const int64_t failures : {int64_t{1}, int64_t{1} << 40}) {
      bool failed = true;
      for (int64_t skip = 0; failed; skip += 1 + skip / 6) {
        CAPTURE(background);
        CAPTURE(failures);
        CAPTURE(skip);
        EngineThread engine(small_runner(tight_config()), {true, background},
                            std::make_shared<OpenSource>());
        Lives lives;
        char own_name[16];
        pthread_getname_np(pthread_self(), own_name, sizeof(own_name));
        FailingAllocations failing(background ? "mrv1-engine" : own_name, skip, failures);
        if (background) failing.arm();
        for (int32_t i = 0; i < kRequests; ++i) add(engine, i, lives);
        while (engine.has_unfinished() && failing.failed() == 0) {
          if (background) {
            take(engine.wait_outputs(30.0), lives);
            continue;
          }
          // Whoever steps takes the outputs too, and hears that there was no memory for them.
          std::vector<RequestOutput> outputs;
          failing.arm();
          try {
            outputs = engine.step();
          } catch (const std::bad_alloc&) {
          }
          failing.disarm();
          take(outputs, lives);
        }
        failing.disarm();
        failed = failing.failed() > 0;
        finish(engine, background, lives);
        const int errors = check_ends(lives, "ran out of host memory");
        if (errors > 0) {
          ++endings;
          CHECK_THROWS_WITH_AS(engine.add_request(numbered(7)), doctest::Contains("host memory"),
                               Error);
          CHECK(!engine.abort("0", -1, true));
          CHECK(next_outputs(engine, background).empty());
        }
        engine.stop();
        CHECK(!engine.has_unfinished());
      }
    }
  }
  CHECK(endings > 40);
}

TEST_CASE("stop finds an engine without memory") {
  EngineThread engine(small_runner(tight_config()), {}, std::make_shared<OpenSource>());
  Lives lives;
  FailingAllocations failing("mrv1-engine", 3, int64_t{1} << 40);
  failing.arm();
  for (int32_t i = 0; i < kRequests; ++i) add(engine, i, lives);
  engine.stop();
  finish(engine, true, lives);
  CHECK(lives.size() == unhurt().size());
  for (const auto& [name, life] : lives) CHECK(life.end != RequestEnd::kNone);
}

TEST_CASE("a lost device ends every request, and what comes after") {
  int endings = 0;
  for (const bool background : {true, false}) {
    for (int waits = 0; waits < 16; ++waits) {
      CAPTURE(background);
      CAPTURE(waits);
      const auto device = std::make_shared<LosableDevice>(waits);
      EngineThread engine(small_runner(tight_config(), {0}, device), {true, background},
                          std::make_shared<OpenSource>());
      Lives lives;
      for (int32_t i = 0; i < kRequests; ++i) engine.add_request(numbered(i));
      finish(engine, background, lives);
      endings += check_ends(lives, "the device is lost") > 0;
      lives.clear();
      engine.add_request(numbered(7));
      finish(engine, background, lives);
      for (const auto& [name, life] : lives) CHECK(life.end == RequestEnd::kError);
      engine.check_idle();
      // The thread rests, rather than trying again.
      const uint64_t steps = engine.stats().steps;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
      CHECK(engine.stats().steps == steps);
      engine.stop();
    }
  }
  CHECK(endings > 20);
}

TEST_CASE("a request whose lists find no memory ends alone") {
  RunnerConfig config = tight_config();
  config.sampling_words = 64;
  const auto device = std::make_shared<LosableDevice>(-1);
  EngineThread engine(small_runner(config, {0}, device), {true, /*background=*/false},
                      std::make_shared<OpenSource>());
  Lives lives;
  engine.add_request(numbered(0));
  while (lives.empty()) take(engine.step(), lives);
  device->fill();
  NamedRequest penalised = numbered(2);
  penalised.spec.row.presence_penalty = 1.0f;
  engine.add_request(penalised);
  engine.add_request(numbered(4));
  finish(engine, /*background=*/false, lives);
  REQUIRE(lives.size() == 4);
  for (const auto& [name, life] : lives) {
    CAPTURE(name.first);
    if (name.first == "2") {
      CHECK(life.end == RequestEnd::kError);
      CHECK(life.error.find("no memory for sampling lists") != std::string::npos);
      CHECK(life.tokens.empty());
    } else {
      CHECK(life.end == RequestEnd::kLength);
      CHECK(life.tokens == unhurt().at(name).tokens);
    }
  }
  engine.check_idle();
}

TEST_CASE("rows give the memory of their lists back") {
  RunnerConfig config = tight_config();
  config.sampling_words = 1024;
  const auto device = std::make_shared<LosableDevice>(-1);
  const auto runner = small_runner(config, {0}, device);
  device->fill();
  RowSpec spec;
  spec.token_ids = {1, 2, 3};
  spec.prompt_len = 3;
  spec.max_tokens = kOutputs;
  spec.presence_penalty = 0.5f;
  spec.stop_sequences = {{4, 5}};
  for (int i = 0; i < 100; ++i) {
    std::vector<RowHandle> rows;
    for (int row = 0; row < 4; ++row) {
      spec.bad_words.assign((i + row) % 5, {6, 7, 8});  // of other sizes each time
      rows.push_back(runner->add_row(spec));
    }
    for (const int row : {2, 0, 3, 1}) runner->free_row(rows[row]);
  }
  spec.bad_words.assign(400, {6, 7, 8});
  CHECK_THROWS_WITH_AS(runner->add_row(spec), doctest::Contains("no memory for sampling lists"),
                       Error);
  CHECK(runner->free_rows() == 4);
}

}  // namespace mrv1
