// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Paged attention on bfloat16 tensor cores. The work list says what a thread block computes
// (attention_plan.cuh). Each of its four warps brings a quarter of every unit's positions to shared
// memory, several units ahead and across segments, so that memory never waits for arithmetic. In a
// narrow tile (up to 16 rows: a decode row's heads) a warp also computes those positions, with no
// barrier until the segment ends and the four results are summed. In a wide one (prefill) a warp
// takes 16 of 64 rows over all positions.
//
// While memory is busy a read takes microseconds, whatever it is. So queries, items and block ids
// are asked for ahead as well, and nobody waits for the arrival of a partial result.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "launch.h"
#include "native_attention.h"

namespace mrv1::cuda {
namespace native {

constexpr int kBlock = 16;  // positions of a matrix instruction's tile
constexpr uint32_t kNowhere = 0xffffffffu;
constexpr unsigned kAllLanes = 0xffffffffu;

template <int D>
struct Layout {
  static constexpr int kChunks = D / 8;
  static constexpr bool kSwizzled = kChunks % 8 == 0;
  static constexpr int kRowBytes = row_chunks(D) * 16;
  static constexpr int kMatrixBytes = kBlock * kRowBytes;  // keys or values of a block of positions
  static constexpr int kStageBytes = kAttentionWarps * 2 * kMatrixBytes;
  static_assert(kStageBytes == attention_memory(D).stage_bytes);

  __device__ static uint32_t offset(int row, int chunk) {
    return static_cast<uint32_t>(row * kRowBytes + (kSwizzled ? chunk ^ (row & 7) : chunk) * 16);
  }
};

// This thread's place in its warp, as a value of its own each time: what follows from it is
// computed again in every unit, which is cheaper than to keep it all in registers between units.
__device__ __forceinline__ int lane_id() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ void copy_async(uint32_t target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all but the `pending` newest groups have arrived.
__device__ __forceinline__ void wait_copies(int pending) {
  switch (pending) {
    case 0:
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      break;
    case 1:
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      break;
    case 2:
      asm volatile("cp.async.wait_group 2;" ::: "memory");
      break;
    case 3:
      asm volatile("cp.async.wait_group 3;" ::: "memory");
      break;
    default:
      asm volatile("cp.async.wait_group 4;" ::: "memory");
      break;
  }
}
static_assert(kMaxStages - 2 <= 4);

__device__ __forceinline__ void load_matrices(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_transposed(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// A row's softmax over some positions: the largest score, the sum of exponentials, and four of the
// output's columns, not divided by the sum yet. Scores are in powers of two.
struct Partial {
  float maximum, sum;
  float4 out;
};

// What -infinity, the maximum of no positions, is replaced by where it is subtracted.
__device__ __forceinline__ float finite(float maximum) {
  return maximum == -INFINITY ? 0.0f : maximum;
}

// Adds `next`, of later positions. Wherever results are added, it is by this, in ascending order.
__device__ __forceinline__ void fold(Partial& into, const Partial& next) {
  const float maximum = fmaxf(into.maximum, next.maximum);
  const float old_factor = exp2_fast(into.maximum - finite(maximum));
  const float factor = exp2_fast(next.maximum - finite(maximum));
  into.maximum = maximum;
  into.sum = fmaf(next.sum, factor, into.sum * old_factor);
  into.out.x = fmaf(next.out.x, factor, into.out.x * old_factor);
  into.out.y = fmaf(next.out.y, factor, into.out.y * old_factor);
  into.out.z = fmaf(next.out.z, factor, into.out.z * old_factor);
  into.out.w = fmaf(next.out.w, factor, into.out.w * old_factor);
}

// A warp's 16 rows: lane l holds columns 2 * (l % 4) and the next of every 8, of rows l / 4 ([0])
// and l / 4 + 8 ([1]).
template <int D>
struct Rows {
  using L = Layout<D>;
  // Queries of a narrow tile stay in shared memory where there are no registers for them.
  static constexpr bool kQueryInRegisters = D <= 128;

  uint32_t query[D / 16][4];
  float out[D / 8][4];
  float maximum[2], sum[2];
  int32_t low[2], high[2];          // positions that the row sees
  int32_t common_low, common_high;  // positions that every row sees

  __device__ void clear() {
#pragma unroll
    for (int t = 0; t < D / 8; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[t][i] = 0.0f;
    }
    maximum[0] = maximum[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }

  // Rows [first, first + 16) of the item's tile; those past its end repeat the last.
  __device__ void place(const NativeAttentionArgs& args, const AttentionItem& item, int32_t first) {
    const int lane = lane_id();
    const int32_t last = item.rows - 1;
    const auto position = [&](int32_t tile_row) {
      return item.context + (item.first + min(tile_row, last)) / args.group;
    };
    const auto lowest = [&](int32_t high) {
      return args.window > 0 ? max(0, high - args.window + 1) : 0;
    };
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      high[side] = position(first + lane / 4 + 8 * side);
      low[side] = lowest(high[side]);
    }
    common_high = position(first);
    common_low = lowest(position(first + kBlock - 1));
  }

  // Queries of a wide tile, from memory; rows past its end are zeros.
  __device__ void load_queries(const NativeAttentionArgs& args, const AttentionItem& item,
                               int32_t head, int32_t first) {
    const int lane = lane_id();
    const int64_t cols = int64_t{args.num_heads + 2 * args.num_kv_heads} * args.head_dim;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int32_t tile_row = first + lane / 4 + 8 * side;
      const int32_t row = item.first + min(tile_row, item.rows - 1);
      const int32_t token = row / args.group;
      const uint16_t* source =
          args.qkv + (item.token + token) * cols +
          int64_t{head * args.group + row - token * args.group} * args.head_dim;
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          const int col = 16 * k + 8 * part + 2 * (lane % 4);
          query[k][2 * part + side] = tile_row < item.rows && col < args.head_dim
                                          ? *reinterpret_cast<const uint32_t*>(source + col)
                                          : 0u;
        }
      }
    }
  }

  // A fragment of the queries of a narrow tile in shared memory.
  __device__ static void query_fragment(uint32_t (&fragment)[4], uint32_t queries, int k,
                                        int lane) {
    load_matrices(fragment, queries + L::offset(lane & 15, 2 * k + (lane >> 4)));
  }
  __device__ void read_queries(uint32_t queries) {
    if constexpr (kQueryInRegisters) {
      const int lane = lane_id();
#pragma unroll
      for (int k = 0; k < D / 16; ++k) query_fragment(query[k], queries, k, lane);
    }
  }

  // Takes in kBlocks blocks of positions from `position` on; block b's keys lie at
  // keys + 2 * b * kMatrixBytes, its values kMatrixBytes after them.
  template <int kBlocks, bool kNarrow>
  __device__ void attend(uint32_t queries, uint32_t keys, int32_t position, float scale) {
    const int lane = lane_id();
    float score[2 * kBlocks][4];
#pragma unroll
    for (int t = 0; t < 2 * kBlocks; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[t][i] = 0.0f;
    }
    const int key_row = (lane & 7) + (lane >> 4 << 3);
    const int key_chunk = (lane >> 3) & 1;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint32_t own[4];
      if constexpr (kNarrow && !kQueryInRegisters) query_fragment(own, queries, k, lane);
      const uint32_t (&rows)[4] = kNarrow && !kQueryInRegisters ? own : query[k];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        uint32_t fragment[4];
        load_matrices(fragment,
                      keys + 2 * b * L::kMatrixBytes + L::offset(key_row, 2 * k + key_chunk));
        multiply_add(score[2 * b], rows, fragment[0], fragment[1]);
        multiply_add(score[2 * b + 1], rows, fragment[2], fragment[3]);
      }
    }
#pragma unroll
    for (int t = 0; t < 2 * kBlocks; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[t][i] *= scale;
    }
    if (position + kBlocks * kBlock - 1 > common_high || position < common_low) {
#pragma unroll
      for (int t = 0; t < 2 * kBlocks; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int32_t p = position + 8 * t + 2 * (lane % 4) + (i & 1);
          if (p > high[i / 2] || p < low[i / 2]) score[t][i] = -INFINITY;
        }
      }
    }

    float factor[2];
    float base[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float largest = maximum[side];
#pragma unroll
      for (int t = 0; t < 2 * kBlocks; ++t) {
        largest = fmaxf(largest, fmaxf(score[t][2 * side], score[t][2 * side + 1]));
      }
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
      base[side] = finite(largest);
      factor[side] = exp2_fast(maximum[side] - base[side]);
      maximum[side] = largest;
      sum[side] *= factor[side];
    }
#pragma unroll
    for (int t = 0; t < 2 * kBlocks; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[t][i] = exp2_fast(score[t][i] - base[i / 2]);
        sum[i / 2] += score[t][i];
      }
    }
    if (__any_sync(kAllLanes, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
      for (int t = 0; t < D / 8; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[t][i] *= factor[i / 2];
      }
    }

    const uint32_t values = keys + L::kMatrixBytes;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const uint32_t weights[4] = {pack(score[2 * b][0], score[2 * b][1]),
                                   pack(score[2 * b][2], score[2 * b][3]),
                                   pack(score[2 * b + 1][0], score[2 * b + 1][1]),
                                   pack(score[2 * b + 1][2], score[2 * b + 1][3])};
#pragma unroll
      for (int t = 0; t < D / 16; ++t) {
        uint32_t fragment[4];
        load_transposed(
            fragment, values + 2 * b * L::kMatrixBytes + L::offset(lane & 15, 2 * t + (lane >> 4)));
        multiply_add(out[2 * t], weights, fragment[0], fragment[1]);
        multiply_add(out[2 * t + 1], weights, fragment[2], fragment[3]);
      }
    }
  }

  // Adds up what the four lanes of a row have summed on their own.
  __device__ void reduce_sums() {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      sum[side] += __shfl_xor_sync(kAllLanes, sum[side], 1);
      sum[side] += __shfl_xor_sync(kAllLanes, sum[side], 2);
    }
  }
};

// Walks the segments of a worker.
struct Walk {
  Segment at;     // unit and unit_end are what is left of the segment
  int32_t index;  // of the item
  int32_t next;   // word l of the item after it, in lane l

  __device__ void start(const NativeAttentionArgs& args, const AttentionWorker& worker) {
    at.item = worker.item;
    index = worker.index;
    if (index >= worker.num_items) return;
    look_ahead(args, worker);
    const int32_t cells = ItemUnits(at.item).cells;
    at.head = (static_cast<int32_t>(blockIdx.x) * worker.share - at.item.cell) / cells;
    at.cell = at.item.cell + at.head * cells;
    seek(args, worker);
  }

  __device__ bool done(const AttentionWorker& worker) const { return index >= worker.num_items; }

  __device__ void next_segment(const NativeAttentionArgs& args, const AttentionWorker& worker) {
    step(args, worker);
    seek(args, worker);
  }

 private:
  // Finds the segment here or the next that has units.
  __device__ void seek(const NativeAttentionArgs& args, const AttentionWorker& worker) {
    const int32_t from = static_cast<int32_t>(blockIdx.x) * worker.share;
    while (index < worker.num_items) {
      const int32_t first = at.cell + kSegmentCost;
      if (at.cell - from >= worker.share) {
        index = worker.num_items;
        return;
      }
      const ItemUnits units(at.item);
      at.unit = units.first_unit(from - first, worker.granule_log2);
      at.unit_end = units.first_unit(from + worker.share - first, worker.granule_log2);
      if (at.unit < at.unit_end) return;
      step(args, worker);
    }
  }

  __device__ void step(const NativeAttentionArgs& args, const AttentionWorker& worker) {
    at.cell += ItemUnits(at.item).cells;
    if (++at.head < args.num_kv_heads) return;
    at.head = 0;
    if (++index >= worker.num_items) return;
    at.item = {__shfl_sync(kAllLanes, next, 0), __shfl_sync(kAllLanes, next, 1),
               __shfl_sync(kAllLanes, next, 2), __shfl_sync(kAllLanes, next, 3),
               __shfl_sync(kAllLanes, next, 4), __shfl_sync(kAllLanes, next, 5),
               __shfl_sync(kAllLanes, next, 6), __shfl_sync(kAllLanes, next, 7)};
    look_ahead(args, worker);
  }

  __device__ void look_ahead(const NativeAttentionArgs& args, const AttentionWorker& worker) {
    constexpr int kWords = sizeof(AttentionItem) / sizeof(int32_t);
    static_assert(kWords == 8);
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (index + 1 < worker.num_items && lane < kWords) {
      next = reinterpret_cast<const int32_t*>(args.items + index + 1)[lane];
    }
  }
};

// kSplits: batch invariant, with narrow tiles only.
template <int D, bool kSplits>
class Kernel {
  using L = Layout<D>;
  static constexpr int kPasses = kNarrowRows / kMergeRows;
  // Groups of four columns of kMergeRows rows that a thread has a part in.
  static constexpr int kShares = (kMergeRows * D / 4 + kAttentionThreads - 1) / kAttentionThreads;
  using Totals = Partial[kPasses][kShares];

 public:
  __device__ Kernel(const NativeAttentionArgs& args, char* shared)
      : args_(args),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(static_cast<int>(threadIdx.x) % 32),
        worker_(args.workers[blockIdx.x]),
        stages_(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
        queries_(stages_ + args.stages * L::kStageBytes),
        merge_(reinterpret_cast<float*>(shared + args.stages * L::kStageBytes +
                                        kQueryTiles * L::kMatrixBytes)),
        limits_(merge_ + kAttentionWarps * kMergeRows * D),
        marks_(*reinterpret_cast<Marks*>(limits_ + kAttentionWarps * 2 * kNarrowRows)) {}

  __device__ void run() {
    const int32_t batch = token_batch(0);
    ahead_.start(args_, worker_);
    look_up();
    for (;; ++current_) {
      while (in_flight_ < args_.stages - 1 && may_request()) request();
      if (current_ == entered_) break;
      segment(marks_.segments[warp_][current_ % kQueryTiles]);
    }
    clear_dead_rows(batch);
    while (arrival_ != Arrival::kNone) {
      __syncthreads();
      continue_arrival();
    }
  }

 private:
  // --- bringing units to shared memory ---

  __device__ int32_t ahead_position() const {
    return (ahead_.at.item.begin / kUnit + ahead_.at.unit) * kUnit + warp_ * kBlock +
           (lane_id() & 15);
  }

  // Starts to read the block id of this lane's position of the unit that is requested next.
  __device__ void look_up() {
    block_ = 0;
    if (ahead_.done(worker_)) return;
    const int32_t position = ahead_position();
    if (position < ahead_.at.item.begin || position >= ahead_.at.item.end) return;
    const int32_t index =
        args_.block_shift >= 0 ? position >> args_.block_shift : position / args_.block_size;
    block_ = args_.block_table[int64_t{ahead_.at.item.row} * args_.max_blocks + index];
  }

  // Whether there is a unit, and room for its segment's queries if it is the first.
  __device__ bool may_request() const {
    return !ahead_.done(worker_) && (!fresh_ || entered_ < current_ + kQueryTiles);
  }

  // Requests this warp's part of the next unit; positions outside of the item become zeros.
  __device__ void request() {
    if (fresh_) enter_segment();
    const int lane = lane_id();
    const int32_t position = ahead_position();
    const int32_t in_block = args_.block_shift >= 0 ? position & ((1 << args_.block_shift) - 1)
                                                    : position % args_.block_size;
    uint32_t place = static_cast<uint32_t>(block_) * args_.block_stride +
                     static_cast<uint32_t>(in_block) * args_.token_stride +
                     static_cast<uint32_t>(ahead_.at.head) * args_.head_stride;
    if (position < ahead_.at.item.begin || position >= ahead_.at.item.end) place = kNowhere;
    const uint32_t target = stages_ + filling_ * L::kStageBytes + warp_ * 2 * L::kMatrixBytes;
#pragma unroll
    for (int i = 0; i < L::kChunks / 2; ++i) {
      const int at = lane + 32 * i;
      const int row = at / L::kChunks;
      const int chunk = at % L::kChunks;
      const uint32_t source = __shfl_sync(kAllLanes, place, row);
      const bool there = source != kNowhere && chunk * 8 < args_.head_dim;
      const int64_t offset = there ? (int64_t{source} + chunk) * 8 : 0;
      copy_async(target + L::offset(row, chunk), args_.key + offset, there ? 16 : 0);
      copy_async(target + L::kMatrixBytes + L::offset(row, chunk), args_.value + offset,
                 there ? 16 : 0);
    }
    commit_copies();
    ++in_flight_;
    filling_ = filling_ + 1 == args_.stages ? 0 : filling_ + 1;
    fresh_ = ++ahead_.at.unit == ahead_.at.unit_end;
    if (fresh_) ahead_.next_segment(args_, worker_);
    look_up();
  }

  // Notes the segment for later and requests a quarter of a narrow tile's queries.
  __device__ void enter_segment() {
    const int slot = entered_ % kQueryTiles;
    __syncwarp();
    if (lane_ == 0) marks_.segments[warp_][slot] = ahead_.at;
    __syncwarp();
    ++entered_;
    const AttentionItem& item = ahead_.at.item;
    if (item.rows > kNarrowRows) return;
    const int64_t cols = int64_t{args_.num_heads + 2 * args_.num_kv_heads} * args_.head_dim;
    const uint32_t target = queries_ + slot * L::kMatrixBytes;
    for (int at = static_cast<int>(threadIdx.x); at < kNarrowRows * L::kChunks;
         at += kAttentionThreads) {
      const int tile_row = at / L::kChunks;
      const int chunk = at % L::kChunks;
      const bool there = tile_row < item.rows && chunk * 8 < args_.head_dim;
      const int32_t row = item.first + tile_row;
      const int32_t token = row / args_.group;
      const uint16_t* source =
          args_.qkv + (item.token + token) * cols +
          int64_t{ahead_.at.head * args_.group + row - token * args_.group} * args_.head_dim +
          chunk * 8;
      copy_async(target + L::offset(tile_row, chunk), there ? source : args_.qkv, there ? 16 : 0);
    }
  }

  // Waits for the oldest unit, and requests the one that takes the place of the unit before it.
  __device__ uint32_t next_stage(bool whole_block) {
    const auto meet = [whole_block] {
      if (whole_block) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    };
    wait_copies(in_flight_ - 1);
    meet();
    --in_flight_;
    if (may_request()) request();
    const uint32_t stage = stages_ + reading_ * L::kStageBytes;
    reading_ = reading_ + 1 == args_.stages ? 0 : reading_ + 1;
    return stage;
  }

  // --- a segment ---

  __device__ void segment(const Segment& segment) {
    const ItemUnits units(segment.item);
    const bool whole = segment.unit == 0 && segment.unit_end == units.count;
    if (kSplits || segment.item.rows <= kNarrowRows) {
      narrow_segment(segment, units, whole);
    } else {
      wide_segment(segment, units, whole);
    }
    continue_arrival();
    if (!whole) start_arrival(segment);
  }

  __device__ float* slot(const Segment& segment) const {
    return args_.partials + blockIdx.x * args_.worker_floats +
           (segment.unit == 0 ? args_.start_floats : 0);
  }

  __device__ void wide_segment(const Segment& segment, const ItemUnits& units, bool whole) {
    const int32_t first = warp_ * kBlock;
    Rows<D> own;
    own.place(args_, segment.item, first);
    own.load_queries(args_, segment.item, segment.head, first);
    own.clear();
    const int32_t unit_end = segment.unit_end;
    for (int32_t unit = segment.unit; unit < unit_end; ++unit) {
      const uint32_t stage = next_stage(true);
      if (first >= segment.item.rows) continue;
      const int32_t position = (units.base + unit) * kUnit;
      constexpr int kBlocks = D < 128 ? 4 : D == 128 ? 2 : 1;  // as registers allow
#pragma unroll 1
      for (int b = 0; b < kUnit / kBlock; b += kBlocks) {
        own.template attend<kBlocks, false>(0, stage + b * 2 * L::kMatrixBytes,
                                            position + b * kBlock, args_.scale_log2e);
      }
    }
    own.reduce_sums();
    store_wide(own, segment, whole ? nullptr : slot(segment));
    __syncthreads();  // a narrow tile's warps request without a barrier
  }

  __device__ void narrow_segment(const Segment& segment, const ItemUnits& units, bool whole) {
    const uint32_t queries = queries_ + current_ % kQueryTiles * L::kMatrixBytes;
    Rows<D> own;
    Totals totals;
    own.place(args_, segment.item, 0);
    const bool starts = segment.unit == 0;
    const int32_t unit_end = segment.unit_end;
    bool first = true;
    // Batch invariant: the units of a split are summed, then the splits, in ascending order.
    int split = 0;
    for (int32_t unit = segment.unit; unit < unit_end; ++split) {
      int32_t end = unit_end;
      if constexpr (kSplits) {
        end = min(end, ((units.base + unit) | ((1 << kSplitUnitsLog2) - 1)) + 1 - units.base);
      }
      own.clear();
      for (; unit < end; ++unit) {
        // Every warp brings a part of the queries with the first unit.
        const uint32_t stage = next_stage(first) + warp_ * 2 * L::kMatrixBytes;
        if (first) own.read_queries(queries);
        first = false;
        const int32_t position = (units.base + unit) * kUnit + warp_ * kBlock;
        if (position >= segment.item.end || position + kBlock <= segment.item.begin) continue;
        own.template attend<1, true>(queries, stage, position, args_.scale_log2e);
      }
      own.reduce_sums();
      // Splits of a segment that starts are added up here; others await what comes before them.
      float* target = nullptr;
      const bool last = unit == unit_end;
      if (!starts) {
        target = slot(segment) + int64_t{split} * segment.item.rows * (D + 2);
      } else if (last && !whole) {
        target = slot(segment);
      }
      sum_warps(own, totals, segment, target, kSplits && starts && split > 0, last || !starts);
    }
  }

  __device__ static uint16_t* output_row(const NativeAttentionArgs& args, const Segment& segment,
                                         int32_t tile_row) {
    const int32_t row = segment.item.first + tile_row;
    const int32_t token = row / args.group;
    const int64_t head = int64_t{segment.item.token + token} * args.num_heads +
                         segment.head * args.group + row - token * args.group;
    return args.out + head * args.head_dim;
  }

  __device__ static void store_output(const NativeAttentionArgs& args, const Segment& segment,
                                      int32_t tile_row, int32_t col, const Partial& result) {
    const float factor = 1.0f / result.sum;
    uint2 packed;
    packed.x = pack(result.out.x * factor, result.out.y * factor);
    packed.y = pack(result.out.z * factor, result.out.w * factor);
    *reinterpret_cast<uint2*>(output_row(args, segment, tile_row) + col) = packed;
  }

  // Partial results lie as [rows, D] columns, then a maximum and a sum a row.
  __device__ static void store_partial(float* slot, int32_t rows, int32_t row, int32_t col,
                                       const Partial& partial) {
    *reinterpret_cast<float4*>(slot + row * D + col) = partial.out;
    if (col == 0) {
      *reinterpret_cast<float2*>(slot + rows * D + 2 * row) =
          make_float2(partial.maximum, partial.sum);
    }
  }
  // They come from other processors, so not from this one's first-level cache.
  __device__ static Partial load_partial(const float* slot, int32_t rows, int32_t row,
                                         int32_t col) {
    Partial partial;
    partial.out = __ldcg(reinterpret_cast<const float4*>(slot + row * D + col));
    const float2 limits = __ldcg(reinterpret_cast<const float2*>(slot + rows * D + 2 * row));
    partial.maximum = limits.x;
    partial.sum = limits.y;
    return partial;
  }

  // Sums the warps' results of a narrow tile and, if `adds`, adds them to the sum of the call
  // before. If `stores`, stores partial results if there is a slot, else output rows.
  __device__ void sum_warps(const Rows<D>& own, Totals& totals, const Segment& segment, float* slot,
                            bool adds, bool stores) const {
    const int32_t rows = segment.item.rows;
    if (lane_ % 4 == 0) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        float* limits = limits_ + 2 * (warp_ * kNarrowRows + lane_ / 4 + 8 * side);
        limits[0] = own.maximum[side];
        limits[1] = own.sum[side];
      }
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int first = pass * kMergeRows;
      if (first >= rows) break;
      const int row = lane_ / 4 - (first & 7);
      if (row >= 0 && row < kMergeRows) {
        float* target = merge_ + (warp_ * kMergeRows + row) * D + 2 * (lane_ % 4);
#pragma unroll
        for (int t = 0; t < D / 8; ++t) {
          *reinterpret_cast<float2*>(target + 8 * t) =
              first < 8 ? make_float2(own.out[t][0], own.out[t][1])
                        : make_float2(own.out[t][2], own.out[t][3]);
        }
      }
      __syncthreads();
#pragma unroll
      for (int share = 0; share < kShares; ++share) {
        const int at = static_cast<int>(threadIdx.x) + share * kAttentionThreads;
        const int32_t tile_row = first + at / (D / 4);
        const int32_t col = at % (D / 4) * 4;
        if (at >= kMergeRows * D / 4 || tile_row >= rows || col >= args_.head_dim) continue;
        Partial result = warps_sum(tile_row, at / (D / 4), col);
        Partial& total = totals[pass][share];
        if (adds) {
          fold(total, result);
        } else {
          total = result;
        }
        if (!stores) continue;
        if (slot != nullptr) {
          store_partial(slot, rows, tile_row, col, total);
        } else {
          store_output(args_, segment, tile_row, col, total);
        }
      }
      __syncthreads();
    }
  }

  __device__ Partial warps_sum(int32_t tile_row, int merge_row, int32_t col) const {
    Partial result{-INFINITY, 0.0f, make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      result.maximum = fmaxf(result.maximum, limits_[2 * (w * kNarrowRows + tile_row)]);
    }
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      const float* limits = limits_ + 2 * (w * kNarrowRows + tile_row);
      const float factor = exp2_fast(limits[0] - finite(result.maximum));
      const float4 part =
          *reinterpret_cast<const float4*>(merge_ + (w * kMergeRows + merge_row) * D + col);
      result.sum = fmaf(limits[1], factor, result.sum);
      result.out.x = fmaf(part.x, factor, result.out.x);
      result.out.y = fmaf(part.y, factor, result.out.y);
      result.out.z = fmaf(part.z, factor, result.out.z);
      result.out.w = fmaf(part.w, factor, result.out.w);
    }
    return result;
  }

  // Stores a wide tile: output rows, or partial results if there is a slot.
  __device__ void store_wide(const Rows<D>& own, const Segment& segment, float* slot) const {
    const int32_t rows = segment.item.rows;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int32_t tile_row = warp_ * kBlock + lane_ / 4 + 8 * side;
      if (tile_row >= rows) continue;
      if (slot != nullptr) {
        if (lane_ % 4 == 0) {
          *reinterpret_cast<float2*>(slot + rows * D + 2 * tile_row) =
              make_float2(own.maximum[side], own.sum[side]);
        }
#pragma unroll
        for (int t = 0; t < D / 8; ++t) {
          *reinterpret_cast<float2*>(slot + tile_row * D + 8 * t + 2 * (lane_ % 4)) =
              make_float2(own.out[t][2 * side], own.out[t][2 * side + 1]);
        }
        continue;
      }
      const float factor = 1.0f / own.sum[side];
      uint16_t* target = output_row(args_, segment, tile_row) + 2 * (lane_ % 4);
#pragma unroll
      for (int t = 0; t < D / 8; ++t) {
        if (8 * t < args_.head_dim) {
          *reinterpret_cast<uint32_t*>(target + 8 * t) =
              pack(own.out[t][2 * side] * factor, own.out[t][2 * side + 1] * factor);
        }
      }
    }
  }

  // --- segments that are not the whole ---
  //
  // A worker has at most two: its first and its last. The one that arrives last at the counter
  // merges. A step a segment, so that only one thread waits for the counter and only until the next
  // segment ends; every step comes after a barrier that follows the one before.

  enum class Arrival { kNone, kStored, kCounted };

  __device__ void start_arrival(const Segment& segment) {
    while (arrival_ != Arrival::kNone) {
      __syncthreads();
      continue_arrival();
    }
    __syncthreads();  // the one before is merged
    if (threadIdx.x == 0) marks_.arriving = segment;
    arrival_ = Arrival::kStored;
  }

  __device__ void continue_arrival() {
    if (arrival_ == Arrival::kNone) return;
    if (arrival_ == Arrival::kStored) {
      if (threadIdx.x == 0) {
        const Pieces pieces(marks_.arriving, worker_.share, worker_.granule_log2);
        __threadfence();
        const bool last = atomicAdd(args_.counters + pieces.from, 1) == pieces.last - pieces.from;
        if (last) args_.counters[pieces.from] = 0;
        __threadfence();
        marks_.merges = last;
      }
      arrival_ = Arrival::kCounted;
      return;
    }
    if (marks_.merges) merge(args_, worker_.share, worker_.granule_log2, marks_.arriving);
    arrival_ = Arrival::kNone;
  }

  // Which workers have a part of a segment's item and head.
  struct Pieces {
    int32_t first_cell, from, last;
    __device__ Pieces(const Segment& segment, int32_t share, int32_t granule_log2)
        : first_cell(segment.cell + kSegmentCost), from(first_cell / share) {
      const ItemUnits units(segment.item);
      last = (first_cell + units.granule_start(units.count - 1, granule_log2)) / share;
    }
  };

  // Adds up the partial results in ascending order of positions.
  __device__ __noinline__ static void merge(const NativeAttentionArgs& args, int32_t share,
                                            int32_t granule_log2, const Segment& segment) {
    const Pieces pieces(segment, share, granule_log2);
    const ItemUnits units(segment.item);
    const int32_t rows = segment.item.rows;
    for (int32_t at = static_cast<int32_t>(threadIdx.x); at < rows * (D / 4);
         at += kAttentionThreads) {
      const int32_t row = at / (D / 4);
      const int32_t col = at % (D / 4) * 4;
      if (col >= args.head_dim) continue;
      const float* first = args.partials + pieces.from * args.worker_floats + args.start_floats;
      Partial total = load_partial(first, rows, row, col);
      if constexpr (!kSplits) {
        constexpr int kAhead = 8;
        for (int32_t w = pieces.from + 1; w <= pieces.last; w += kAhead) {
          Partial next[kAhead];
#pragma unroll
          for (int i = 0; i < kAhead; ++i) {
            if (w + i > pieces.last) break;
            next[i] = load_partial(args.partials + (w + i) * args.worker_floats, rows, row, col);
          }
#pragma unroll
          for (int i = 0; i < kAhead; ++i) {
            if (w + i > pieces.last) break;
            fold(total, next[i]);
          }
        }
      } else {
        for (int32_t w = pieces.from + 1; w <= pieces.last; ++w) {
          const int32_t begin = units.first_unit(w * share - pieces.first_cell, granule_log2);
          const int32_t end = units.first_unit((w + 1) * share - pieces.first_cell, granule_log2);
          const int32_t splits = ((units.base + end - 1) >> kSplitUnitsLog2) -
                                 ((units.base + begin) >> kSplitUnitsLog2) + 1;
          for (int32_t split = 0; split < splits; ++split) {
            fold(total, load_partial(args.partials + w * args.worker_floats +
                                         int64_t{split} * rows * (D + 2),
                                     rows, row, col));
          }
        }
      }
      store_output(args, segment, row, col, total);
    }
  }

  // --- tokens of padding and of masked rows ---

  // The batch position of the token that this thread clears in round `round` if it is none; 0 past
  // the end.
  __device__ int32_t token_batch(int32_t round) const {
    const int32_t token = own_token(round);
    return token < args_.num_tokens ? args_.token_batch[token] : 0;
  }
  __device__ int32_t own_token(int32_t round) const {
    return static_cast<int32_t>(blockIdx.x) +
           static_cast<int32_t>(gridDim.x) *
               (round * kAttentionThreads + static_cast<int32_t>(threadIdx.x));
  }

  // Zeros for them; `batch` is token_batch(0), which has been asked for long before.
  __device__ void clear_dead_rows(int32_t batch) const {
    const int32_t chunks = args_.num_heads * args_.head_dim / 8;
    for (int32_t round = 0; own_token(round) - own_token(0) < args_.num_tokens; ++round) {
      if (round > 0) batch = token_batch(round);
      for (unsigned left = __ballot_sync(kAllLanes, batch < 0); left != 0; left &= left - 1) {
        const int32_t token = __shfl_sync(kAllLanes, own_token(round), __ffs(left) - 1);
        uint4* target = reinterpret_cast<uint4*>(args_.out) + int64_t{token} * chunks;
        for (int32_t i = lane_; i < chunks; i += 32) target[i] = make_uint4(0, 0, 0, 0);
      }
    }
  }

  const NativeAttentionArgs& args_;
  const int warp_, lane_;
  const AttentionWorker worker_;
  const uint32_t stages_, queries_;  // shared memory
  float* const merge_;               // [warps, kMergeRows, D]
  float* const limits_;              // [warps, kNarrowRows, 2] maximum and sum
  Marks& marks_;
  int in_flight_ = 0;                  // units requested and not read yet
  int filling_ = 0, reading_ = 0;      // stages
  int32_t entered_ = 0, current_ = 0;  // segments that have been requested, and read
  bool fresh_ = true;                  // the unit requested next begins a segment
  Arrival arrival_ = Arrival::kNone;
  Walk ahead_;         // whose unit is requested next
  int32_t block_ = 0;  // where this lane's position of that unit lies
};

template <int D, bool kSplits>
__global__ void __launch_bounds__(kAttentionThreads, D <= 128 ? 2 : 1)
    native_attention_kernel(const __grid_constant__ NativeAttentionArgs args) {
  extern __shared__ __align__(128) char shared[];
  launch_next();
  wait_for_previous();
  Kernel<D, kSplits>(args, shared).run();
}

}  // namespace native

template <int D>
void launch_native_attention(const NativeAttentionArgs& args, const AttentionLaunch& attention,
                             const StepContext& ctx) {
  constexpr std::string_view kOp = "paged_attention";
  const auto kernel = args.splits ? native::native_attention_kernel<D, true>
                                  : native::native_attention_kernel<D, false>;
  allow_shared_memory(kOp, kernel, attention.shared_bytes);
  launch(kOp, ctx, kernel, dim3(attention.workers), dim3(kAttentionThreads), attention.shared_bytes,
         args);
}

}  // namespace mrv1::cuda
