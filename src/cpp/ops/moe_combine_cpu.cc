// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/moe_combine.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "core/thread_pool.h"
#include "dist/cpu_communicator.h"
#include "ops/all_reduce.h"
#include "ops/moe_dispatch.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "moe_combine";
constexpr int64_t kGrain = 16;  // rows that a thread takes at a time

// The sum over the ranks that a token was sent to.
template <typename From, typename To>
void add_rows(const MoeCombineParams& params, int rank, int ranks, int64_t token) {
  const ExpertBuffers& own = params.received;
  const int32_t* places = params.places + token * ranks;
  std::array<const From*, kMaxRanks> parts{};
  for (int other = 0; other < ranks; ++other) {
    if (places[other] < 0) continue;
    const void* sums = other == rank ? params.partial : own.sums;
    parts[other] =
        static_cast<const From*>(sums) + (other * own.region_rows + places[other]) * own.hidden;
  }
  To* out = static_cast<To*>(params.out) + token * own.hidden;
  if (std::all_of(parts.begin(), parts.end(), [](const From* part) { return part == nullptr; })) {
    std::fill_n(out, own.hidden, from_float<To>(0.0f));
    return;
  }
  for (int64_t col = 0; col < own.hidden; ++col) {
    std::array<float, kMaxRanks> values;
    values.fill(-0.0f);  // which leaves every number as it is
    for (int other = 0; other < ranks; ++other) {
      if (parts[other] != nullptr) values[other] = to_float(parts[other][col]);
    }
    out[col] = from_float<To>(sum_in_order(values.data(), ranks));
  }
}

}  // namespace

void moe_combine_cpu(const MoeCombineParams& params, const StepContext& ctx) {
  auto* group = static_cast<CpuCommunicator*>(ctx.communicator);
  const ExpertLink link = expert_link_of(params.received, ctx, kOp);
  const int rank = group == nullptr ? 0 : group->rank();
  const int ranks = group == nullptr ? 1 : group->size();
  const ExpertBuffers& own = params.received;
  const auto row_bytes = static_cast<size_t>(own.hidden) * dtype_size(own.sum_dtype);
  const auto row_of = [&](int region, int64_t row) {
    return static_cast<size_t>(region * own.region_rows + row) * row_bytes;
  };
  if (group != nullptr) group->check_alive();
  // The tokens of a rank lie side by side, there as here.
  for (int to = 0; to < ranks; ++to) {
    if (to == rank) continue;
    std::memcpy(static_cast<char*>(link.ranks[to].sums) + row_of(rank, 0),
                static_cast<const char*>(params.partial) + row_of(to, 0),
                static_cast<size_t>(own.counts[to]) * row_bytes);
  }
  if (group != nullptr) group->barrier(kOp);

  dispatch_activation(own.sum_dtype, kOp, [&](auto from) {
    dispatch_activation(own.dtype, kOp, [&](auto to) {
      ctx.pool->parallel_for(ctx.sizes.num_tokens, kGrain, [&](int64_t begin, int64_t end, int) {
        for (int64_t token = begin; token < end; ++token) {
          add_rows<typename decltype(from)::type, typename decltype(to)::type>(params, rank, ranks,
                                                                               token);
        }
      });
    });
  });
}

}  // namespace mrv1
