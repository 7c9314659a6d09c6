// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/all_reduce.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "core/thread_pool.h"
#include "dist/cpu_communicator.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "all_reduce";
// Elements that a thread takes at a time, and by which the ranks' shares are aligned.
constexpr int64_t kGrain = 4096;
constexpr int64_t kAlignment = 64;

// Elements [begin, end) of out.
template <typename From, typename To>
void sum_elements(const AllReduceParams& params, const CpuCommunicator::Addresses& inputs, int size,
                  int64_t begin, int64_t end) {
  To* out = static_cast<To*>(params.out);
  int64_t col = begin % params.cols;
  for (int64_t i = begin; i < end; ++i) {
    std::array<float, kMaxRanks> values;
    for (int rank = 0; rank < size; ++rank) {
      values[rank] = to_float(static_cast<const From*>(inputs[rank])[i]);
    }
    float sum = sum_in_order(values.data(), size);
    if (params.bias != nullptr) sum += params.bias[col];
    out[i] = from_float<To>(sum);
    if (++col == params.cols) col = 0;
  }
}

}  // namespace

// Each rank sums a share of the elements, in place where it may: no other rank reads that share of
// its x. Then each copies the other shares.
void all_reduce_cpu(const AllReduceParams& params, const StepContext& ctx) {
  const int64_t rows = params.logits_rows ? ctx.sizes.num_logits : ctx.sizes.num_tokens;
  const int64_t count = rows * params.cols;
  auto* group = static_cast<CpuCommunicator*>(ctx.communicator);
  const int size = group == nullptr ? 1 : group->size();
  const int64_t share = (count + size - 1) / size;
  const int64_t aligned = (share + kAlignment - 1) / kAlignment * kAlignment;
  const auto begin_of = [&](int rank) { return std::min(rank * aligned, count); };

  CpuCommunicator::Addresses inputs{params.x};
  if (group != nullptr) inputs = group->exchange(params.x, kOp);
  const int64_t first = group == nullptr ? 0 : begin_of(group->rank());
  const int64_t last = group == nullptr ? count : begin_of(group->rank() + 1);
  dispatch_activation(params.dtype, kOp, [&](auto from) {
    dispatch_activation(params.out_dtype, kOp, [&](auto to) {
      ctx.pool->parallel_for(last - first, kGrain, [&](int64_t begin, int64_t end, int) {
        sum_elements<typename decltype(from)::type, typename decltype(to)::type>(
            params, inputs, size, first + begin, first + end);
      });
    });
  });
  if (group == nullptr) return;
  const CpuCommunicator::Addresses outputs = group->exchange(params.out, kOp);
  const auto width = static_cast<int64_t>(dtype_size(params.out_dtype));
  for (int rank = 0; rank < size; ++rank) {
    const int64_t begin = begin_of(rank);
    const int64_t bytes = (begin_of(rank + 1) - begin) * width;
    if (rank == group->rank() || bytes == 0) continue;
    std::memcpy(static_cast<char*>(params.out) + begin * width,
                static_cast<const char*>(outputs[rank]) + begin * width,
                static_cast<size_t>(bytes));
  }
  group->barrier(kOp);  // what follows may write over it
}

}  // namespace mrv1
