// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "runner/graph_ladder.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "core/error.h"

namespace mrv1 {

const char* step_mode_name(StepMode mode) {
  switch (mode) {
    case StepMode::kEager:
      return "eager";
    case StepMode::kPiecewise:
      return "piecewise";
    case StepMode::kFull:
      break;
  }
  return "full";
}

GraphLadder::GraphLadder(StepMode mode, std::vector<CaptureSize> full,
                         std::vector<int32_t> piecewise, int32_t max_drafts)
    : mode_(mode),
      max_drafts_(max_drafts),
      full_(std::move(full)),
      piecewise_(std::move(piecewise)) {
  std::sort(full_.begin(), full_.end(), [](const CaptureSize& a, const CaptureSize& b) {
    return std::make_tuple(a.tokens(), a.requests) < std::make_tuple(b.tokens(), b.requests);
  });
  full_.erase(std::unique(full_.begin(), full_.end()), full_.end());
  std::sort(piecewise_.begin(), piecewise_.end());
  piecewise_.erase(std::unique(piecewise_.begin(), piecewise_.end()), piecewise_.end());
}

std::vector<CaptureSize> GraphLadder::full_sizes(std::span<const int32_t> requests,
                                                 int32_t max_drafts, int32_t max_tokens) {
  std::vector<CaptureSize> sizes;
  for (const int32_t count : requests) {
    sizes.push_back({count, 1});
    const CaptureSize drafted{count, 1 + max_drafts};
    if (max_drafts > 0 && drafted.tokens() <= max_tokens) sizes.push_back(drafted);
  }
  return sizes;
}

std::vector<int32_t> GraphLadder::default_requests(int32_t max_requests) {
  std::vector<int32_t> sizes;
  const auto step_after = [](int64_t requests) {
    return requests < 8     ? 1
           : requests < 64  ? 8
           : requests < 128 ? 16
           : requests < 512 ? 32
                            : requests / 4;
  };
  for (int64_t requests = 1; requests < max_requests; requests += step_after(requests)) {
    sizes.push_back(static_cast<int32_t>(requests));
  }
  sizes.push_back(max_requests);
  return sizes;
}

StepSizes GraphLadder::sizes_of(const CaptureSize& size) const {
  const int32_t per_request = std::min(size.tokens_per_request, 1 + max_drafts_);
  return {size.requests, size.tokens(), size.requests * per_request, per_request > 1};
}

std::vector<int32_t> GraphLadder::default_piecewise(int32_t max_tokens) {
  // Beyond these a step takes the device longer than the host needs to launch it.
  std::vector<int32_t> sizes;
  for (const int32_t tokens : {64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024}) {
    if (tokens <= max_tokens) sizes.push_back(tokens);
  }
  if (max_tokens > 0 && max_tokens < 1024) sizes.push_back(max_tokens);
  return sizes;
}

StepShape GraphLadder::choose(std::span<const BatchEntry> entries, StepSizes exact, bool scores) {
  exact.speculates = std::any_of(entries.begin(), entries.end(),
                                 [](const BatchEntry& entry) { return entry.samples > 1; });
  // Eager steps take the sizes of whole steps too, to run what the graphs would.
  const size_t num_full = mode_ == StepMode::kPiecewise || scores ? 0 : full_.size();
  for (size_t i = 0; i < num_full; ++i) {
    const CaptureSize& size = full_[i];
    if (size.requests < exact.num_requests || size.tokens() < exact.num_tokens) continue;
    const StepSizes sizes = sizes_of(size);
    // Steps of a token a request propose nothing.
    if (exact.speculates && !sizes.speculates) continue;
    // Entries of a token each need a place each.
    int64_t places = exact.num_requests;
    if (exact.num_tokens > exact.num_requests) {
      places = 0;
      for (const BatchEntry& entry : entries) {
        places += (entry.num_tokens + size.tokens_per_request - 1) / size.tokens_per_request;
      }
    }
    if (places > size.requests) continue;
    const StepMode mode = mode_ == StepMode::kFull ? StepMode::kFull : StepMode::kEager;
    return {mode, static_cast<int32_t>(i), true, sizes};
  }
  const auto bucket = std::lower_bound(piecewise_.begin(), piecewise_.end(), exact.num_tokens);
  if (bucket != piecewise_.end()) {
    const StepMode mode = mode_ == StepMode::kEager ? StepMode::kEager : StepMode::kPiecewise;
    note_miss(mode, entries, exact);
    StepSizes sizes = exact;
    sizes.num_tokens = *bucket;
    return {mode, static_cast<int32_t>(bucket - piecewise_.begin()), false, sizes};
  }
  note_miss(StepMode::kEager, entries, exact);
  return {StepMode::kEager, -1, false, exact};
}

void GraphLadder::note_miss(StepMode taken, std::span<const BatchEntry> entries,
                            const StepSizes& exact) {
  // Every token of a decode row is sampled from.
  const bool decode_only = exact.num_tokens == exact.num_logits;
  // A prompt in pieces is what the piecewise sizes are for.
  if (taken == mode_ || mode_ == StepMode::kEager ||
      (taken == StepMode::kPiecewise && !decode_only))
    return;
  bool& reported = reported_[decode_only][static_cast<int>(taken)];
  if (std::exchange(reported, true)) return;
  miss_.decode_only = decode_only;
  miss_.text = concat("a batch of ", entries.size(), " requests with ", exact.num_tokens,
                      " tokens runs ", step_mode_name(taken), ": the largest captured sizes are ",
                      full_.empty() ? 0 : full_.back().requests, " requests",
                      full_.empty() || full_.back().tokens_per_request == 1
                          ? std::string()
                          : concat(" of ", full_.back().tokens_per_request, " tokens"),
                      " as one graph and ", piecewise_.empty() ? 0 : piecewise_.back(),
                      " tokens in pieces (said once)");
}

GraphLadder::Miss GraphLadder::take_miss() { return std::exchange(miss_, {}); }

}  // namespace mrv1
