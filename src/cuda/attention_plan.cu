// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// One block lists the items of the batch and their cells by prefix sums, then finds each worker's
// first item by binary search.
#include "attention_plan.cuh"

#include <algorithm>
#include <vector>

#include "attention_backends.h"
#include "block.cuh"
#include "core/device.h"
#include "launch.h"
#include "native_attention.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "plan_attention";
constexpr int kThreads = 1024;
constexpr int64_t kAlign = 256;
constexpr int kPlanSharedBytes = 40 << 10;  // needs no leave

struct PlanArgs {
  cuda::AttentionWorker* workers;
  cuda::AttentionItem* items;
  int32_t* scratch;  // null: shared memory is large enough
  int32_t num_workers, num_requests;
  int32_t group, num_kv_heads, window;
  AttentionRows rows;
  cuda::AttentionTiles tiles;
  const int32_t* block_table;  // of the first group; null if the plan looks up no blocks
  int64_t group_blocks;        // entries of a group's table
  int32_t num_groups;
  int32_t* first_blocks;
  int32_t max_blocks, block_size;
  int64_t split_rows;  // tile rows of splits that a worker's partial results can hold
};

// The last of `count` ascending starts that is at most `value`; starts[0] <= value.
__device__ int32_t last_start(const int32_t* starts, int32_t count, int32_t value) {
  int32_t low = 0;
  while (count > 1) {
    const int32_t half = count / 2;
    if (starts[low + half] <= value) low += half;
    count -= half;
  }
  return low;
}

// Fills in the first segment of worker `number`, which starts in worker.index at cell `start`, and
// the blocks of its first unit in each group.
__device__ void find_segment(const PlanArgs& args, cuda::AttentionWorker& worker, int32_t number,
                             int32_t start) {
  cuda::Segment& segment = worker.first;
  segment.item = args.items[worker.index];
  const int32_t item_cells = cuda::ItemUnits(segment.item).cells;
  segment.head = (start - segment.item.cell) / item_cells;
  segment.cell = segment.item.cell + segment.head * item_cells;
  for (;;) {
    const cuda::ItemUnits units(segment.item);
    const int32_t first = segment.cell + cuda::kSegmentCost;
    segment.unit = units.first_unit(start - first, worker.granule_log2);
    segment.unit_end = units.first_unit(worker.end - first, worker.granule_log2);
    if (segment.unit < segment.unit_end) break;
    segment.cell += units.cells;
    if (++segment.head == args.num_kv_heads) {
      segment.head = 0;
      ++worker.index;
    }
    if (worker.index == worker.num_items || segment.cell >= worker.end) {
      worker.index = worker.num_items;
      return;
    }
    segment.item = args.items[worker.index];
  }
  if (args.block_table == nullptr) return;
  const int32_t unit = cuda::ItemUnits(segment.item).base + segment.unit;
  for (int warp = 0; warp < cuda::kAttentionWarps; ++warp) {
    const int32_t position = unit * cuda::kUnit + warp * cuda::kWarpPositions;
    const bool visible =
        position < segment.item.end && position + cuda::kWarpPositions > segment.item.begin;
    const int32_t* entry =
        args.block_table + int64_t{segment.item.row} * args.max_blocks + position / args.block_size;
    for (int32_t group = 0; group < args.num_groups; ++group) {
      args.first_blocks[(int64_t{group} * args.num_workers + number) * cuda::kAttentionWarps +
                        warp] = visible ? entry[group * args.group_blocks] : 0;
    }
  }
}

__global__ void __launch_bounds__(kThreads) plan_kernel(PlanArgs args, InferParams infer) {
  extern __shared__ int32_t shared[];
  const int thread = static_cast<int>(threadIdx.x);
  cuda::launch_next();
  cuda::wait_for_previous();
  int32_t* first_item = args.scratch != nullptr ? args.scratch : shared;  // [requests + 1]
  int32_t* cells = first_item + args.num_requests + 1;                    // [items]

  int32_t begin = 0;
  int32_t end = args.num_requests;
  if (args.rows == AttentionRows::kDecode) end = min(end, infer.counts->num_decodes);
  if (args.rows == AttentionRows::kPrefill) begin = min(end, infer.counts->num_decodes);
  const auto tile_rows = [&](int32_t rows) {
    return args.tiles != cuda::AttentionTiles::kWide || rows <= cuda::kNarrowRows
               ? cuda::kNarrowRows
               : cuda::kWideRows;
  };

  // Batch position -> its first item.
  const int32_t run = (args.num_requests + kThreads - 1) / kThreads;
  const int32_t run_begin = min(thread * run, args.num_requests);
  const int32_t run_end = min(run_begin + run, args.num_requests);
  const auto tiles = [&](int32_t batch) {
    if (batch < begin || batch >= end || infer.row[batch] < 0 || infer.seq_lens[batch] <= 0)
      return 0;
    const int32_t rows =
        (infer.query_start_loc[batch + 1] - infer.query_start_loc[batch]) * args.group;
    const int32_t tile = tile_rows(rows);
    return (rows + tile - 1) / tile;
  };
  int32_t count = 0;
  for (int32_t batch = run_begin; batch < run_end; ++batch) {
    first_item[batch] = tiles(batch);
    count += first_item[batch];
  }
  int32_t num_items;
  int32_t next = cuda::block_exclusive_scan<kThreads>(count, &num_items);
  for (int32_t batch = run_begin; batch < run_end; ++batch) {
    const int32_t own = first_item[batch];
    first_item[batch] = next;
    next += own;
  }
  __syncthreads();

  // Items and their cells.
  int32_t total = 0;
  int32_t most_rows = 0;
  int32_t most_cells = 0;
  int32_t least_cells = INT32_MAX;
  for (int32_t base = 0; base < num_items; base += kThreads) {
    const int32_t index = base + thread;
    cuda::AttentionItem item{};
    int32_t own = 0;
    if (index < num_items) {
      // Positions without items share their start with the next: the last of them has the item.
      const int32_t batch = last_start(first_item, args.num_requests, index);
      const int32_t token = infer.query_start_loc[batch];
      const int32_t queries = infer.query_start_loc[batch + 1] - token;
      const int32_t rows = queries * args.group;
      const int32_t tile = tile_rows(rows);
      item.row = infer.row[batch];
      item.token = token;
      item.first = (index - first_item[batch]) * tile;
      item.rows = min(tile, rows - item.first);
      item.context = infer.seq_lens[batch] - queries;
      const int32_t low = item.context + item.first / args.group;
      item.begin = args.window > 0 ? max(0, low - args.window + 1) : 0;
      item.end = item.context + (item.first + item.rows - 1) / args.group + 1;
      own = cuda::ItemUnits(item).cells * args.num_kv_heads;
      most_rows = max(most_rows, item.rows);
      most_cells = max(most_cells, own / args.num_kv_heads);
      least_cells = min(least_cells, own / args.num_kv_heads);
    }
    int32_t sum;
    item.cell = total + cuda::block_exclusive_scan<kThreads>(own, &sum);
    if (index < num_items) {
      args.items[index] = item;
      cells[index] = item.cell;
    }
    total += sum;
  }

  // Workers.
  most_cells = cuda::block_max<kThreads>(most_cells);
  least_cells = cuda::block_min<kThreads>(least_cells);
  int32_t least = max(1, (most_cells + cuda::kMostPieces - 1) / cuda::kMostPieces);
  // Where there are workers enough, what a head's pieces take one by one and what it takes to merge
  // them are balanced: a piece costs the merge about a quarter of what a unit costs its worker.
  least = max(least, static_cast<int32_t>((sqrtf(static_cast<float>(most_cells)) + 1.0f) / 2.0f));
  int32_t granule_log2 = 0;
  if (args.tiles == cuda::AttentionTiles::kSplits) {
    least = max(least, 1 << cuda::kSplitUnitsLog2);
    granule_log2 = cuda::kSplitUnitsLog2;
    most_rows = cuda::block_max<kThreads>(most_rows);
  }
  cuda::AttentionWorker worker{};
  worker.num_items = num_items;
  worker.num_cells = total;
  worker.num_workers = max(1, min(args.num_workers, total / least));
  if (least_cells == most_cells) {
    // Items of one length: whole ones for each worker, and some workers idle, where a cut would
    // cost more than the uneven share does.
    const int32_t pieces = total / most_cells;
    const int32_t each = (pieces + worker.num_workers - 1) / worker.num_workers;
    const int64_t uneven = int64_t{each} * most_cells - cuda::kCutCost;
    if (pieces % each == 0 && uneven * worker.num_workers <= total) {
      worker.num_workers = pieces / each;
    }
  }
  if (args.tiles == cuda::AttentionTiles::kSplits) {
    const int64_t splits = (total / worker.num_workers >> cuda::kSplitUnitsLog2) + 3;
    if (splits * most_rows > args.split_rows) granule_log2 = cuda::kWholeLog2;
  }
  worker.granule_log2 = granule_log2;
  __syncthreads();  // items and cells are written
  for (int32_t index = thread; index < args.num_workers; index += kThreads) {
    worker.index = num_items;
    if (index < worker.num_workers && total > 0) {
      worker.end = worker.start(index + 1);
      worker.index = last_start(cells, num_items, worker.start(index));
      find_segment(args, worker, index, worker.start(index));
    }
    args.workers[index] = worker;
  }
}

// What a launch depends on; a property of the machine.
struct GpuLimits {
  int processors = 0, shared_per_processor = 0, shared_per_block = 0, reserved_per_block = 0;
};

const GpuLimits& current_gpu() {
  static const std::vector<GpuLimits> gpus = [] {
    int count = 0;
    cuda::check_cuda(cudaGetDeviceCount(&count), kOp, "cudaGetDeviceCount");
    std::vector<GpuLimits> found(count);
    for (int i = 0; i < count; ++i) {
      const auto get = [i](cudaDeviceAttr attribute) {
        int value = 0;
        cuda::check_cuda(cudaDeviceGetAttribute(&value, attribute, i), kOp,
                         "cudaDeviceGetAttribute");
        return value;
      };
      found[i] = {get(cudaDevAttrMultiProcessorCount),
                  get(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                  get(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                  get(cudaDevAttrReservedSharedMemoryPerBlock)};
    }
    return found;
  }();
  int ordinal = 0;
  cuda::check_cuda(cudaGetDevice(&ordinal), kOp, "cudaGetDevice");
  return gpus.at(ordinal);
}

// The most items that a batch can have: each request's last tile may be part of one.
int64_t item_capacity(const AttentionPlan& plan, int64_t requests, int64_t tokens,
                      cuda::AttentionTiles tiles) {
  const int64_t group = plan.shape.num_heads / plan.shape.num_kv_heads;
  return requests +
         tokens * group /
             (tiles == cuda::AttentionTiles::kWide ? cuda::kWideRows : cuda::kNarrowRows);
}

// Whether the GPU has a native kernel for the activations, whatever the caches.
bool has_native(const AttentionPlan& plan) {
  return plan.dtype == DType::kBF16 && cuda::attention_launch(plan.shape.head_dim).stages > 1;
}

// Others run on the plain kernel.
bool is_planned(const AttentionPlan& plan) {
  return has_native(plan) && (plan.cache_dtype == plan.dtype || plan.cache_dtype == DType::kE4M3);
}

int64_t native_plan_bytes(const AttentionPlan& plan) {
  if (!has_native(plan)) return 0;
  return cuda::attention_plan_layout(plan, cuda::attention_launch(plan.shape.head_dim)).bytes;
}

}  // namespace

namespace cuda {

AttentionLaunch attention_launch(int32_t head_dim, DType cache_dtype) {
  const GpuLimits& gpu = current_gpu();
  AttentionLaunch launch;
  for (const int dim : {64, 80, 96, 128, 256}) {
    if (launch.dim == 0 && head_dim <= dim) launch.dim = dim;
  }
  int blocks = 2;
  const auto stages = [&](const AttentionMemory& memory) {
    const int room =
        std::min(gpu.shared_per_block, gpu.shared_per_processor / blocks - gpu.reserved_per_block);
    return std::max(0, std::min((room - memory.fixed_bytes) / memory.stage_bytes, kMaxStages));
  };
  // Two blocks on a processor hide each other's segment ends, if both have enough in flight.
  AttentionMemory memory = attention_memory<BF16Cache>(launch.dim);
  if (stages(memory) < 3) blocks = 1;
  if (cache_dtype == DType::kE4M3) memory = attention_memory<E4M3Cache>(launch.dim);
  launch.stages = stages(memory);
  launch.workers = blocks * gpu.processors;
  launch.shared_bytes =
      memory.fixed_bytes + static_cast<size_t>(launch.stages) * memory.stage_bytes;
  return launch;
}

// Rows of more than 16 query rows are known to be there only if there are drafts, more tokens than
// requests, or more heads than that share a key/value head. The narrow kernel computes others as
// well, tile by tile, and is the faster one where it reads keys and values once.
AttentionTiles attention_tiles(const AttentionPlan& plan, const StepContext& ctx) {
  if (ctx.batch_invariant) return AttentionTiles::kSplits;
  const bool prompts =
      ctx.sizes.speculates || (ctx.sizes.num_tokens > ctx.sizes.num_requests &&
                               attention_route(plan, ctx).native_rows != AttentionRows::kDecode);
  const bool many_heads = plan.shape.num_heads / plan.shape.num_kv_heads > kNarrowRows;
  return prompts || many_heads ? AttentionTiles::kWide : AttentionTiles::kNarrow;
}

AttentionPlanLayout attention_plan_layout(const AttentionPlan& plan,
                                          const AttentionLaunch& launch) {
  const int64_t items =
      item_capacity(plan, plan.max_requests, plan.max_tokens, AttentionTiles::kSplits);
  AttentionPlanLayout layout{};
  int64_t next = 0;
  const auto take = [&next](int64_t bytes) {
    const int64_t offset = next;
    next += (bytes + kAlign - 1) / kAlign * kAlign;
    return offset;
  };
  layout.workers = take(launch.workers * static_cast<int64_t>(sizeof(AttentionWorker)));
  layout.first_blocks = take(int64_t{plan.num_groups} * launch.workers * kAttentionWarps *
                             static_cast<int64_t>(sizeof(int32_t)));
  layout.items = take(items * static_cast<int64_t>(sizeof(AttentionItem)));
  layout.scratch = take((plan.max_requests + 1 + items) * static_cast<int64_t>(sizeof(int32_t)));
  layout.start_floats = int64_t{kWideRows} * partial_row_floats(launch.dim);
  layout.worker_floats = 2 * layout.start_floats;
  layout.partials =
      take(launch.workers * layout.worker_floats * static_cast<int64_t>(sizeof(float)));
  layout.bytes = next;
  return layout;
}

}  // namespace cuda

AttentionRoute attention_route(const AttentionPlan& plan, const StepContext& ctx) {
  AttentionRoute route;
  if (!is_planned(plan) || ctx.batch_invariant) return route;
  route.flashinfer_prefill = ctx.eager_attention && flashinfer_prefill_supports(plan, ctx);
  // FlashInfer's decode kernels take one token a row.
  route.flashinfer_decode = ctx.attention_backend == AttentionBackend::kFlashInfer &&
                            !ctx.sizes.speculates && flashinfer_decode_supports(plan, ctx);
  route.native = !(route.flashinfer_prefill && route.flashinfer_decode);
  if (route.flashinfer_prefill) route.native_rows = AttentionRows::kDecode;
  if (route.flashinfer_decode) route.native_rows = AttentionRows::kPrefill;
  return route;
}

AttentionBackend decode_backend_cuda(const AttentionPlan& plan, const StepContext& ctx) {
  return attention_route(plan, ctx).flashinfer_decode ? AttentionBackend::kFlashInfer
                                                      : AttentionBackend::kNative;
}

int64_t attention_plan_bytes_cuda(const AttentionPlan& plan, Device& device) {
  int64_t bytes = 0;
  run_on_stream(device, [&] { bytes = native_plan_bytes(plan); });
  return bytes + flashinfer_plan_bytes(plan, device);
}

void* flashinfer_plan_data(const AttentionPlan& plan) {
  return static_cast<char*>(plan.data) + native_plan_bytes(plan);
}

void plan_attention_cuda(const AttentionPlan& plan, const StepContext& ctx) {
  if (!is_planned(plan) || ctx.sizes.num_requests == 0) return;
  check(plan.data != nullptr, kOp, "the plan has no memory");
  check(ctx.sizes.num_requests <= plan.max_requests && ctx.sizes.num_tokens <= plan.max_tokens, kOp,
        "the step has ", ctx.sizes.num_requests, " requests and ", ctx.sizes.num_tokens,
        " tokens, the plan room for ", plan.max_requests, " and ", plan.max_tokens);
  const AttentionRoute route = attention_route(plan, ctx);
  if (route.flashinfer_decode || route.flashinfer_prefill) flashinfer_plan(plan, ctx);
  if (!route.native) return;
  const cuda::AttentionLaunch launch = cuda::attention_launch(plan.shape.head_dim);
  const cuda::AttentionPlanLayout layout = cuda::attention_plan_layout(plan, launch);
  char* data = static_cast<char*>(plan.data);
  PlanArgs args{};
  args.tiles = cuda::attention_tiles(plan, ctx);
  const int64_t items =
      item_capacity(plan, ctx.sizes.num_requests, ctx.sizes.num_tokens, args.tiles);
  const int64_t units = int64_t{ctx.rows.max_model_len} / cuda::kUnit + 2 + cuda::kSegmentCost;
  check(items * plan.shape.num_kv_heads * units < INT32_MAX, kOp, "a step of ",
        ctx.sizes.num_requests, " requests and ", ctx.sizes.num_tokens, " tokens of up to ",
        ctx.rows.max_model_len, " positions and ", plan.shape.num_kv_heads,
        " key/value heads is too large to divide");
  args.workers = reinterpret_cast<cuda::AttentionWorker*>(data + layout.workers);
  args.items = reinterpret_cast<cuda::AttentionItem*>(data + layout.items);
  args.num_workers = launch.workers;
  args.num_requests = ctx.sizes.num_requests;
  args.group = plan.shape.num_heads / plan.shape.num_kv_heads;
  args.num_kv_heads = plan.shape.num_kv_heads;
  args.window = plan.window;
  args.rows = route.native_rows;
  if (cuda::plans_blocks(ctx.rows.block_size)) {
    args.group_blocks = int64_t{ctx.rows.num_rows} * ctx.rows.max_blocks;
    args.block_table = ctx.rows.block_table + plan.first_group * args.group_blocks;
    args.num_groups = plan.num_groups;
    args.first_blocks = reinterpret_cast<int32_t*>(data + layout.first_blocks);
  }
  args.max_blocks = ctx.rows.max_blocks;
  args.block_size = ctx.rows.block_size;
  args.split_rows = layout.start_floats / cuda::partial_row_floats(launch.dim);
  size_t shared_bytes = static_cast<size_t>(ctx.sizes.num_requests + 1 + items) * sizeof(int32_t);
  if (shared_bytes > static_cast<size_t>(kPlanSharedBytes)) {
    args.scratch = reinterpret_cast<int32_t*>(data + layout.scratch);
    shared_bytes = 0;
  }
  cuda::launch(kOp, ctx, plan_kernel, dim3(1), dim3(kThreads), shared_bytes, args, ctx.infer);
}

}  // namespace mrv1
