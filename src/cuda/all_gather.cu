// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// The columns of all ranks side by side, through memory of the peers (peer_memory.h). Small blocks
// of columns travel in packets that say themselves that they have come; large ones as plain values
// with a flag for each thread block behind them.
#include <algorithm>

#include "fast_divider.cuh"
#include "launch.h"
#include "ops/all_gather.h"
#include "peer_group.h"
#include "peer_memory.cuh"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "all_gather";

// Rows of x, whose values are cut into pieces of 16 bytes that do not mind where rows end.
struct Rows {
  const void* x;   // [rows, cols]
  void* out;       // [rows, ranks * cols]
  uint32_t count;  // values of x
  uint32_t cols;
  cuda::FastDivider by_cols;
  bool aligned;  // x and out are aligned to pieces, and rows are whole pieces
};

template <typename T>
__device__ __forceinline__ uint4 load_columns(const Rows& rows, uint32_t piece) {
  return cuda::load_elements(static_cast<const T*>(rows.x), int64_t{piece} * cuda::kVectorSize<T>,
                             rows.count, rows.aligned);
}

// Puts a piece of `rank` where it belongs.
template <typename T>
__device__ __forceinline__ void store_columns(const Rows& rows, int ranks, int rank, uint32_t piece,
                                              uint4 values) {
  constexpr int kSize = cuda::kVectorSize<T>;
  const int64_t cols = rows.cols;
  const uint32_t first = piece * kSize;
  uint32_t col;
  int64_t row = rows.by_cols.divide(first, col);
  T* out = static_cast<T*>(rows.out) + rank * cols;
  if (rows.aligned) {
    *reinterpret_cast<uint4*>(out + row * ranks * cols + col) = values;
    return;
  }
  T elements[kSize];
  memcpy(elements, &values, sizeof(values));
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (first + i >= rows.count) return;
    out[row * ranks * cols + col] = elements[i];
    if (++col == rows.cols) {
      col = 0;
      ++row;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(cuda::kPeerThreads)
    gather_packets_kernel(const __grid_constant__ cuda::PeerView peers,
                          const __grid_constant__ Rows rows) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const auto pieces = static_cast<uint32_t>(cuda::divide_up(rows.count, cuda::kVectorSize<T>));
  const uint32_t begin = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t stride = gridDim.x * blockDim.x;
  const uint64_t call = cuda::begin_call(peers);
  if (call == 0) return;
  for (uint32_t piece = begin; piece < pieces; piece += stride) {
    const uint4 own = load_columns<T>(rows, piece);
    for (int step = 1; step < peers.size; ++step) {
      int rank = peers.rank + step;
      if (rank >= peers.size) rank -= peers.size;
      cuda::send_piece(cuda::packets_of(peers, rank, peers.rank, call), piece, own, call);
    }
    store_columns<T>(rows, peers.size, peers.rank, piece, own);
  }
  cuda::count_call(peers);
  for (uint32_t piece = begin; piece < pieces; piece += stride) {
    for (int rank = 0; rank < peers.size; ++rank) {
      if (rank == peers.rank) continue;
      const cuda::PeerPacket* packets = cuda::packets_of(peers, peers.rank, rank, call);
      cuda::PeerPacket packet[2];
      const bool arrived =
          cuda::wait_for_peers(peers, cuda::PeerWait::kColumns, call, [&]() -> int {
            packet[0] = cuda::load_packet(packets + cuda::packet_index(piece, 0));
            packet[1] = cuda::load_packet(packets + cuda::packet_index(piece, 1));
            return packet[0].call == call && packet[1].call == call ? -1 : rank;
          });
      if (!arrived) return;
      store_columns<T>(rows, peers.size, rank, piece, cuda::piece_of(packet[0], packet[1]));
    }
  }
}

// Of at most bulk_pieces / ranks pieces.
template <typename T>
__global__ void __launch_bounds__(cuda::kPeerThreads)
    gather_bulk_kernel(const __grid_constant__ cuda::PeerView peers,
                       const __grid_constant__ Rows rows) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const auto pieces = static_cast<uint32_t>(cuda::divide_up(rows.count, cuda::kVectorSize<T>));
  const uint32_t begin = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t stride = gridDim.x * blockDim.x;
  const uint64_t call = cuda::begin_call(peers);
  if (call == 0) return;
  for (uint32_t first = begin; first < pieces; first += cuda::kPeerInFlight * stride) {
    uint4 values[cuda::kPeerInFlight];
#pragma unroll
    for (int i = 0; i < cuda::kPeerInFlight; ++i) {
      if (first + i * stride < pieces) values[i] = load_columns<T>(rows, first + i * stride);
    }
    for (int step = 1; step < peers.size; ++step) {
      int rank = peers.rank + step;
      if (rank >= peers.size) rank -= peers.size;
      uint4* to = reinterpret_cast<uint4*>(cuda::gather_of(peers, rank, call)) +
                  int64_t{peers.rank} * pieces;
#pragma unroll
      for (int i = 0; i < cuda::kPeerInFlight; ++i) {
        if (first + i * stride < pieces) to[first + i * stride] = values[i];
      }
    }
#pragma unroll
    for (int i = 0; i < cuda::kPeerInFlight; ++i) {
      const uint32_t piece = first + i * stride;
      if (piece < pieces) store_columns<T>(rows, peers.size, peers.rank, piece, values[i]);
    }
  }
  cuda::count_call(peers);
  cuda::signal_peers(peers, 0, call);
  if (!cuda::await_signals(peers, cuda::PeerWait::kColumns, 0, call)) return;
  const uint4* from = reinterpret_cast<const uint4*>(cuda::gather_of(peers, peers.rank, call));
  for (int step = 1; step < peers.size; ++step) {
    int rank = peers.rank + step;
    if (rank >= peers.size) rank -= peers.size;
    for (uint32_t first = begin; first < pieces; first += cuda::kPeerInFlight * stride) {
      uint4 values[cuda::kPeerInFlight];
#pragma unroll
      for (int i = 0; i < cuda::kPeerInFlight; ++i) {
        const uint32_t piece = first + i * stride;
        if (piece < pieces) values[i] = __ldcg(from + int64_t{rank} * pieces + piece);
      }
#pragma unroll
      for (int i = 0; i < cuda::kPeerInFlight; ++i) {
        const uint32_t piece = first + i * stride;
        if (piece < pieces) store_columns<T>(rows, peers.size, rank, piece, values[i]);
      }
    }
  }
}

using Kernel = void (*)(cuda::PeerView, Rows);

struct GatherKernels {
  Kernel packets, bulk;
};

GatherKernels choose_kernels(DType dtype) {
  return dispatch_activation(dtype, kOp, [](auto tag) {
    using T = typename decltype(tag)::type;
    return GatherKernels{gather_packets_kernel<T>, gather_bulk_kernel<T>};
  });
}

}  // namespace

namespace cuda {

void load_all_gather() {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    const GatherKernels kernels = choose_kernels(dtype);
    for (const Kernel kernel : {kernels.packets, kernels.bulk}) load_kernel(kOp, kernel);
  }
}

}  // namespace cuda

void all_gather_cuda(const AllGatherParams& params, const StepContext& ctx) {
  const int64_t num_rows = params.logits_rows ? ctx.sizes.num_logits : ctx.sizes.num_tokens;
  const size_t size = dtype_size(params.dtype);
  const GatherKernels kernels = choose_kernels(params.dtype);
  check(params.cols > 0 && params.cols < int64_t{1} << 30, kOp, "cols is ", params.cols,
        "; must be positive and below 2**30");
  if (num_rows == 0) return;
  const size_t row_bytes = static_cast<size_t>(params.cols) * size;
  if (ctx.communicator == nullptr || ctx.communicator->size() == 1) {
    cuda::check_cuda(
        cudaMemcpyAsync(params.out, params.x, static_cast<size_t>(num_rows) * row_bytes,
                        cudaMemcpyDeviceToDevice, cuda::stream_of(ctx)),
        kOp, "cudaMemcpyAsync");
    return;
  }
  auto& group = static_cast<cuda::CudaCommunicator&>(*ctx.communicator);
  group.check_alive();
  const cuda::PeerView& peers = group.view();
  const int64_t piece = cuda::kPieceBytes / static_cast<int64_t>(size);
  const CollectiveKernels chosen =
      group.choose_gather(num_rows * static_cast<int64_t>(row_bytes), num_rows);
  if (chosen == CollectiveKernels::kNccl) {
    group.gather_by_nccl(params.x, params.out, num_rows, params.cols, params.dtype, ctx);
    return;
  }
  const bool packets = chosen == CollectiveKernels::kOneShot;
  // Whole rows at a time, as many as fit.
  const int64_t most = (packets ? peers.packet_pieces : peers.bulk_pieces / peers.size) * piece;
  check(params.cols <= most, kOp, "cols is ", params.cols, "; of ", peers.size, " ranks each has ",
        most, " at most");
  const int64_t rows_at_once = std::min(most / params.cols, num_rows);
  for (int64_t first = 0; first < num_rows; first += rows_at_once) {
    const int64_t length = std::min(num_rows - first, rows_at_once) * params.cols;
    Rows rows;
    rows.x = static_cast<const char*>(params.x) + static_cast<size_t>(first) * row_bytes;
    rows.out = static_cast<char*>(params.out) +
               static_cast<size_t>(first) * row_bytes * static_cast<size_t>(peers.size);
    rows.count = static_cast<uint32_t>(length);
    rows.cols = static_cast<uint32_t>(params.cols);
    rows.by_cols = cuda::FastDivider(rows.cols);
    rows.aligned = cuda::is_vector_aligned(rows.x) && cuda::is_vector_aligned(rows.out) &&
                   params.cols % piece == 0;
    const int64_t pieces = cuda::divide_up(length, piece);
    const cuda::PeerGrid grid = cuda::peer_grid(pieces, ctx.collective_blocks);
    cuda::launch(kOp, ctx, packets ? kernels.packets : kernels.bulk, grid.blocks, grid.threads, 0,
                 peers, rows);
  }
}

}  // namespace mrv1
