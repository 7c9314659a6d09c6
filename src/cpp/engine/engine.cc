// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "engine/engine.h"

#include <algorithm>

#include "core/error.h"

namespace mrv1 {
namespace {

// Steps launched and not yet taken in: one runs ahead of the one being read.
constexpr size_t kRunAhead = 2;

RequestEnd end_of(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return RequestEnd::kStop;
    case FinishReason::kLength:
      return RequestEnd::kLength;
    case FinishReason::kError:
      return RequestEnd::kError;
    case FinishReason::kNone:
      break;
  }
  return RequestEnd::kNone;
}

}  // namespace

Engine::Engine(std::shared_ptr<ModelRunner> runner)
    : runner_(std::move(runner)), blocks_(runner_->config().num_blocks) {}

int32_t Engine::blocks_for(int32_t tokens) const {
  const int32_t size = runner_->config().block_size;
  return (tokens + size - 1) / size;
}

void Engine::add_request(EngineRequest request) {
  const RunnerConfig& config = runner_->config();
  const auto refuse = [&](const auto&... parts) {
    fail(ErrorKind::kRequest, "add_request", parts...);
  };
  const auto is_its = [&](const RequestOutput& output) { return output.id == request.id; };
  if (requests_.count(request.id) > 0 ||
      std::any_of(pending_outputs_.begin(), pending_outputs_.end(), is_its)) {
    refuse("an unfinished request has this id");
  }
  RowSpec& row = request.row;
  if (row.token_ids.empty()) refuse("the prompt is empty");
  const int64_t length = static_cast<int64_t>(row.token_ids.size());
  if (length >= config.max_model_len) {
    refuse("the prompt has ", length, " tokens; with one to generate at most ",
           config.max_model_len - 1, " fit max_model_len ", config.max_model_len);
  }
  row.prompt_len = static_cast<int32_t>(length);
  row.num_computed = 0;
  row.block_ids.clear();
  runner_->check_spec(row);

  Request entry;
  entry.max_total_len =
      static_cast<int32_t>(std::min<int64_t>(length + row.max_tokens, config.max_model_len));
  // The last token is never computed, so it needs no slot.
  const int32_t needed = blocks_for(entry.max_total_len - 1);
  if (needed > blocks_.total()) {
    refuse("prompt and max_tokens need ", needed, " KV blocks of ", config.block_size,
           " tokens; the cache has ", blocks_.total());
  }
  entry.spec = std::move(row);
  waiting_.push_back(request.id);
  requests_.emplace(std::move(request.id), std::move(entry));
}

bool Engine::abort(const std::string& id, bool report) {
  if (requests_.count(id) == 0) return false;
  end(id, RequestEnd::kAbort, "", pending_outputs_);
  if (!report) pending_outputs_.pop_back();
  return true;
}

void Engine::end(const std::string& id, RequestEnd reason, std::string error,
                 std::vector<RequestOutput>& outputs) {
  auto node = requests_.extract(id);
  Request& request = node.mapped();
  if (request.state == State::kWaiting) {
    waiting_.erase(std::find(waiting_.begin(), waiting_.end(), id));
  } else {
    running_.erase(std::find(running_.begin(), running_.end(), id));
    blocks_.unreserve(request.blocks_reserved);
    draining_.push_back(std::move(request));
  }
  outputs.push_back({id, -1, reason, std::move(error)});
}

// Rows and blocks of ended requests come back when no launched step can write them any more.
void Engine::release_ended() {
  const uint64_t retired = launched_.empty() ? UINT64_MAX : launched_.front().step - 1;
  std::erase_if(draining_, [&](Request& request) {
    if (request.last_step > retired) return false;
    runner_->free_row(request.handle);
    blocks_.release(request.blocks);
    return true;
  });
}

void Engine::admit() {
  while (!waiting_.empty()) {
    const std::string& id = waiting_.front();
    Request& request = requests_.at(id);
    if (!runner_->can_add(request.spec)) return;
    const int32_t needed = blocks_for(request.max_total_len - 1);
    if (!blocks_.reserve(needed)) return;
    request.handle = runner_->add_row(request.spec);
    request.blocks_reserved = needed;
    request.state = State::kRunning;
    running_.push_back(id);
    waiting_.pop_front();
  }
}

void Engine::cover_with_blocks(Request& request, int32_t tokens) {
  const size_t held = request.blocks.size();
  while (static_cast<int32_t>(request.blocks.size()) < blocks_for(tokens)) {
    request.blocks.push_back(blocks_.allocate());
    --request.blocks_reserved;
  }
  if (request.blocks.size() > held) {
    runner_->append_blocks(request.handle, std::span(request.blocks).subspan(held));
  }
}

bool Engine::launch() {
  release_ended();
  admit();
  batch_.clear();
  Launched launched{};
  int32_t budget = runner_->config().max_num_batched_tokens;
  const auto schedule = [&](const std::string& id, Request& request, int32_t tokens) {
    cover_with_blocks(request, request.num_launched + tokens);
    request.num_launched += tokens;
    batch_.push_back({request.handle.row, tokens, request.handle.generation});
    launched.requests.emplace_back(id, request.handle);
    budget -= tokens;
  };
  const auto prompt_left = [](const Request& request) {
    return static_cast<int32_t>(request.spec.token_ids.size()) - request.num_launched;
  };
  for (const std::string& id : running_) {
    Request& request = requests_.at(id);
    if (budget > 0 && prompt_left(request) <= 0 &&
        request.num_launched < request.max_total_len - 1) {
      schedule(id, request, 1);
      ++stats_.decode_tokens;
    }
  }
  for (const std::string& id : running_) {
    Request& request = requests_.at(id);
    // Requests scheduled above have nothing left, or are decoding.
    const int32_t left = prompt_left(request);
    if (budget > 0 && left > 0) {
      const int32_t tokens = std::min(left, budget);
      schedule(id, request, tokens);
      stats_.prefill_tokens += tokens;
    }
  }
  if (batch_.empty()) return false;
  launched.step = runner_->execute(batch_);
  for (const auto& [id, handle] : launched.requests) requests_.at(id).last_step = launched.step;
  launched_.push_back(std::move(launched));
  ++stats_.steps;
  return true;
}

void Engine::take_in(std::vector<RequestOutput>& outputs) {
  const Launched launched = std::move(launched_.front());
  launched_.pop_front();
  const StepOutput output = runner_->result(launched.step);
  for (size_t i = 0; i < launched.requests.size(); ++i) {
    const auto& [id, handle] = launched.requests[i];
    auto it = requests_.find(id);
    // Ended since, perhaps with a new request under the same name: nothing for it here.
    if (it == requests_.end() || it->second.handle.row != handle.row ||
        it->second.handle.generation != handle.generation) {
      continue;
    }
    if (!output.error.empty()) {
      end(id, RequestEnd::kError, output.error, outputs);
      continue;
    }
    const OutputEntry& entry = output.entries.at(i);
    if (entry.masked != 0) {
      // It ended in no step that was taken in, so the device never got it, or lost it.
      end(id, RequestEnd::kError, "the device lost the request's row", outputs);
      continue;
    }
    if (entry.token < 0 && entry.finish_reason == FinishReason::kNone) continue;
    const RequestEnd reason = end_of(entry.finish_reason);
    if (reason == RequestEnd::kNone) {
      outputs.push_back({id, entry.token, RequestEnd::kNone, ""});
      continue;
    }
    end(id, reason, reason == RequestEnd::kError ? "the logits hold no token to draw" : "",
        outputs);
    outputs.back().token = entry.token;
  }
}

std::vector<RequestOutput> Engine::step() {
  std::vector<RequestOutput> outputs = std::move(pending_outputs_);
  pending_outputs_.clear();
  const bool launched = launch();
  if (launched_.size() >= kRunAhead || (!launched && !launched_.empty())) take_in(outputs);
  // Nobody is left to ask for the steps that still run: bring rows and blocks home.
  while (requests_.empty() && !launched_.empty()) take_in(outputs);
  if (launched_.empty()) release_ended();
  return outputs;
}

EngineStats Engine::stats() const {
  EngineStats stats = stats_;
  stats.running = static_cast<int32_t>(running_.size());
  stats.waiting = static_cast<int32_t>(waiting_.size());
  stats.free_blocks = blocks_.free();
  return stats;
}

void Engine::check_idle() const {
  check_internal(requests_.empty() && launched_.empty() && draining_.empty(), "engine",
                 "requests are still running");
  check_internal(blocks_.free() == blocks_.total() && blocks_.reserved() == 0, "engine",
                 blocks_.total() - blocks_.free(), " blocks and ", blocks_.reserved(),
                 " reservations leaked");
  check_internal(runner_->free_rows() == runner_->config().max_num_seqs, "engine", "rows leaked");
}

}  // namespace mrv1
