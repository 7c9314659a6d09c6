// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Paged attention on tensor cores, for queries of bfloat16. The work list says what a thread block
// computes (attention_plan.cuh). Each of its four warps brings a quarter of every unit's positions
// to shared memory, several units ahead and across segments, so that memory never waits for
// arithmetic. In a narrow tile (up to 16 rows: a decode row's heads) a warp also computes those
// positions, with no barrier until the segment ends and the four results are summed. In a wide one
// (prefill) a warp takes 16 of 64 rows over all positions.
//
// While memory is busy a read takes microseconds, whatever it is. So queries, items and block ids
// are asked for ahead as well, and nobody waits for the arrival of a partial result.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "attention_rows.cuh"
#include "attention_rows_e4m3.cuh"
#include "launch.h"
#include "native_attention.h"

namespace mrv1::cuda {
namespace native {

// Walks the segments of a worker.
struct Walk {
  Segment at;     // unit and unit_end are what is left of the segment
  int32_t index;  // of the item
  int32_t next;   // word l of the item after it, in lane l

  __device__ void start(const NativeAttentionArgs& args, const AttentionWorker& worker) {
    at = worker.first;
    index = worker.index;
    look_ahead(args, worker);
  }

  __device__ bool done(const AttentionWorker& worker) const { return index >= worker.num_items; }

  // The next segment starts at its item's first unit: only a worker's first one may not.
  __device__ void next_segment(const NativeAttentionArgs& args, const AttentionWorker& worker) {
    at.cell += ItemUnits(at.item).cells;
    if (at.cell >= worker.end) {
      index = worker.num_items;
      return;
    }
    if (++at.head == args.num_kv_heads) {
      at.head = 0;
      if (++index == worker.num_items) return;
      at.item = {__shfl_sync(kAllLanes, next, 0), __shfl_sync(kAllLanes, next, 1),
                 __shfl_sync(kAllLanes, next, 2), __shfl_sync(kAllLanes, next, 3),
                 __shfl_sync(kAllLanes, next, 4), __shfl_sync(kAllLanes, next, 5),
                 __shfl_sync(kAllLanes, next, 6), __shfl_sync(kAllLanes, next, 7)};
      look_ahead(args, worker);
    }
    at.unit = 0;
    at.unit_end =
        ItemUnits(at.item).first_unit(worker.end - at.cell - kSegmentCost, worker.granule_log2);
    if (at.unit_end == 0) index = worker.num_items;  // it is the next worker's
  }

 private:
  __device__ void look_ahead(const NativeAttentionArgs& args, const AttentionWorker& worker) {
    constexpr int kWords = sizeof(AttentionItem) / sizeof(int32_t);
    static_assert(kWords == 8);
    const int lane = lane_id();
    if (index + 1 < worker.num_items && lane < kWords) {
      next = reinterpret_cast<const int32_t*>(args.items + index + 1)[lane];
    }
  }
};

template <typename Cache, int D>
using RowsOf = std::conditional_t<Cache::kScaled, E4M3Rows<D>, BF16Rows<D>>;

template <typename Cache, int D, AttentionTiles kTiles>
class Kernel {
  using L = CacheLayout<D, Cache>;
  using Q = QueryLayout<D>;
  using Rows = RowsOf<Cache, D>;
  static constexpr bool kSplits = kTiles == AttentionTiles::kSplits;
  static constexpr int kPasses = kNarrowRows / kMergeRows;
  static constexpr int kTableAhead = 16;  // units whose blocks are looked up soon
  // Groups of four columns of kMergeRows rows that a thread has a part in.
  static constexpr int kShares = (kMergeRows * D / 4 + kAttentionThreads - 1) / kAttentionThreads;
  using Totals = Partial[kPasses][kShares];

 public:
  __device__ Kernel(const NativeAttentionArgs& args, char* shared)
      : args_(args),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(static_cast<int>(threadIdx.x) % 32),
        worker_(load_worker(args.workers + blockIdx.x)),
        block_(plans_blocks(args.block_size)
                   ? __ldcg(args.first_blocks + blockIdx.x * kAttentionWarps + threadIdx.x / 32)
                   : 0),
        stages_(shared_address(shared)),
        queries_(stages_ + args.stages * L::kStageBytes),
        merge_(reinterpret_cast<float*>(shared + args.stages * L::kStageBytes +
                                        kQueryTiles * Q::kMatrixBytes)),
        limits_(merge_ + kAttentionWarps * kMergeRows * D),
        marks_(*reinterpret_cast<Marks*>(limits_ + kAttentionWarps * 2 * kNarrowRows)) {}

  // Brings this warp's part of the first unit to the second cache, where the launch before writes
  // what it has of it.
  __device__ void prefetch_first_unit() const {
    if (!plans_blocks(args_.block_size) || worker_.index >= worker_.num_items) return;
    const Segment& first = worker_.first;
    const int32_t position =
        (first.item.begin / kUnit + first.unit) * kUnit + warp_ * kBlock + (lane_ & 15);
    if (position < first.item.begin || position >= first.item.end) return;
    // Lanes 0 to 15 ask for their position's key, the others for its value.
    const char* row = (lane_ < kBlock ? args_.key : args_.value) +
                      int64_t{place(block_, position, first.head)} * kChunkBytes;
    constexpr int kLineBytes = 128;
    for (int32_t at = 0; at < args_.head_dim * Cache::kElementBytes; at += kLineBytes) {
      prefetch_line(row + at);
    }
  }

  __device__ void run() {
    const int32_t batch = token_batch(0);
    ahead_.start(args_, worker_);
    if (!plans_blocks(args_.block_size)) look_up();
    for (;; ++current_) {
      while (in_flight_ < args_.stages - 1 && may_request()) request();
      if (current_ == entered_) break;
      segment(marks_.segments[warp_][current_ % kQueryTiles]);
    }
    clear_dead_rows(batch);
    if (!merges_) return;
    __syncthreads();
    merge(args_, worker_, marks_.merged);
  }

 private:
  // Past the nearest cache, which may hold what an earlier plan was.
  __device__ static AttentionWorker load_worker(const AttentionWorker* from) {
    constexpr int kVectors = sizeof(AttentionWorker) / sizeof(uint4);
    static_assert(kVectors * sizeof(uint4) == sizeof(AttentionWorker));
    uint4 words[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      words[i] = __ldcg(reinterpret_cast<const uint4*>(from) + i);
    }
    AttentionWorker worker;
    memcpy(&worker, words, sizeof(worker));
    return worker;
  }

  // --- bringing units to shared memory ---

  // Where a head of a position lies in the cache, in chunks.
  __device__ uint32_t place(int32_t block, int32_t position, int32_t head) const {
    return static_cast<uint32_t>(block) * args_.block_stride +
           static_cast<uint32_t>(place_in_block(position)) * args_.token_stride +
           static_cast<uint32_t>(head) * args_.head_stride;
  }
  __device__ int32_t place_in_block(int32_t position) const {
    return position - args_.table_index(position) * args_.block_size;
  }

  __device__ int32_t ahead_position() const {
    return (ahead_.at.item.begin / kUnit + ahead_.at.unit) * kUnit + warp_ * kBlock +
           (lane_id() & 15);
  }

  // Where the block table has the block of a position of the item that is requested.
  __device__ const int32_t* table_entry(int32_t position) const {
    return args_.block_table + int64_t{ahead_.at.item.row} * args_.max_blocks +
           args_.table_index(position);
  }

  // Starts to read the block id of this lane's position of the unit that is requested next. The
  // table is brought near long before: the units in flight would be too few to wait for it.
  __device__ void look_up() {
    block_ = 0;
    if (ahead_.done(worker_)) return;
    const int32_t position = ahead_position();
    if (position < ahead_.at.item.begin || position >= ahead_.at.item.end) return;
    block_ = *table_entry(position);
    if (warp_ == 0 && lane_ == 0) prefetch_table(position + kTableAhead * kUnit);
  }
  __device__ void prefetch_table(int32_t position) const {
    if (position < ahead_.at.item.end) prefetch_line(table_entry(position));
  }

  // Whether there is a unit, and room for its segment's queries if it is the first.
  __device__ bool may_request() const {
    return !ahead_.done(worker_) && (!fresh_ || entered_ < current_ + kQueryTiles);
  }

  // Requests this warp's part of the next unit; positions outside of the item become zeros.
  __device__ void request() {
    const int lane = lane_id();
    const int32_t position = ahead_position();
    const bool visible = position >= ahead_.at.item.begin && position < ahead_.at.item.end;
    const uint32_t own_place = visible ? place(block_, position, ahead_.at.head) : kNowhere;
    const uint32_t target = stages_ + filling_ * L::kStageBytes + warp_ * L::kBlockBytes;
    constexpr int kPieces = kBlock * L::kChunks;
    constexpr int kElements = kChunkBytes / Cache::kElementBytes;  // of a chunk
#pragma unroll
    for (int i = 0; i < (kPieces + 31) / 32; ++i) {
      const int at = lane + 32 * i;
      const int row = at / L::kChunks;
      const int chunk = at % L::kChunks;
      const uint32_t source = __shfl_sync(kAllLanes, own_place, row);
      if (kPieces % 32 != 0 && at >= kPieces) continue;
      const bool there = source != kNowhere && chunk * kElements < args_.head_dim;
      const int64_t offset = there ? (int64_t{source} + chunk) * kChunkBytes : 0;
      cp_async_16(target + L::offset(row, chunk), args_.key + offset, there);
      cp_async_16(target + L::kMatrixBytes + L::offset(row, chunk), args_.value + offset, there);
    }
    if constexpr (Cache::kScaled) {
      // Lanes 0 to 15 bring the scales of their keys, the others those of their values. Neighbours
      // of a scale are other heads', which are read much later.
      const float* scales = lane < kBlock ? args_.scales.key : args_.scales.value;
      const int64_t offset =
          visible ? args_.scales.index(block_, place_in_block(position), ahead_.at.head)
                  : int64_t{0};
      cp_async_4_no_prefetch(target + 2 * L::kMatrixBytes + lane * static_cast<int>(sizeof(float)),
                             scales + offset, visible);
    }
    if (fresh_) enter_segment();  // queries are nearer
    cp_async_commit_group();
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
    if (warp_ == 0 && lane_ < kTableAhead) {
      prefetch_table((item.begin / kUnit + ahead_.at.unit + lane_) * kUnit);
    }
    if (kTiles == AttentionTiles::kWide && item.rows > kNarrowRows) return;
    const uint32_t target = queries_ + slot * Q::kMatrixBytes;
    constexpr int kPieces = kNarrowRows * Q::kChunks;
#pragma unroll
    for (int i = 0; i < (kPieces + kAttentionThreads - 1) / kAttentionThreads; ++i) {
      const int at = static_cast<int>(threadIdx.x) + i * kAttentionThreads;
      if (kPieces % kAttentionThreads != 0 && at >= kPieces) continue;
      const int tile_row = at / Q::kChunks;
      const int chunk = at % Q::kChunks;
      const bool there = tile_row < item.rows && chunk * 8 < args_.head_dim;
      const uint16_t* source = Rows::query_row(args_, item, ahead_.at.head, tile_row) + chunk * 8;
      cp_async_16(target + Q::offset(tile_row, chunk), there ? source : args_.qkv, there);
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
    if (kTiles == AttentionTiles::kWide && segment.item.rows > kNarrowRows) {
      wide_segment(segment, units, whole);
    } else {
      narrow_segment(segment, units, whole);
    }
    if (!whole && segment.unit_end == units.count) {
      if (threadIdx.x == 0) marks_.merged = segment;
      merges_ = true;
    }
  }

  __device__ float* slot(const Segment& segment) const {
    return args_.partials + blockIdx.x * args_.worker_floats +
           (segment.unit == 0 ? args_.start_floats : 0);
  }

  __device__ void wide_segment(const Segment& segment, const ItemUnits& units, bool whole) {
    const int32_t first = warp_ * kBlock;
    Rows own;
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
        own.template attend<kBlocks, false>(0, stage + b * L::kBlockBytes, position + b * kBlock,
                                            args_.scale);
      }
    }
    own.reduce_sums();
    store_wide(own, segment, whole ? nullptr : slot(segment));
    __syncthreads();  // a narrow tile's warps request without a barrier
  }

  __device__ void narrow_segment(const Segment& segment, const ItemUnits& units, bool whole) {
    const uint32_t queries = queries_ + current_ % kQueryTiles * Q::kMatrixBytes;
    Rows own;
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
        const uint32_t stage = next_stage(first) + warp_ * L::kBlockBytes;
        if (first) own.read_queries(queries, args_);
        first = false;
        const int32_t position = (units.base + unit) * kUnit + warp_ * kBlock;
        if (position >= segment.item.end || position + kBlock <= segment.item.begin) continue;
        own.template attend<1, true>(queries, stage, position, args_.scale);
      }
      own.reduce_sums();
      // Splits of a segment that starts are added up here; others await what comes before them.
      float* target = nullptr;
      const bool last = unit == unit_end;
      if (!starts) {
        target = slot(segment) + int64_t{split} * segment.item.rows * partial_row_floats(D);
      } else if (last && !whole) {
        target = slot(segment);
      }
      sum_warps(own, totals, segment, target, kSplits && starts && split > 0, last || !starts);
    }
  }

  __device__ static uint16_t* output_row(const NativeAttentionArgs& args, const Segment& segment,
                                         int32_t tile_row) {
    const int32_t row = segment.item.first + tile_row;
    const int32_t token = args.token_of(row);
    const int64_t head = int64_t{segment.item.token + token} * args.num_heads +
                         segment.head * args.group + row - token * args.group;
    return args.out + head * args.head_dim;
  }

  // Neighbouring columns of a row, of one sum.
  template <int kFours>
  __device__ static void store_output(const NativeAttentionArgs& args, const Segment& segment,
                                      int32_t tile_row, int32_t col,
                                      const Partial (&result)[kFours]) {
    const float factor = 1.0f / result[0].sum;
    uint2* const target = reinterpret_cast<uint2*>(output_row(args, segment, tile_row) + col);
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      const float4& out = result[i].out;
      target[i] =
          make_uint2(pack(out.x * factor, out.y * factor), pack(out.z * factor, out.w * factor));
    }
  }

  // Partial results lie as [rows, D] columns, then a maximum and a sum a row. A word that is zero
  // is not there yet, so the worker that merges needs no other sign; it leaves zeros behind.
  __device__ static uint32_t encode(float value) {
    const uint32_t word = ~__float_as_uint(value);
    return word == 0 ? 1 : word;  // some NaN, so that it counts as there
  }
  __device__ static float decode(uint32_t word) { return __uint_as_float(~word); }

  __device__ static void store_partial(float* slot, int32_t rows, int32_t row, int32_t col,
                                       const Partial& partial) {
    *reinterpret_cast<uint4*>(slot + row * D + col) = make_uint4(
        encode(partial.out.x), encode(partial.out.y), encode(partial.out.z), encode(partial.out.w));
    if (col == 0) {
      *reinterpret_cast<uint2*>(slot + rows * D + 2 * row) =
          make_uint2(encode(partial.maximum), encode(partial.sum));
    }
  }

  // What a thread merges of a partial result: neighbouring columns of a row, and its limits.
  static constexpr int kFours = 2;
  static constexpr int kMergedColumns = 4 * kFours;
  struct Words {
    uint4 out[kFours];
    uint2 limits;
    __device__ bool complete() const {
      bool there = limits.x != 0 && limits.y != 0;
#pragma unroll
      for (const uint4& four : out) {
        there = there && four.x != 0 && four.y != 0 && four.z != 0 && four.w != 0;
      }
      return there;
    }
    __device__ Partial partial(int i) const {
      return {decode(limits.x), decode(limits.y),
              make_float4(decode(out[i].x), decode(out[i].y), decode(out[i].z), decode(out[i].w))};
    }
  };
  // Columns at `out` and their row's limits; if not `exists`, those of no positions.
  __device__ static Words load_words(const float* out, const float* limits, bool exists) {
    constexpr uint32_t kZero = ~0u;
    const uint4 zeros = make_uint4(kZero, kZero, kZero, kZero);
    Words words{{zeros, zeros}, make_uint2(~0xff800000u, kZero)};
    static_assert(kFours == 2);
    asm volatile(
        "{\n\t"
        ".reg .pred exists;\n\t"
        "setp.ne.u32 exists, %12, 0;\n\t"
        "@exists ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%10];\n\t"
        "@exists ld.relaxed.gpu.global.v4.u32 {%4, %5, %6, %7}, [%10 + 16];\n\t"
        "@exists ld.relaxed.gpu.global.v2.u32 {%8, %9}, [%11];\n\t"
        "}"
        : "+r"(words.out[0].x), "+r"(words.out[0].y), "+r"(words.out[0].z), "+r"(words.out[0].w),
          "+r"(words.out[1].x), "+r"(words.out[1].y), "+r"(words.out[1].z), "+r"(words.out[1].w),
          "+r"(words.limits.x), "+r"(words.limits.y)
        : "l"(out), "l"(limits), "r"(static_cast<uint32_t>(exists))
        : "memory");
    return words;
  }

  // Sums the warps' results of a narrow tile and, if `adds`, adds them to the sum of the call
  // before. If `stores`, stores partial results if there is a slot, else output rows.
  __device__ void sum_warps(const Rows& own, Totals& totals, const Segment& segment, float* slot,
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
#pragma unroll(kSplits ? kPasses : 1)
    for (int pass = 0; pass < kPasses; ++pass) {
      const int first = pass * kMergeRows;
      if (first >= rows) break;
      const int row = lane_ / 4 - (first & 7);
      if (row >= 0 && row < kMergeRows) {
        float* target = merge_ + (warp_ * kMergeRows + row) * D;
#pragma unroll
        for (int t = 0; t < D / 8; ++t) {
          const float2 low = own.pair(t, 0);
          const float2 high = own.pair(t, 1);
          *reinterpret_cast<float2*>(target + Rows::column(t, lane_)) = first < 8 ? low : high;
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
        if constexpr (kSplits) {
          Partial& total = totals[pass][share];
          if (adds) {
            fold(total, result);
          } else {
            total = result;
          }
          result = total;
        }
        if (!stores) continue;
        if (slot != nullptr) {
          store_partial(slot, rows, tile_row, col, result);
        } else {
          store_output(args_, segment, tile_row, col, {result});
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
  __device__ void store_wide(const Rows& own, const Segment& segment, float* slot) const {
    const int32_t rows = segment.item.rows;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int32_t tile_row = warp_ * kBlock + lane_ / 4 + 8 * side;
      if (tile_row >= rows) continue;
      if (slot != nullptr) {
        if (lane_ % 4 == 0) {
          *reinterpret_cast<uint2*>(slot + rows * D + 2 * tile_row) =
              make_uint2(encode(own.maximum[side]), encode(own.sum[side]));
        }
#pragma unroll
        for (int t = 0; t < D / 8; ++t) {
          const int col = Rows::column(t, lane_);
          if (col >= args_.head_dim) continue;  // nobody would read them
          const float2 pair = own.pair(t, side);
          *reinterpret_cast<uint2*>(slot + tile_row * D + col) =
              make_uint2(encode(pair.x), encode(pair.y));
        }
        continue;
      }
      const float factor = 1.0f / own.sum[side];
      uint16_t* target = output_row(args_, segment, tile_row);
#pragma unroll
      for (int t = 0; t < D / 8; ++t) {
        const int col = Rows::column(t, lane_);
        if (col >= args_.head_dim) continue;
        const float2 pair = own.pair(t, side);
        *reinterpret_cast<uint32_t*>(target + col) = pack(pair.x * factor, pair.y * factor);
      }
    }
  }

  // --- segments that are not the whole ---

  // Adds results to that of earlier positions: as fold() does one by one, but the exponentials do
  // not wait for each other.
  template <int kCount>
  __device__ static void fold_all(Partial (&into)[kFours], const Words (&words)[kCount]) {
    float maximum = into[0].maximum;
#pragma unroll
    for (int i = 0; i < kCount; ++i) maximum = fmaxf(maximum, decode(words[i].limits.x));
    const float base = finite(maximum);
    const float old_factor = exp2_fast(into[0].maximum - base);
    float sum = into[0].sum * old_factor;
#pragma unroll
    for (Partial& four : into) {
      four.out = make_float4(four.out.x * old_factor, four.out.y * old_factor,
                             four.out.z * old_factor, four.out.w * old_factor);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float factor = exp2_fast(decode(words[i].limits.x) - base);
      sum = fmaf(decode(words[i].limits.y), factor, sum);
#pragma unroll
      for (int four = 0; four < kFours; ++four) {
        const float4 part = words[i].partial(four).out;
        into[four].out.x = fmaf(part.x, factor, into[four].out.x);
        into[four].out.y = fmaf(part.y, factor, into[four].out.y);
        into[four].out.z = fmaf(part.z, factor, into[four].out.z);
        into[four].out.w = fmaf(part.w, factor, into[four].out.w);
      }
    }
#pragma unroll
    for (Partial& four : into) {
      four.maximum = maximum;
      four.sum = sum;
    }
  }

  // Adds up the partial results of an item and head in ascending order of positions: the first
  // worker's, then one of each worker up to this one, or one of each of its splits. It waits only
  // for workers before this one, which were started before it. Zeros are left behind: at once where
  // no other thread reads, the rows' maxima and sums when all have.
  __device__ __noinline__ static void merge(const NativeAttentionArgs& args,
                                            const AttentionWorker line, const Segment& segment) {
    const int32_t rows = segment.item.rows;
    const int32_t first_cell = segment.cell + kSegmentCost;
    const int32_t from = line.owner(first_cell);
    const int32_t last = static_cast<int32_t>(blockIdx.x);
    const auto slot = [&](int32_t worker) {
      return args.partials + worker * args.worker_floats + (worker == from ? args.start_floats : 0);
    };
    const ItemUnits units(segment.item);
    const auto num_splits = [&](int32_t worker) {
      if (!kSplits || worker == from) return 1;
      const int32_t begin = units.first_unit(line.start(worker) - first_cell, line.granule_log2);
      const int32_t end = units.first_unit(line.start(worker + 1) - first_cell, line.granule_log2);
      return ((units.base + end - 1) >> kSplitUnitsLog2) -
             ((units.base + begin) >> kSplitUnitsLog2) + 1;
    };
    const int32_t split_floats = rows * partial_row_floats(D);

#pragma unroll 1
    for (int32_t at = static_cast<int32_t>(threadIdx.x); at < rows * (D / kMergedColumns);
         at += kAttentionThreads) {
      const int32_t row = at / (D / kMergedColumns);
      const int32_t col = at % (D / kMergedColumns) * kMergedColumns;
      if (col >= args.head_dim) continue;
      const Partial nothing{-INFINITY, 0.0f, make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
      Partial total[kFours] = {nothing, nothing};
      // Adds `count` partial results that lie `stride` floats apart, the first one `skip` beyond
      // its place. kAhead at a time are asked for until all are there: code without branches is
      // short, and in a small batch most of it is fetched anew in each layer.
      constexpr int kAhead = kSplits ? 8 : 10;
      const auto add = [&](float* place, int64_t stride, int64_t skip, int32_t count) {
#pragma unroll 1
        for (; count > 0; count -= kAhead, place += kAhead * stride, skip = 0) {
          Words words[kAhead];
          float* const columns = place + row * D + col;
          const float* const limits = place + rows * D + 2 * row;
          bool complete = true;
          do {
            complete = true;
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
              const int64_t offset = i == 0 ? skip : i * stride;
              words[i] = load_words(columns + offset, limits + offset, i < count);
            }
#pragma unroll
            for (int i = 0; i < kAhead; ++i) complete = complete && words[i].complete();
          } while (!complete);
#pragma unroll
          for (int i = 0; i < kAhead; ++i) {
            if (i >= count) continue;
            uint4* const read = reinterpret_cast<uint4*>(columns + (i == 0 ? skip : i * stride));
#pragma unroll
            for (int four = 0; four < kFours; ++four) read[four] = make_uint4(0, 0, 0, 0);
          }
          if constexpr (kSplits) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
              if (i >= count) continue;
#pragma unroll
              for (int four = 0; four < kFours; ++four) {
                fold(total[four], words[i].partial(four));
              }
            }
          } else {
            fold_all(total, words);
          }
        }
      };
      if constexpr (kSplits) {
        for (int32_t worker = from; worker <= last; ++worker) {
          add(slot(worker), split_floats, 0, num_splits(worker));
        }
      } else {
        add(args.partials + from * args.worker_floats, args.worker_floats, args.start_floats,
            last + 1 - from);
      }
      store_output(args, segment, row, col, total);
    }
    __syncthreads();  // all have read
#pragma unroll 1
    for (int32_t worker = from + static_cast<int32_t>(threadIdx.x) / 32; worker <= last;
         worker += kAttentionWarps) {
      const int32_t splits = num_splits(worker);
#pragma unroll 1
      for (int32_t split = 0; split < splits; ++split) {
        float* limits = slot(worker) + int64_t{split} * split_floats + rows * D;
        for (int32_t row = lane_id(); row < rows; row += 32) {
          *reinterpret_cast<uint2*>(limits + 2 * row) = make_uint2(0, 0);
        }
      }
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
  int32_t block_;                    // where this lane's position of the next unit's request lies
  const uint32_t stages_, queries_;  // shared memory
  float* const merge_;               // [warps, kMergeRows, D]
  float* const limits_;              // [warps, kNarrowRows, 2] maximum and sum
  Marks& marks_;
  int in_flight_ = 0;                  // units requested and not read yet
  int filling_ = 0, reading_ = 0;      // stages
  int32_t entered_ = 0, current_ = 0;  // segments that have been requested, and read
  bool fresh_ = true;                  // the unit requested next begins a segment
  bool merges_ = false;                // a segment was the last of several of its item and head
  Walk ahead_;                         // whose unit is requested next
};

template <typename Cache, int D, AttentionTiles kTiles>
__global__ void __launch_bounds__(kAttentionThreads, D <= 128 ? 2 : 1)
    native_attention_kernel(const __grid_constant__ NativeAttentionArgs args) {
  extern __shared__ __align__(128) char shared[];
  launch_next();
  if (!args.plan_is_old) {
    // What the block starts with lies in memory where other data has taken its place in the cache.
    // Only lines are asked for: what is in them is read after the wait.
    constexpr int kSectorBytes = 32;
    constexpr int kSectors = (sizeof(AttentionWorker) + kSectorBytes - 1) / kSectorBytes;
    if (threadIdx.x < kSectors) {
      prefetch_line(reinterpret_cast<const char*>(args.workers + blockIdx.x) +
                    threadIdx.x * kSectorBytes);
    } else if (threadIdx.x == kSectors && plans_blocks(args.block_size)) {
      prefetch_line(args.first_blocks + blockIdx.x * kAttentionWarps);
    }
    wait_for_previous();
  }
  Kernel<Cache, D, kTiles> kernel(args, shared);
  if (args.plan_is_old) {
    kernel.prefetch_first_unit();
    wait_for_previous();
  }
  kernel.run();
}

}  // namespace native

template <typename Cache, int D>
void launch_native_attention(const NativeAttentionArgs& args, const AttentionLaunch& attention,
                             const StepContext& ctx) {
  constexpr std::string_view kOp = "paged_attention";
  const auto kernel = args.tiles == AttentionTiles::kNarrow
                          ? native::native_attention_kernel<Cache, D, AttentionTiles::kNarrow>
                      : args.tiles == AttentionTiles::kSplits
                          ? native::native_attention_kernel<Cache, D, AttentionTiles::kSplits>
                          : native::native_attention_kernel<Cache, D, AttentionTiles::kWide>;
  allow_shared_memory(kOp, kernel, attention.shared_bytes);
  launch(kOp, ctx, kernel, dim3(attention.workers), dim3(kAttentionThreads), attention.shared_bytes,
         args);
}

}  // namespace mrv1::cuda
