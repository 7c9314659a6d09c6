// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Rows go back to their ranks, then each rank adds up those of its tokens. A token's rows may come
// from any block of another rank, so a block waits for all of them before it adds.
#include "ops/moe_combine.h"

#include "expert_view.cuh"
#include "fast_divider.cuh"
#include "ops/all_reduce.h"
#include "ops/moe_dispatch.h"
#include "peer_sums.cuh"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "moe_combine";
constexpr int kThreads = cuda::kExpertThreads;

struct Sums {
  const void* partial;
  const int32_t* places;
  void* out;
  int32_t hidden;
  uint32_t pieces;                  // of all sums
  int32_t row_units;                // of a row that travels
  cuda::FastDivider by_row_pieces;  // pieces of 16 bytes that a row has in sum_dtype
};

// Sends every rank the rows of its tokens, a share of a row by a warp at a time. The next share is
// on its way while one is sent.
template <typename Unit>
__device__ void send_rows(const cuda::ExpertView& view, const Sums& sums) {
  const int warps = static_cast<int>(gridDim.x) * cuda::kExpertWarps;
  // Warps of one number in their blocks come one after the other: few rows are all blocks'.
  const int warp = static_cast<int>(threadIdx.x / 32 * gridDim.x + blockIdx.x);
  const ExpertBuffers& own = view.link.ranks[view.peers.rank];
  for (int step = 1; step < view.peers.size; ++step) {
    int rank = view.peers.rank + step;
    if (rank >= view.peers.size) rank -= view.peers.size;
    const int32_t count = own.counts[rank];
    const Unit* rows = cuda::units_at<Unit>(sums.partial, rank * own.region_rows, sums.row_units);
    Unit* there = cuda::units_at<Unit>(view.link.ranks[rank].sums,
                                       view.peers.rank * own.region_rows, sums.row_units);
    const cuda::RowShares shares = cuda::share_rows(count, sums.row_units, warps);
    const int64_t items = int64_t{count} * shares.count;
    const auto load = [&](int64_t item, cuda::ShareUnits<Unit>& units) {
      if (item >= items) return;
      units.load(rows + item / shares.count * sums.row_units,
                 static_cast<int32_t>(item % shares.count), shares, sums.row_units);
    };
    cuda::ShareUnits<Unit> units, ahead;
    load(warp, units);
    for (int64_t item = warp; item < items; item += warps) {
      load(item + warps, ahead);
      units.store(there + item / shares.count * sums.row_units,
                  static_cast<int32_t>(item % shares.count), shares, sums.row_units);
      units = ahead;
    }
  }
}

// Waits until all blocks of all other ranks have sent their rows. By all threads; false for all if
// the group has ended.
__device__ __forceinline__ bool await_all_signals(const cuda::PeerView& peers, uint64_t call) {
  const int rank = static_cast<int>(threadIdx.x / cuda::kPeerBlocks);
  const int block = static_cast<int>(threadIdx.x % cuda::kPeerBlocks);
  static_assert(kThreads >= kMaxRanks * cuda::kPeerBlocks);
  bool arrived = true;
  if (rank < peers.size && rank != peers.rank && block < static_cast<int>(gridDim.x)) {
    const uint64_t* flag = &cuda::header_of(peers, peers.rank)->flags[0][rank][block];
    arrived = cuda::wait_for_peers(peers, cuda::PeerWait::kExpertSums, call,
                                   [&] { return cuda::load_flag(flag) >= call ? -1 : rank; });
  }
  return __syncthreads_and(arrived) != 0;
}

// What others may have written since the kernel began.
__device__ __forceinline__ float load_fresh(const float* from) { return __ldcg(from); }
__device__ __forceinline__ BFloat16 load_fresh(const BFloat16* from) {
  return {__ldcg(&from->bits)};
}
__device__ __forceinline__ uint4 load_fresh(const uint4* from) { return __ldcg(from); }

// The 16 bytes from column `first` of a row on; zeros behind its end.
template <typename T>
__device__ __forceinline__ uint4 load_piece(const T* row, int32_t first, int32_t hidden,
                                            bool aligned) {
  if (aligned) return load_fresh(reinterpret_cast<const uint4*>(row + first));
  constexpr int kSize = cuda::kVectorSize<T>;
  T elements[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    elements[i] = T{};
    if (first + i < hidden) elements[i] = load_fresh(row + first + i);
  }
  uint4 piece;
  memcpy(&piece, elements, sizeof(piece));
  return piece;
}

// A piece of the sum of one token.
template <typename T, int kMost>
struct Piece {
  uint32_t token, first;  // its first column
  uint4 parts[kMost];
  uint32_t has;  // bit r: whether rank r had the token

  __device__ __forceinline__ void load(const cuda::ExpertView& view, const Sums& sums,
                                       uint32_t number, bool aligned) {
    token = sums.by_row_pieces.divide(number, first);
    first *= cuda::kVectorSize<T>;
    has = 0;
    const ExpertBuffers& own = view.link.ranks[view.peers.rank];
#pragma unroll
    for (int rank = 0; rank < kMost; ++rank) {
      parts[rank] = make_uint4(0, 0, 0, 0);
      if (rank >= view.peers.size) continue;
      const int32_t place = sums.places[int64_t{token} * view.peers.size + rank];
      if (place < 0) continue;
      has |= 1u << rank;
      const void* rows = rank == view.peers.rank ? sums.partial : own.sums;
      parts[rank] =
          load_piece(static_cast<const T*>(rows) + (rank * own.region_rows + place) * sums.hidden,
                     static_cast<int32_t>(first), sums.hidden, aligned);
    }
  }

  template <typename Out>
  __device__ __forceinline__ void store(const Sums& sums, bool aligned) const {
    constexpr int kSize = cuda::kVectorSize<T>;
    float values[kMost][kSize];
#pragma unroll
    for (int rank = 0; rank < kMost; ++rank) cuda::unpack(parts[rank], values[rank]);
    float totals[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      float column[kMost];
#pragma unroll
      for (int rank = 0; rank < kMost; ++rank) {
        column[rank] = (has >> rank & 1) != 0 ? values[rank][i] : -0.0f;
      }
      totals[i] = has != 0 ? sum_in_order(column, kMost) : 0.0f;
    }
    const cuda::SumsOf<T, Out> rounded = cuda::round_sums<T, Out>(totals);
    Out* out = static_cast<Out*>(sums.out) + int64_t{token} * sums.hidden + first;
    if (aligned) {
      *reinterpret_cast<cuda::SumsOf<T, Out>*>(out) = rounded;
      return;
    }
    Out elements[kSize];
    memcpy(elements, &rounded, sizeof(rounded));
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (first + i < static_cast<uint32_t>(sums.hidden)) out[i] = elements[i];
    }
  }
};

// Adds up the rows of the rank's own tokens. `aligned`: rows are whole pieces.
template <typename T, typename Out, int kMost>
__device__ void add_rows(const cuda::ExpertView& view, const Sums& sums, bool aligned) {
  // As many as registers hold.
  constexpr int kInFlight = kMost > 4 ? 1 : 8 / kMost;
  const uint32_t stride = gridDim.x * kThreads;
  // Threads of one number in their blocks come one after the other: few tokens are all blocks'.
  const uint32_t begin = threadIdx.x / 32 * gridDim.x * 32 + blockIdx.x * 32 + threadIdx.x % 32;
  for (uint32_t first = begin; first < sums.pieces; first += kInFlight * stride) {
    Piece<T, kMost> loaded[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * stride < sums.pieces) loaded[i].load(view, sums, first + i * stride, aligned);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * stride < sums.pieces) loaded[i].template store<Out>(sums, aligned);
    }
  }
}

template <typename T, typename Out, int kMost>
__global__ void __launch_bounds__(kThreads)
    moe_combine_kernel(const __grid_constant__ cuda::ExpertView view,
                       const __grid_constant__ Sums sums, int unit) {
  cuda::launch_next();
  cuda::wait_for_previous();
  if (view.meets) {
    const uint64_t call = cuda::begin_call(view.peers);
    if (call == 0) return;
    if (unit == 16) {
      send_rows<uint4>(view, sums);
    } else if (unit == 4) {
      send_rows<uint32_t>(view, sums);
    } else {
      send_rows<uint16_t>(view, sums);
    }
    cuda::count_call(view.peers);
    cuda::signal_peers(view.peers, 0, call);
    if (!await_all_signals(view.peers, call)) return;
  }
  add_rows<T, Out, kMost>(view, sums, unit == 16);
}

using Kernel = void (*)(cuda::ExpertView, Sums, int);

template <int kMost>
Kernel kernel_of(DType sum_dtype, DType dtype) {
  if (sum_dtype == DType::kBF16) return moe_combine_kernel<BFloat16, BFloat16, kMost>;
  if (dtype == DType::kBF16) return moe_combine_kernel<float, BFloat16, kMost>;
  return moe_combine_kernel<float, float, kMost>;
}

Kernel choose_kernel(DType sum_dtype, DType dtype, int size) {
  if (size <= 2) return kernel_of<2>(sum_dtype, dtype);
  if (size <= 4) return kernel_of<4>(sum_dtype, dtype);
  return kernel_of<kMaxRanks>(sum_dtype, dtype);
}

}  // namespace

namespace cuda {

void load_moe_combine(int size) {
  for (const auto [sum_dtype, dtype] :
       {std::pair(DType::kBF16, DType::kBF16), std::pair(DType::kF32, DType::kBF16),
        std::pair(DType::kF32, DType::kF32)}) {
    load_kernel(kOp, choose_kernel(sum_dtype, dtype, size));
  }
}

}  // namespace cuda

void moe_combine_cuda(const MoeCombineParams& params, const StepContext& ctx) {
  const ExpertBuffers& own = params.received;
  const cuda::ExpertView view = cuda::expert_view(expert_link_of(own, ctx, kOp), ctx);
  const int64_t row_bytes = own.hidden * static_cast<int64_t>(dtype_size(own.sum_dtype));
  const int unit = cuda::copy_unit(row_bytes);
  check_internal(cuda::is_vector_aligned(params.partial) && cuda::is_vector_aligned(own.sums) &&
                     cuda::is_vector_aligned(params.out),
                 kOp, "sums are not aligned to ", cuda::kVectorBytes, " bytes");
  check_internal(dtype_size(own.dtype) <= dtype_size(own.sum_dtype), kOp, "sums of ",
                 dtype_name(own.sum_dtype), " do not become ", dtype_name(own.dtype));
  Sums sums;
  sums.partial = params.partial;
  sums.places = params.places;
  sums.out = params.out;
  sums.hidden = static_cast<int32_t>(own.hidden);
  sums.row_units = static_cast<int32_t>(row_bytes / unit);
  const int64_t row_pieces = combined_pieces(own.hidden, own.sum_dtype);
  check_internal(ctx.sizes.num_tokens * row_pieces <= kMaxCombinedPieces, kOp, "a step of ",
                 ctx.sizes.num_tokens, " tokens of ", own.hidden, " columns is too large");
  sums.pieces = static_cast<uint32_t>(ctx.sizes.num_tokens * row_pieces);
  sums.by_row_pieces = cuda::FastDivider(static_cast<uint32_t>(row_pieces));
  if (cuda::CudaCommunicator* rank = cuda::nccl_rank(view, ctx)) {
    rank->combine_by_nccl(params.partial, own, ctx);
  }
  cuda::launch(kOp, ctx, choose_kernel(own.sum_dtype, own.dtype, view.peers.size),
               cuda::expert_grid(view, ctx), dim3(kThreads), 0, view, sums, unit);
}

}  // namespace mrv1
