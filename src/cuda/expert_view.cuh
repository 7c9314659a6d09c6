// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "dist/expert_link.h"
#include "launch.h"
#include "peer_group.h"
#include "peer_memory.cuh"
#include "spare_processors.h"

namespace mrv1::cuda {

// What moe_dispatch and moe_combine have in common. They write straight into the buffers of other
// ranks, as plain values with a flag for each thread block behind them (peer_memory.h), and take
// few blocks, the same number on all ranks whatever each has to send: a block waits for its like.
// Where NCCL carries everything they write and read this rank's memory alone.

// Of a block: few blocks have to keep many bytes on their way.
constexpr int kExpertThreads = 1024;
constexpr int kExpertWarps = kExpertThreads / 32;

// The ranks of a step, as kernels get them.
struct ExpertView {
  PeerView peers;  // of one rank without a group: its size and rank alone
  ExpertLink link;
  bool meets;  // whether kernels write to others, and wait for them
};

inline ExpertView expert_view(const ExpertLink& link, const StepContext& ctx) {
  ExpertView view{};
  view.link = link;
  if (ctx.communicator == nullptr || ctx.communicator->size() == 1) {
    view.peers.size = 1;
    view.peers.expert_blocks = GroupOptions{}.expert_blocks;
    return view;
  }
  const auto& group = static_cast<const CudaCommunicator&>(*ctx.communicator);
  group.check_alive();
  view.peers = group.view();
  view.meets = group.reaches_peers();
  return view;
}

// The rank of a group where NCCL carries what kernels do not, else null.
inline CudaCommunicator* nccl_rank(const ExpertView& view, const StepContext& ctx) {
  if (view.meets || view.peers.size == 1) return nullptr;
  return static_cast<CudaCommunicator*>(ctx.communicator);
}

// Blocks of a launch: fewer beside another half of a step.
inline dim3 expert_grid(const ExpertView& view, const StepContext& ctx) {
  const int32_t spare = spare_processors(ctx);
  const int32_t blocks = view.peers.expert_blocks;
  return dim3(static_cast<unsigned>(spare > 0 ? std::min(spare, blocks) : blocks));
}

// Of what a row of bytes can be copied by: both addresses, and rows, are multiples of it.
template <typename Unit>
__device__ __forceinline__ const Unit* units_at(const void* base, int64_t row, int64_t units) {
  return static_cast<const Unit*>(base) + row * units;
}
template <typename Unit>
__device__ __forceinline__ Unit* units_at(void* base, int64_t row, int64_t units) {
  return static_cast<Unit*>(base) + row * units;
}

// Bytes that rows of `row_bytes` are copied by.
inline int copy_unit(int64_t row_bytes) {
  return row_bytes % 16 == 0 ? 16 : row_bytes % 4 == 0 ? 4 : 2;
}

// A warp's share of rows: units of a row that its lanes have in flight, and how many shares a row
// has. With little to send a share is small, so that all warps have something to do.
struct RowShares {
  int32_t in_flight;  // units of a lane, at most kPeerInFlight
  int32_t count;      // shares of a row
};
__device__ __forceinline__ RowShares share_rows(int64_t rows, int32_t row_units, int warps) {
  RowShares shares;
  const int64_t full = divide_up(row_units, 32 * kPeerInFlight);
  shares.in_flight = rows * full >= warps ? kPeerInFlight : 1;
  shares.count = static_cast<int32_t>(divide_up(row_units, 32 * shares.in_flight));
  return shares;
}

// What a lane has of a share.
template <typename Unit>
struct ShareUnits {
  Unit units[kPeerInFlight];

  __device__ __forceinline__ void load(const Unit* row, int32_t share, const RowShares& shares,
                                       int32_t row_units) {
    const int32_t begin = share * 32 * shares.in_flight + static_cast<int32_t>(threadIdx.x % 32);
#pragma unroll
    for (int i = 0; i < kPeerInFlight; ++i) {
      const int32_t unit = begin + i * 32;
      if (i < shares.in_flight && unit < row_units) units[i] = row[unit];
    }
  }
  __device__ __forceinline__ void store(Unit* row, int32_t share, const RowShares& shares,
                                        int32_t row_units) const {
    const int32_t begin = share * 32 * shares.in_flight + static_cast<int32_t>(threadIdx.x % 32);
#pragma unroll
    for (int i = 0; i < kPeerInFlight; ++i) {
      const int32_t unit = begin + i * 32;
      if (i < shares.in_flight && unit < row_units) row[unit] = units[i];
    }
  }
};

}  // namespace mrv1::cuda
