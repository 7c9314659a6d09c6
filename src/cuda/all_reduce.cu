// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Sums over ranks through memory of the peers (peer_memory.h), by two kernels. Both read the values
// of all ranks as they were, sum them in one order and round once, so they give the same bits.
//
// one_shot: each rank writes all of its values to every peer, in packets, and sums everything
// itself. One trip, no fence; what travels is twice the values, to each peer.
// two_shot: each rank sums a part. Ranks write every part to its owner, and owners write the sums
// back: two trips with a fence each, but no value travels more often than it has to.
#include <algorithm>

#include "launch.h"
#include "ops/all_reduce.h"
#include "peer_group.h"
#include "peer_memory.cuh"
#include "peer_sums.cuh"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "all_reduce";

// A range of the values, cut into pieces of 16 bytes of x.
struct Range {
  const void* x;      // its first value
  void* out;          // its first sum
  const float* bias;  // by column, or null
  int64_t count;      // values
  uint32_t first_col, cols;
  bool aligned;  // x and out are aligned to what a piece takes
};

// One sum after another from the values of kMost ranks at most: absent ranks add -0, which leaves
// every number as it is.
template <typename T, int kMost>
__device__ __forceinline__ void sum_pieces(const cuda::PeerView& peers, const Range& range,
                                           const uint4 (&parts)[kMost], int64_t first,
                                           float (&sums)[cuda::kVectorSize<T>]) {
  constexpr int kSize = cuda::kVectorSize<T>;
  float values[kMost][kSize];
#pragma unroll
  for (int rank = 0; rank < kMost; ++rank) cuda::unpack(parts[rank], values[rank]);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    float column[kMost];
#pragma unroll
    for (int rank = 0; rank < kMost; ++rank) {
      column[rank] = rank < peers.size ? values[rank][i] : -0.0f;
    }
    sums[i] = sum_in_order(column, kMost);
  }
  if (range.bias == nullptr) return;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const uint32_t col = (range.first_col + static_cast<uint32_t>(first) + i) % range.cols;
    sums[i] += range.bias[col];
  }
}

template <typename T, typename Out>
__device__ __forceinline__ void store_sums(const Range& range, int64_t first,
                                           cuda::SumsOf<T, Out> sums) {
  constexpr int kSize = cuda::kVectorSize<T>;
  Out* out = static_cast<Out*>(range.out) + first;
  if (range.aligned && first + kSize <= range.count) {
    *reinterpret_cast<cuda::SumsOf<T, Out>*>(out) = sums;
    return;
  }
  Out elements[kSize];
  memcpy(elements, &sums, sizeof(sums));
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (first + i < range.count) out[i] = elements[i];
  }
}

template <typename T>
__device__ __forceinline__ uint4 load_part(const Range& range, int64_t piece) {
  return cuda::load_elements(static_cast<const T*>(range.x), piece * cuda::kVectorSize<T>,
                             range.count, range.aligned);
}

template <typename T, typename Out, int kMost>
__global__ void __launch_bounds__(cuda::kPeerThreads)
    one_shot_kernel(const __grid_constant__ cuda::PeerView peers,
                    const __grid_constant__ Range range) {
  cuda::launch_next();
  cuda::wait_for_previous();
  constexpr int kSize = cuda::kVectorSize<T>;
  const int64_t pieces = cuda::divide_up(range.count, kSize);
  const int64_t begin = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  // Asked for before the call's number is there.
  uint4 own = load_part<T>(range, begin);
  const uint64_t call = cuda::begin_call(peers);
  if (call == 0) return;
  for (int64_t piece = begin; piece < pieces; piece += stride) {
    if (piece != begin) own = load_part<T>(range, piece);
#pragma unroll
    for (int step = 1; step < kMost; ++step) {
      if (step >= peers.size) break;
      int rank = peers.rank + step;
      if (rank >= peers.size) rank -= peers.size;
      cuda::send_piece(cuda::packets_of(peers, rank, peers.rank, call), piece, own, call);
    }
  }
  cuda::count_call(peers);
  const cuda::PeerPacket* packets = cuda::packets_of(peers, peers.rank, 0, call);
  for (int64_t piece = begin; piece < pieces; piece += stride) {
    cuda::PeerPacket packet[kMost][2];
    const bool arrived =
        cuda::wait_for_peers(peers, cuda::PeerWait::kPartialSums, call, [&]() -> int {
#pragma unroll
          for (int rank = 0; rank < kMost; ++rank) {
            if (rank >= peers.size || rank == peers.rank) continue;
            const cuda::PeerPacket* from = packets + rank * peers.packet_pieces * 2;
            packet[rank][0] = cuda::load_packet(from + cuda::packet_index(piece, 0));
            packet[rank][1] = cuda::load_packet(from + cuda::packet_index(piece, 1));
          }
          int missing = -1;
#pragma unroll
          for (int rank = 0; rank < kMost; ++rank) {
            if (rank >= peers.size || rank == peers.rank) continue;
            if (packet[rank][0].call != call || packet[rank][1].call != call) missing = rank;
          }
          return missing;
        });
    if (!arrived) return;
    uint4 parts[kMost];
#pragma unroll
    for (int rank = 0; rank < kMost; ++rank) {
      parts[rank] = rank == peers.rank ? load_part<T>(range, piece)
                                       : cuda::piece_of(packet[rank][0], packet[rank][1]);
    }
    float sums[kSize];
    sum_pieces<T>(peers, range, parts, piece * kSize, sums);
    store_sums<T, Out>(range, piece * kSize, cuda::round_sums<T, Out>(sums));
  }
}

template <typename T, typename Out, int kMost>
__global__ void __launch_bounds__(cuda::kPeerThreads)
    two_shot_kernel(const __grid_constant__ cuda::PeerView peers,
                    const __grid_constant__ Range range) {
  cuda::launch_next();
  cuda::wait_for_previous();
  using Stored = cuda::SumsOf<T, Out>;
  constexpr int kSize = cuda::kVectorSize<T>;
  const int64_t pieces = cuda::divide_up(range.count, kSize);
  // Part r is that of rank r, the last one shorter. A thread has the same places of every part, on
  // every rank.
  const int64_t part = cuda::divide_up(pieces, peers.size);
  const int64_t begin = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  const auto length_of = [&](int rank) { return min(part, pieces - rank * part); };
  const auto peer_at = [&](int step) {
    const int rank = peers.rank + step;
    return rank >= peers.size ? rank - peers.size : rank;
  };
  const uint64_t call = cuda::begin_call(peers);
  if (call == 0) return;

  for (int step = 1; step < peers.size; ++step) {
    const int rank = peer_at(step);
    const int64_t length = length_of(rank);
    uint4* to = reinterpret_cast<uint4*>(cuda::scatter_of(peers, rank, call)) + peers.rank * part;
    for (int64_t place = begin; place < length; place += cuda::kPeerInFlight * stride) {
      uint4 values[cuda::kPeerInFlight];
#pragma unroll
      for (int i = 0; i < cuda::kPeerInFlight; ++i) {
        if (place + i * stride >= length) break;
        values[i] = load_part<T>(range, rank * part + place + i * stride);
      }
#pragma unroll
      for (int i = 0; i < cuda::kPeerInFlight; ++i) {
        if (place + i * stride >= length) break;
        to[place + i * stride] = values[i];
      }
    }
  }
  cuda::count_call(peers);
  cuda::signal_peers(peers, 0, call);
  if (!cuda::await_signals(peers, cuda::PeerWait::kPartialSums, 0, call)) return;

  const uint4* from = reinterpret_cast<const uint4*>(cuda::scatter_of(peers, peers.rank, call));
  const int64_t own = peers.rank * part;
  for (int64_t place = begin; place < length_of(peers.rank); place += stride) {
    const uint4 own_part = load_part<T>(range, own + place);
    uint4 parts[kMost];
#pragma unroll
    for (int rank = 0; rank < kMost; ++rank) {
      parts[rank] = own_part;
      if (rank < peers.size && rank != peers.rank) {
        parts[rank] = __ldcg(from + rank * part + place);
      }
    }
    float sums[kSize];
    sum_pieces<T>(peers, range, parts, (own + place) * kSize, sums);
    const Stored stored = cuda::round_sums<T, Out>(sums);
#pragma unroll
    for (int step = 1; step < kMost; ++step) {
      if (step >= peers.size) break;
      reinterpret_cast<Stored*>(cuda::gather_of(peers, peer_at(step), call))[own + place] = stored;
    }
    store_sums<T, Out>(range, (own + place) * kSize, stored);
  }
  __syncthreads();
  cuda::signal_peers(peers, 1, call);
  if (!cuda::await_signals(peers, cuda::PeerWait::kSums, 1, call)) return;

  const Stored* sums = reinterpret_cast<const Stored*>(cuda::gather_of(peers, peers.rank, call));
  for (int step = 1; step < peers.size; ++step) {
    const int rank = peer_at(step);
    const int64_t length = length_of(rank);
    for (int64_t place = begin; place < length; place += cuda::kPeerInFlight * stride) {
      Stored values[cuda::kPeerInFlight];
#pragma unroll
      for (int i = 0; i < cuda::kPeerInFlight; ++i) {
        if (place + i * stride >= length) break;
        values[i] = __ldcg(sums + rank * part + place + i * stride);
      }
#pragma unroll
      for (int i = 0; i < cuda::kPeerInFlight; ++i) {
        const int64_t piece = rank * part + place + i * stride;
        if (place + i * stride >= length) break;
        store_sums<T, Out>(range, piece * kSize, values[i]);
      }
    }
  }
}

// Without ranks: out = x + bias.
template <typename T, typename Out>
__global__ void __launch_bounds__(cuda::kPeerThreads)
    round_kernel(const __grid_constant__ Range range) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= range.count) return;
  float value = to_float(static_cast<const T*>(range.x)[i]);
  if (range.bias != nullptr) {
    value += range.bias[(range.first_col + static_cast<uint32_t>(i)) % range.cols];
  }
  static_cast<Out*>(range.out)[i] = from_float<Out>(value);
}

using Kernel = void (*)(cuda::PeerView, Range);

struct RangeKernels {
  Kernel one_shot, two_shot;
  void (*round)(Range);
};

template <typename T, typename Out, int kMost>
constexpr RangeKernels kernels_of() {
  return {one_shot_kernel<T, Out, kMost>, two_shot_kernel<T, Out, kMost>, round_kernel<T, Out>};
}

template <int kMost>
RangeKernels kernels_of(DType dtype, DType out_dtype) {
  if (dtype == DType::kBF16) return kernels_of<BFloat16, BFloat16, kMost>();
  if (out_dtype == DType::kBF16) return kernels_of<float, BFloat16, kMost>();
  return kernels_of<float, float, kMost>();
}

RangeKernels choose_kernels(DType dtype, DType out_dtype, int size) {
  if (size <= 2) return kernels_of<2>(dtype, out_dtype);
  if (size <= 4) return kernels_of<4>(dtype, out_dtype);
  return kernels_of<kMaxRanks>(dtype, out_dtype);
}

void check_all_reduce(const AllReduceParams& params) {
  const auto is_activation = [](DType dtype) {
    return dtype == DType::kF32 || dtype == DType::kBF16;
  };
  check(is_activation(params.dtype) && is_activation(params.out_dtype) &&
            dtype_size(params.out_dtype) <= dtype_size(params.dtype),
        kOp, dtype_name(params.dtype), " to ", dtype_name(params.out_dtype),
        "; must be float32 or bfloat16, and not become wider");
  check(params.cols > 0, kOp, "cols is ", params.cols, "; it must be positive");
}

}  // namespace

namespace cuda {

void load_all_reduce(int size) {
  for (const auto [dtype, out_dtype] :
       {std::pair(DType::kBF16, DType::kBF16), std::pair(DType::kF32, DType::kBF16),
        std::pair(DType::kF32, DType::kF32)}) {
    const RangeKernels kernels = choose_kernels(dtype, out_dtype, size);
    for (const Kernel kernel : {kernels.one_shot, kernels.two_shot}) load_kernel(kOp, kernel);
  }
}

}  // namespace cuda

void all_reduce_cuda(const AllReduceParams& params, const StepContext& ctx) {
  check_all_reduce(params);
  const int64_t rows = params.logits_rows ? ctx.sizes.num_logits : ctx.sizes.num_tokens;
  const int64_t count = rows * params.cols;
  if (count == 0) return;
  const size_t size = dtype_size(params.dtype);
  const size_t out_size = dtype_size(params.out_dtype);
  const int64_t piece = cuda::kPieceBytes / static_cast<int64_t>(size);
  const auto range_at = [&](int64_t first, int64_t length) {
    Range range;
    range.x = static_cast<const char*>(params.x) + static_cast<size_t>(first) * size;
    range.out = static_cast<char*>(params.out) + static_cast<size_t>(first) * out_size;
    range.bias = params.bias;
    range.count = length;
    range.first_col = static_cast<uint32_t>(first % params.cols);
    range.cols = static_cast<uint32_t>(params.cols);
    range.aligned = cuda::is_vector_aligned(range.x) &&
                    reinterpret_cast<uintptr_t>(range.out) % (piece * out_size) == 0;
    return range;
  };
  // Offsets within a range are 32 bits, those of columns included.
  check(params.cols < int64_t{1} << 30, kOp, "cols is ", params.cols, "; it must be below 2**30");
  constexpr int64_t kMaxCount = int64_t{1} << 30;
  if (ctx.communicator == nullptr || ctx.communicator->size() == 1) {
    if (params.x == params.out && params.bias == nullptr) return;
    const RangeKernels kernels = choose_kernels(params.dtype, params.out_dtype, 1);
    for (int64_t first = 0; first < count; first += kMaxCount) {
      const int64_t length = std::min(count - first, kMaxCount);
      cuda::launch(kOp, ctx, kernels.round,
                   dim3(static_cast<unsigned>(cuda::divide_up(length, cuda::kPeerThreads))),
                   dim3(cuda::kPeerThreads), 0, range_at(first, length));
    }
    return;
  }
  auto& group = static_cast<cuda::CudaCommunicator&>(*ctx.communicator);
  group.check_alive();
  const cuda::PeerView& peers = group.view();
  const int64_t bytes = count * static_cast<int64_t>(size);
  // NCCL adds no bias and keeps the dtype.
  const bool plain = params.bias == nullptr && params.dtype == params.out_dtype;
  const CollectiveKernels chosen = group.choose_sum(bytes, plain && !ctx.batch_invariant);
  if (chosen == CollectiveKernels::kNccl) {
    group.sum_by_nccl(params.x, params.out, count, params.dtype, ctx);
    return;
  }
  const RangeKernels kernels = choose_kernels(params.dtype, params.out_dtype, peers.size);
  const bool one_shot = chosen == CollectiveKernels::kOneShot;
  // A thread of two_shot has a piece of every part.
  const int64_t most = one_shot ? peers.packet_pieces : peers.bulk_pieces / peers.size * peers.size;
  for (int64_t first = 0; first < count; first += most * piece) {
    const int64_t length = std::min(count - first, most * piece);
    const int64_t pieces =
        cuda::divide_up(cuda::divide_up(length, piece), one_shot ? 1 : peers.size);
    const cuda::PeerGrid grid = cuda::peer_grid(pieces, ctx.collective_blocks);
    cuda::launch(kOp, ctx, one_shot ? kernels.one_shot : kernels.two_shot, grid.blocks,
                 grid.threads, 0, peers, range_at(first, length));
  }
}

}  // namespace mrv1
