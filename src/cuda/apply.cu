// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// The record lies in host memory, where a read takes a microsecond or two and only many at a time
// are fast. One block therefore reads all of the record but a long payload into shared memory with
// every thread at once, before it looks at anything, and works from there. It stages the header and
// the batch for the later phases and carries the commands out, kind after kind in the record's
// order. Frees stand before a barrier, as a freed row can be given away again in the same record;
// the other kinds write to places of their own. Tokens are the one kind that may be long: their
// payload is copied in pieces of a warp each. More blocks would only wait for each other: host
// reads of the same header by several take their turns on the bus, 0.8 us each on an H200.
#include "block.cuh"
#include "launch.h"
#include "staged_record.h"
#include "state/infer_params.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "apply";
constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / cuda::kWarpSize;
constexpr uint32_t kChunk = 16;  // bytes of a load; arrays of a record start at multiples of it
// What is read before the record's length is known, what is cached at most, and the header's room.
constexpr uint32_t kFirstBytes = kThreads * kChunk;
constexpr uint32_t kCachedBytes = 40 << 10;
constexpr uint32_t kHeaderBytes = 128;
// A payload above this is not cached.
constexpr uint32_t kCachedPayload = 16 << 10;
// A warp copies pieces of so many chunks, all in flight together.
constexpr int kLoads = 4;
constexpr int32_t kPieceChunks = kLoads * cuda::kWarpSize;
constexpr int32_t kTile = 256;  // token writes that are looked at together

static_assert(sizeof(ControlHeader) <= kHeaderBytes && kHeaderBytes <= kFirstBytes);
static_assert(sizeof(NewRow) % kChunk == 0 && sizeof(Row) % kChunk == 0 &&
              sizeof(SamplingRow) % kChunk == 0);

// Reads the record at 16-byte steps: its start from the copy in shared memory, the rest from the
// host, past caches that may hold the slot as it was.
class RecordReader {
 public:
  __device__ RecordReader(const char* record, char* cache) : record_(record), cache_(cache) {}

  // Brings bytes up to `bytes` (rounded up to a chunk) into the copy. Every thread of the block
  // calls it; ends with a barrier.
  __device__ void cache_up_to(uint32_t bytes) {
    for (uint32_t at = cached_ + threadIdx.x * kChunk; at < bytes; at += kThreads * kChunk) {
      *reinterpret_cast<int4*>(cache_ + at) = host_chunk(at);
    }
    cached_ = max(cached_, (bytes + kChunk - 1) / kChunk * kChunk);
    __syncthreads();
  }

  __device__ int4 chunk(uint32_t offset) const {
    return offset < cached_ ? *reinterpret_cast<const int4*>(cache_ + offset) : host_chunk(offset);
  }

  // A value of 4-byte words at a multiple of 4.
  template <typename T>
  __device__ T read(uint32_t offset) const {
    constexpr int kWords = sizeof(T) / sizeof(int32_t);
    int32_t words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t at = offset + i * sizeof(int32_t);
      words[i] = at < cached_ ? *reinterpret_cast<const int32_t*>(cache_ + at)
                              : __ldcv(reinterpret_cast<const int32_t*>(record_ + at));
    }
    T value;
    memcpy(&value, words, sizeof(T));
    return value;
  }

  __device__ const ControlHeader& header() const {
    return *reinterpret_cast<const ControlHeader*>(cache_);
  }

 private:
  __device__ int4 host_chunk(uint32_t offset) const {
    return __ldcv(reinterpret_cast<const int4*>(record_ + offset));
  }

  const char* record_;
  char* cache_;
  uint32_t cached_ = 0;
};

// `count` ids of the payload on their way to `target`.
struct IdCopy {
  int32_t* target;
  int32_t count;
  uint32_t first_chunk;  // offset of the chunk that holds the first id
  int32_t lead;          // ids before the first one in that chunk
  int32_t pieces;

  __device__ IdCopy(const ControlHeader& header, int32_t* target, int32_t payload_start,
                    int32_t count)
      : target(target), count(count) {
    const uint32_t offset = header.payload_offset + payload_start * sizeof(int32_t);
    first_chunk = offset / kChunk * kChunk;
    lead = static_cast<int32_t>((offset - first_chunk) / sizeof(int32_t));
    pieces = (num_chunks() + kPieceChunks - 1) / kPieceChunks;
  }

  __device__ int32_t num_chunks() const { return (lead + count + 3) / 4; }

  // Copies one piece with the lanes of a warp.
  __device__ void copy(const RecordReader& reader, int32_t piece) const {
    const int32_t lane = threadIdx.x % cuda::kWarpSize;
    const int32_t chunks = num_chunks();
    int4 ids[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int32_t chunk = piece * kPieceChunks + i * cuda::kWarpSize + lane;
      if (chunk < chunks) ids[i] = reader.chunk(first_chunk + chunk * kChunk);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int32_t chunk = piece * kPieceChunks + i * cuda::kWarpSize + lane;
      if (chunk >= chunks) continue;
      const int32_t at = chunk * 4 - lead;
      put(at, ids[i].x);
      put(at + 1, ids[i].y);
      put(at + 2, ids[i].z);
      put(at + 3, ids[i].w);
    }
  }

  __device__ void put(int32_t at, int32_t id) const {
    if (at >= 0 && at < count) target[at] = id;
  }
};

// All pieces of a copy, by one warp.
__device__ void copy_ids(const RecordReader& reader, int32_t* target, int32_t payload_start,
                         int32_t count) {
  const IdCopy copy(reader.header(), target, payload_start, count);
  for (int32_t piece = 0; piece < copy.pieces; ++piece) copy.copy(reader, piece);
}

// For the phases after this one.
__device__ void stage(const RecordReader& reader, cuda::StagedRecord* staged, uint64_t begin_ns) {
  const ControlHeader& header = reader.header();
  int4* entries = reinterpret_cast<int4*>(reinterpret_cast<char*>(staged) + cuda::kStagedEntries);
  for (int32_t i = threadIdx.x; i < header.num_entries; i += kThreads) {
    entries[i] = reader.chunk(header.entries_offset + i * kChunk);
  }
  if (threadIdx.x == 0) {
    ControlHeader copy = header;
    copy.entries_offset = cuda::kStagedEntries;
    staged->header = copy;
    staged->begin_ns = begin_ns;
  }
}

// Frees rows; their block tables become zero. A warp each.
__device__ void free_rows(const RecordReader& reader, const RowState& state) {
  const ControlHeader& header = reader.header();
  const int lane = threadIdx.x % cuda::kWarpSize;
  for (int32_t i = threadIdx.x / cuda::kWarpSize; i < header.num_freed; i += kWarps) {
    const auto freed = reader.read<FreeRow>(header.freed_offset + i * sizeof(FreeRow));
    Row& row = state.rows[freed.row];
    if (row.generation != freed.generation) continue;
    if (lane == 0) row.phase = RowPhase::kFree;
    for (int32_t group = 0; group < state.num_groups; ++group) {
      const int64_t table = (int64_t{group} * state.num_rows + freed.row) * state.max_blocks;
      for (int32_t j = lane; j < state.max_blocks; j += cuda::kWarpSize) {
        state.block_table[table + j] = 0;
      }
    }
  }
}

// New rows and their sampling parameters, a chunk a thread.
__device__ void add_rows(const RecordReader& reader, const RowState& state) {
  const ControlHeader& header = reader.header();
  constexpr int32_t kRowChunks = sizeof(NewRow) / kChunk;
  constexpr int32_t kStateChunk = offsetof(NewRow, state) / kChunk;
  constexpr int32_t kSamplingChunk = offsetof(NewRow, sampling) / kChunk;
  for (int32_t i = threadIdx.x; i < header.num_new_rows * kRowChunks; i += kThreads) {
    const uint32_t offset = header.new_rows_offset + i / kRowChunks * sizeof(NewRow);
    const int32_t row = reader.read<int32_t>(offset + offsetof(NewRow, row));
    const int32_t part = i % kRowChunks;
    const int4 chunk = reader.chunk(offset + part * kChunk);
    if (part >= kSamplingChunk) {
      reinterpret_cast<int4*>(state.sampling + row)[part - kSamplingChunk] = chunk;
    } else if (part >= kStateChunk) {
      reinterpret_cast<int4*>(state.rows + row)[part - kStateChunk] = chunk;
    }
  }
}

__device__ void write_blocks_and_words(const RecordReader& reader, const RowState& state) {
  const ControlHeader& header = reader.header();
  const int warp = threadIdx.x / cuda::kWarpSize;
  for (int32_t i = warp; i < header.num_block_writes; i += kWarps) {
    const auto write = reader.read<BlockWrite>(header.block_writes_offset + i * sizeof(BlockWrite));
    const int64_t table = (int64_t{write.group} * state.num_rows + write.row) * state.max_blocks;
    copy_ids(reader, state.block_table + table + write.start, write.payload_start, write.count);
  }
  for (int32_t i = warp; i < header.num_word_writes; i += kWarps) {
    const auto write = reader.read<WordWrite>(header.word_writes_offset + i * sizeof(WordWrite));
    if (write.payload_start >= 0) {
      copy_ids(reader, write.target, write.payload_start, write.count);
    }
  }
  // Fills may be long, so that all threads share each.
  for (int32_t i = 0; i < header.num_word_writes; ++i) {
    const auto write = reader.read<WordWrite>(header.word_writes_offset + i * sizeof(WordWrite));
    if (write.payload_start >= 0) continue;
    for (int32_t word = threadIdx.x; word < write.count; word += kThreads) write.target[word] = 0;
  }
}

// Token writes: each warp takes the pieces whose number over all writes falls to it.
__device__ void write_tokens(const RecordReader& reader, const RowState& state) {
  const int32_t warp = threadIdx.x / cuda::kWarpSize;
  __shared__ TokenWrite writes[kTile];
  static_assert(sizeof(TokenWrite) == kChunk && kTile <= kThreads);
  const ControlHeader& header = reader.header();
  int32_t before = 0;  // pieces of earlier writes, modulo kWarps
  for (int32_t first = 0; first < header.num_token_writes; first += kTile) {
    const int32_t tile = min(kTile, header.num_token_writes - first);
    __syncthreads();  // the last tile has been worked off
    if (threadIdx.x < tile) {
      *reinterpret_cast<int4*>(&writes[threadIdx.x]) =
          reader.chunk(header.token_writes_offset + (first + threadIdx.x) * kChunk);
    }
    __syncthreads();
    for (int32_t i = 0; i < tile; ++i) {
      const TokenWrite write = writes[i];
      const IdCopy copy(header,
                        state.tokens + int64_t{write.row} * state.max_model_len + write.start,
                        write.payload_start, write.count);
      int32_t piece = warp - before;
      if (piece < 0) piece += kWarps;
      for (; piece < copy.pieces; piece += kWarps) copy.copy(reader, piece);
      before = (before + copy.pieces) % kWarps;
    }
  }
}

__global__ void __launch_bounds__(kThreads) apply_kernel(StepRings rings, RowState state) {
  __shared__ __align__(16) char cache[kCachedBytes];
  cuda::wait_for_previous();
  cuda::launch_next();
  // By one thread only, as the clock is slow to read.
  const uint64_t begin_ns = threadIdx.x == 0 ? cuda::device_clock_ns() : 0;
  RecordReader reader(reinterpret_cast<const char*>(rings.record()), cache);
  const auto slot_bytes = static_cast<uint32_t>(rings.control_bytes);
  reader.cache_up_to(min(kFirstBytes, slot_bytes));
  const ControlHeader& header = reader.header();
  const bool is_long = header.bytes - header.payload_offset > kCachedPayload;
  const uint32_t wanted = is_long ? header.payload_offset : header.bytes;
  if (wanted > kFirstBytes) reader.cache_up_to(min(wanted, kCachedBytes));
  stage(reader, reinterpret_cast<cuda::StagedRecord*>(rings.staged), begin_ns);
  free_rows(reader, state);
  __syncthreads();
  add_rows(reader, state);
  write_blocks_and_words(reader, state);
  write_tokens(reader, state);
}

}  // namespace

void apply_cuda(const StepContext& ctx) {
  const StepRings& rings = ctx.rings;
  check_internal(rings.staged != nullptr && rings.step != nullptr && rings.num_slots > 0, kOp,
                 "the step's rings are not set up");
  check_internal(rings.control_bytes >= kHeaderBytes && rings.control_bytes % kChunk == 0, kOp,
                 "control_bytes is ", rings.control_bytes, ", expected a multiple of ", kChunk,
                 " from ", kHeaderBytes);
  cuda::launch(kOp, ctx, apply_kernel, 1, kThreads, 0, rings, ctx.rows);
}

}  // namespace mrv1
