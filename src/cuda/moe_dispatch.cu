// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// A block sends some of the tokens. Where they go in the regions of other ranks follows from how
// many earlier tokens go there, which every block counts for itself: reading the experts of all
// earlier tokens costs less than another launch. The last block tells the totals.
#include "ops/moe_dispatch.h"

#include "block.cuh"
#include "expert_view.cuh"
#include "fast_divider.cuh"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "moe_dispatch";
constexpr int kThreads = cuda::kExpertThreads;
// Tokens whose experts a thread reads at a time.
constexpr int kTokensInFlight = 4;

struct Tokens {
  const void* x;
  const int32_t* experts;
  const float* weights;
  int32_t* places;
  uint32_t ranks;
  cuda::FastDivider by_experts;  // of all ranks, for ExpertShare::rank_of()
  int32_t count, top_k;
  int32_t row_units;
  bool quads;  // experts of a token can be read four at a time
};

__device__ __forceinline__ uint32_t bit_of(const Tokens& tokens, int32_t expert) {
  if (expert < 0) return 0;
  return 1u << tokens.by_experts.divide(static_cast<uint32_t>(expert) * tokens.ranks);
}

// Bit r: whether the token goes to rank r.
__device__ __forceinline__ uint32_t ranks_of(const Tokens& tokens, int32_t token) {
  uint32_t ranks = 0;
  const int32_t* experts = tokens.experts + int64_t{token} * tokens.top_k;
  if (tokens.quads) {
    for (int32_t j = 0; j < tokens.top_k; j += 4) {
      const int4 four = *reinterpret_cast<const int4*>(experts + j);
      ranks |= bit_of(tokens, four.x) | bit_of(tokens, four.y) | bit_of(tokens, four.z) |
               bit_of(tokens, four.w);
    }
    return ranks;
  }
  for (int32_t j = 0; j < tokens.top_k; ++j) ranks |= bit_of(tokens, experts[j]);
  return ranks;
}

struct Shared {
  int32_t counts[kMaxRanks];                           // sent by earlier tokens
  int32_t warp_counts[cuda::kExpertWarps][kMaxRanks];  // of the round, by warp
  int32_t places[kThreads][kMaxRanks];                 // of the round
};

// Counts the tokens before `end` for each rank, into shared.counts.
__device__ void count_before(const Tokens& tokens, int ranks, int32_t end, Shared& shared) {
  int32_t own[kMaxRanks] = {};
  for (int32_t first = threadIdx.x; first < end; first += kTokensInFlight * kThreads) {
    uint32_t to[kTokensInFlight];
#pragma unroll
    for (int i = 0; i < kTokensInFlight; ++i) {
      const int32_t token = first + i * kThreads;
      to[i] = token < end ? ranks_of(tokens, token) : 0;
    }
#pragma unroll
    for (int i = 0; i < kTokensInFlight; ++i) {
#pragma unroll
      for (int rank = 0; rank < kMaxRanks; ++rank) own[rank] += to[i] >> rank & 1;
    }
  }
  if (threadIdx.x < kMaxRanks) shared.counts[threadIdx.x] = 0;
  __syncthreads();
#pragma unroll
  for (int rank = 0; rank < kMaxRanks; ++rank) {
    if (rank >= ranks) break;
    const int32_t sum = cuda::warp_sum(own[rank]);
    if (threadIdx.x % 32 == 0 && sum > 0) atomicAdd(&shared.counts[rank], sum);
  }
  __syncthreads();
}

// The places of a round of tokens, one a thread, from `first` on; adds them to shared.counts.
__device__ void place_round(const Tokens& tokens, int ranks, int32_t first, int32_t last,
                            Shared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t token = first + static_cast<int32_t>(threadIdx.x);
  const uint32_t to = token < last ? ranks_of(tokens, token) : 0;
  const uint32_t before = (1u << lane) - 1;
  int32_t within[kMaxRanks];  // of the warp's tokens, those before this one
#pragma unroll
  for (int rank = 0; rank < kMaxRanks; ++rank) {
    const uint32_t sent = __ballot_sync(0xffffffffu, (to >> rank & 1) != 0);
    within[rank] = __popc(sent & before);
    if (lane == 0) shared.warp_counts[warp][rank] = __popc(sent);
  }
  __syncthreads();
#pragma unroll
  for (int rank = 0; rank < kMaxRanks; ++rank) {
    int32_t place = -1;
    if (to >> rank & 1) {
      place = shared.counts[rank] + within[rank];
      for (int other = 0; other < warp; ++other) place += shared.warp_counts[other][rank];
    }
    shared.places[threadIdx.x][rank] = place;
    if (token < last && rank < ranks) tokens.places[int64_t{token} * ranks + rank] = place;
  }
  __syncthreads();
  if (threadIdx.x < kMaxRanks) {
    for (int other = 0; other < cuda::kExpertWarps; ++other) {
      shared.counts[threadIdx.x] += shared.warp_counts[other][threadIdx.x];
    }
  }
}

// Sends the tokens of a round, a share of a row by a warp at a time. The next share is on its way
// while one is sent.
template <typename Unit>
__device__ void send_round(const cuda::ExpertView& view, const Tokens& tokens, int32_t first,
                           int32_t count, const Shared& shared) {
  const int lane = threadIdx.x % 32;
  const ExpertBuffers& own = view.link.ranks[view.peers.rank];
  const int64_t region = view.peers.rank * own.region_rows;
  const cuda::RowShares shares = cuda::share_rows(count, tokens.row_units, cuda::kExpertWarps);
  const int32_t items = count * shares.count;
  const auto load = [&](int32_t item, cuda::ShareUnits<Unit>& units) {
    if (item >= items) return;
    const int32_t token = first + item / shares.count;
    units.load(cuda::units_at<Unit>(tokens.x, token, tokens.row_units), item % shares.count, shares,
               tokens.row_units);
  };
  auto item = static_cast<int32_t>(threadIdx.x / 32);
  cuda::ShareUnits<Unit> units, ahead;
  load(item, units);
  for (; item < items; item += cuda::kExpertWarps) {
    load(item + cuda::kExpertWarps, ahead);
    const int32_t index = item / shares.count, share = item % shares.count;
    for (int step = 1; step <= view.peers.size; ++step) {
      int rank = view.peers.rank + step;
      if (rank >= view.peers.size) rank -= view.peers.size;
      const int32_t place = shared.places[index][rank];
      if (place < 0) continue;
      const ExpertBuffers& there = view.link.ranks[rank];
      const int64_t row = region + place;
      units.store(cuda::units_at<Unit>(there.x, row, tokens.row_units), share, shares,
                  tokens.row_units);
      if (share > 0) continue;
      const int64_t source = int64_t{first + index} * tokens.top_k;
      for (int32_t j = lane; j < tokens.top_k; j += 32) {
        there.experts[row * tokens.top_k + j] = tokens.experts[source + j];
        there.weights[row * tokens.top_k + j] = tokens.weights[source + j];
      }
    }
    units = ahead;
  }
}

template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    moe_dispatch_kernel(const __grid_constant__ cuda::ExpertView view,
                        const __grid_constant__ Tokens tokens) {
  __shared__ Shared shared;
  cuda::launch_next();
  cuda::wait_for_previous();
  const int ranks = view.peers.size;
  const uint64_t call = view.meets ? cuda::begin_call(view.peers) : 1;
  if (call == 0) return;
  const auto each = static_cast<int32_t>(cuda::divide_up(tokens.count, gridDim.x));
  const int32_t begin = min(static_cast<int32_t>(blockIdx.x) * each, tokens.count);
  const int32_t end = min(begin + each, tokens.count);
  count_before(tokens, ranks, begin, shared);
  for (int32_t first = begin; first < end; first += kThreads) {
    place_round(tokens, ranks, first, end, shared);
    __syncthreads();
    send_round<Unit>(view, tokens, first, min(end - first, kThreads), shared);
    __syncthreads();
  }
  if (blockIdx.x + 1 == gridDim.x && threadIdx.x < ranks) {
    view.link.ranks[threadIdx.x].counts[view.peers.rank] = shared.counts[threadIdx.x];
  }
  if (!view.meets) return;
  cuda::count_call(view.peers);
  cuda::signal_peers(view.peers, 0, call);
  cuda::await_signals(view.peers, cuda::PeerWait::kTokens, 0, call);
}

using Kernel = void (*)(cuda::ExpertView, Tokens);

Kernel choose_kernel(int unit) {
  if (unit == 16) return moe_dispatch_kernel<uint4>;
  if (unit == 4) return moe_dispatch_kernel<uint32_t>;
  return moe_dispatch_kernel<uint16_t>;
}

}  // namespace

namespace cuda {

void load_moe_dispatch() {
  for (const int unit : {16, 4, 2}) load_kernel(kOp, choose_kernel(unit));
}

}  // namespace cuda

void moe_dispatch_cuda(const MoeDispatchParams& params, const StepContext& ctx) {
  const ExpertBuffers& own = params.received;
  const cuda::ExpertView view = cuda::expert_view(expert_link_of(own, ctx, kOp), ctx);
  const int64_t row_bytes = own.hidden * static_cast<int64_t>(dtype_size(own.dtype));
  const int unit = cuda::copy_unit(row_bytes);
  check_internal(cuda::is_vector_aligned(params.x) && cuda::is_vector_aligned(own.x), kOp,
                 "tokens are not aligned to ", cuda::kVectorBytes, " bytes");
  Tokens tokens;
  tokens.x = params.x;
  tokens.experts = params.experts;
  tokens.weights = params.weights;
  tokens.places = params.places;
  tokens.ranks = static_cast<uint32_t>(params.share.ranks);
  tokens.by_experts = cuda::FastDivider(static_cast<uint32_t>(params.share.num_experts));
  tokens.quads = own.top_k % 4 == 0 && cuda::is_vector_aligned(params.experts);
  tokens.count = ctx.sizes.num_tokens;
  tokens.top_k = own.top_k;
  tokens.row_units = static_cast<int32_t>(row_bytes / unit);
  cuda::launch(kOp, ctx, choose_kernel(unit), cuda::expert_grid(view, ctx), dim3(kThreads), 0, view,
               tokens);
  if (cuda::CudaCommunicator* rank = cuda::nccl_rank(view, ctx)) {
    rank->dispatch_by_nccl(view.link, ctx);
  }
}

}  // namespace mrv1
