// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "dist/communicator.h"

namespace mrv1::cuda {

// Memory through which the GPUs of one host exchange values. Every rank has an area of one layout,
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

// What a rank may wait for; peer_wait_text() has the words.
enum class PeerWait : uint32_t { kPartialSums, kSums, kColumns, kStart };

struct PeerHeader {
  uint32_t ended;  // not 0 once the group has ended
  // The last call that the rank's block has told of: what it sent before [0], and after [1] the
  // sum.
  alignas(256) uint64_t flags[2][kMaxRanks][kPeerBlocks];
};

// A rank's own counters, in its device memory.
struct PeerState {
  uint64_t calls;     // kCallUnit for each collective that all blocks have begun
  uint32_t reported;  // whether a thread of this rank has written the report
};
constexpr uint64_t kCallUnit = uint64_t{1} << 16;

// In host memory that kernels can address.
struct PeerReport {
  uint32_t stop;     // written by the host: ends every wait
  uint32_t written;  // not 0 once what follows is there
  PeerWait wait;     // what did not come
  int32_t missing;   // from which rank
  uint64_t call;     // in which collective, counted from 1
};

// A rank's view of its group, as kernels get it.
struct PeerView {
  int32_t rank, size;
  PeerState* state;
  PeerReport* report;
  char* areas[kMaxRanks];  // by rank
  int64_t packet_pieces, bulk_pieces;
  int64_t bulk_offset;  // of the scatter halves in an area
  uint64_t timeout;     // nanoseconds
};

}  // namespace mrv1::cuda
