// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "dist/group_limits.h"

namespace mrv1::cuda {

// Memory through which the GPUs of one stage exchange values. Every rank has an area of one layout,
// which the others write and only it reads, as writes to a peer are faster than reads from it:
//
//   PeerHeader                                    flags of blocks
//   packets [2][source rank][packet_pieces][2]    small messages: values that carry their call
//   scatter [2][bulk_pieces], gather [2][bulk_pieces]   large ones: plain values, told by flags
//
// A piece is 16 bytes. The group's collectives are counted on the device, all ranks in step, so a
// captured graph needs no argument that changes. A call uses the half that its number's parity
// says. Every call hears from every rank before it ends; so when a rank is in call n + 2, all have
// begun n + 1, hence ended n, and no half is overwritten that somebody still reads.

constexpr int kPeerBlocks = 64;  // thread blocks of a collective at most
constexpr int64_t kPieceBytes = 16;

// What a rank may wait for: in a collective, or of another stage (PeerGroup::abort_reason has the
// words).
enum class PeerWait : uint32_t {
  kPartialSums,
  kSums,
  kColumns,
  kTokens,
  kExpertSums,
  kStart,
  kTrial,
  kValues,  // from here on of another stage, in a step
  kValuesTaken,
  kOutputs,
  kOutputsAdopted,
};

struct PeerHeader {
  // The last call that the rank's block has told of: what it sent before [0], and after [1] the
  // sum.
  alignas(256) uint64_t flags[2][kMaxRanks][kPeerBlocks];
};

// A rank's own counters, in its device memory.
struct PeerState {
  uint64_t calls;           // kCallUnit for each collective that all blocks have begun
  uint32_t ended;           // not 0 once the group has ended
  uint32_t reported;        // whether a thread of this rank has written the report
  uint32_t sent_blocks;     // of the stage_send that runs, those that have written their share
  uint32_t met[kMaxRanks];  // not 0 once the rank, among all, has written here
};
constexpr uint64_t kCallUnit = uint64_t{1} << 16;

// Of all ranks; null where one is not reached.
struct PeerStates {
  PeerState* states[kMaxRanks];
};

// Why a rank has ended its wait.
enum class PeerEnd : uint32_t { kNone = 0, kTold, kOutOfTime };

// In host memory that all kernels can address, one a rank.
struct alignas(128) PeerReport {
  uint32_t stop;    // ends every wait; by the host, or by a rank whose time is over
  PeerEnd end;      // what follows is there if it is not kNone
  PeerWait wait;    // what did not come
  int32_t missing;  // from which rank, among all
  uint64_t call;    // in which collective, counted from 1; between stages, in which step
  uint64_t step;    // that the rank has ended last, in a pipeline
};

// How kernels that wait learn that the group has ended, and end it. Ranks are those of all stages.
struct PeerWatch {
  int32_t rank, num_ranks;
  PeerState* state;     // of this rank
  PeerReport* reports;  // by rank
  uint64_t timeout;     // nanoseconds
};

// A rank's view of the ranks that it has collectives with, those of its stage, as kernels get it.
struct PeerView {
  int32_t rank, size;
  PeerWatch watch;
  char* areas[kMaxRanks];  // by rank
  int64_t packet_pieces, bulk_pieces;
  int64_t bulk_offset;    // of the scatter halves in an area
  int32_t expert_blocks;  // of moe_dispatch and moe_combine, the same on all ranks
};

}  // namespace mrv1::cuda
