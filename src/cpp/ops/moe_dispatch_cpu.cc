// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/moe_dispatch.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "core/error.h"
#include "core/thread_pool.h"
#include "dist/cpu_communicator.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "moe_dispatch";
constexpr int64_t kGrain = 16;  // tokens that a thread sends at a time

// Fills in places; returns how many tokens go to each rank.
std::array<int32_t, kMaxRanks> place_tokens(const MoeDispatchParams& params, int64_t tokens) {
  const int32_t top_k = params.received.top_k, ranks = params.share.ranks;
  std::array<int32_t, kMaxRanks> counts{};
  for (int64_t token = 0; token < tokens; ++token) {
    int32_t* places = params.places + token * ranks;
    std::fill_n(places, ranks, -1);
    for (int32_t j = 0; j < top_k; ++j) {
      const int32_t expert = params.experts[token * top_k + j];
      if (expert < 0) continue;
      const int32_t rank = params.share.rank_of(expert);
      if (places[rank] < 0) places[rank] = counts[rank]++;
    }
  }
  return counts;
}

}  // namespace

ExpertLink expert_link_of(const ExpertBuffers& own, const StepContext& ctx, std::string_view op) {
  check_internal(ctx.sizes.num_tokens <= own.region_rows, op, "a step of ", ctx.sizes.num_tokens,
                 " tokens; there is room for ", own.region_rows, " of each rank");
  if (ctx.communicator == nullptr) return {{own}};
  const ExpertLink* link = ctx.communicator->expert_link(ctx.expert_set);
  check_internal(link != nullptr && link->ranks[ctx.communicator->rank()].x == own.x, op,
                 "the ranks are not linked with these buffers");
  return *link;
}

void moe_dispatch_cpu(const MoeDispatchParams& params, const StepContext& ctx) {
  auto* group = static_cast<CpuCommunicator*>(ctx.communicator);
  const ExpertLink link = expert_link_of(params.received, ctx, kOp);
  const int rank = group == nullptr ? 0 : group->rank();
  const int64_t tokens = ctx.sizes.num_tokens;
  const ExpertBuffers& shape = params.received;
  const int32_t ranks = params.share.ranks, top_k = shape.top_k;
  const auto row_bytes = static_cast<size_t>(shape.hidden) * dtype_size(shape.dtype);
  if (group != nullptr) group->check_alive();
  const std::array<int32_t, kMaxRanks> counts = place_tokens(params, tokens);
  ctx.pool->parallel_for(tokens, kGrain, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      for (int32_t to = 0; to < ranks; ++to) {
        const int32_t place = params.places[token * ranks + to];
        if (place < 0) continue;
        const ExpertBuffers& there = link.ranks[to];
        const int64_t row = rank * shape.region_rows + place;
        std::memcpy(static_cast<char*>(there.x) + static_cast<size_t>(row) * row_bytes,
                    static_cast<const char*>(params.x) + static_cast<size_t>(token) * row_bytes,
                    row_bytes);
        std::copy_n(params.experts + token * top_k, top_k, there.experts + row * top_k);
        std::copy_n(params.weights + token * top_k, top_k, there.weights + row * top_k);
      }
    }
  });
  for (int32_t to = 0; to < ranks; ++to) link.ranks[to].counts[rank] = counts[to];
  if (group != nullptr) group->barrier(kOp);
}

}  // namespace mrv1
