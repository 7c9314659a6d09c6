// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "linear_context.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "launch.h"
#include "linear_fp4.h"
#include "spare_processors.h"

namespace mrv1::cuda {
namespace {

constexpr std::string_view kOp = "linear";
constexpr std::string_view kProductOp = "linear (cuBLASLt)";
// What cuBLASLt's fast algorithms ask of pointers; more makes no difference to them.
constexpr int64_t kAlignment = 16;
// Where nothing was measured, the skinny kernels take bfloat16 linears of up to so many rows ...
constexpr int64_t kSkinnyRows = 64;
// ... and cuBLASLt float32 linears of at least so many multiply-adds. The tiled kernel does smaller
// ones as fast, in an order of sums that does not depend on the number of rows.
constexpr int64_t kLargeProduct = int64_t{1} << 22;

constexpr uint8_t kGated = 1, kBias = 2, kInvariant = 4, kScaled = 8, kBeside = 16;

// The number of rows that a plan is made for: rounded up to a power of two up to 16, then to a
// quarter of the next lower one. Decides how many plans there can be.
int64_t row_bucket(int64_t rows) {
  if (rows <= 16) return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(rows)));
  const int64_t step = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(rows - 1))) / 4;
  return (rows + step - 1) / step * step;
}

int64_t alignment_of(const LinearParams& params) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(params.x) |
                         reinterpret_cast<uintptr_t>(params.weight.data) |
                         reinterpret_cast<uintptr_t>(params.out) | kAlignment;
  return static_cast<int64_t>(bits & -bits);
}

bool is_capturing(const StepContext& ctx) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream_of(ctx), &status), kOp, "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

// A run of weight rows whose products are multiplied by the same.
struct Run {
  int64_t first = 0, rows = 0;
};

size_t num_runs(const WeightView& weight) {
  return weight.row_scales == nullptr ? 1 : weight.scale_runs->size();
}

Run run_of(const WeightView& weight, size_t index) {
  if (weight.row_scales == nullptr) return {0, weight.rows};
  const int64_t first = index > 0 ? (*weight.scale_runs)[index - 1] : 0;
  return {first, (*weight.scale_runs)[index] - first};
}

CublasLtProduct product(const CublasLt& library, const LinearParams& params,
                        const CublasLtSteps& steps, int64_t rows, const Run& run) {
  const float* bias = steps.epilogue_bias != nullptr ? steps.epilogue_bias + run.first : nullptr;
  return CublasLtProduct(library, run.rows, params.weight.cols, rows, params.dtype,
                         steps.product_dtype, bias, params.weight.rows,
                         params.weight.row_scales != nullptr);
}

// The longest run, whose algorithm the others take too.
CublasLtProduct main_product(const CublasLt& library, const LinearParams& params,
                             const CublasLtSteps& steps, int64_t rows) {
  Run longest = run_of(params.weight, 0);
  for (size_t i = 1; i < num_runs(params.weight); ++i) {
    const Run run = run_of(params.weight, i);
    if (run.rows > longest.rows) longest = run;
  }
  return product(library, params, steps, rows, longest);
}

size_t product_workspace(const StepContext& ctx) {
  return std::min(ctx.workspace_bytes, static_cast<size_t>(kCublasLtWorkspace));
}

}  // namespace

CublasLtSteps cublaslt_steps(const LinearParams& params, int64_t rows, const StepContext& ctx) {
  CublasLtSteps steps{};
  const bool bias_later = params.bias != nullptr && params.out_dtype != DType::kF32;
  // A bias is added before the sum is rounded.
  steps.product_dtype = bias_later ? DType::kF32 : params.out_dtype;
  steps.to_workspace = params.gated() || bias_later;
  (steps.to_workspace ? steps.later_bias : steps.epilogue_bias) = params.bias;
  steps.piece_rows = rows;
  if (steps.to_workspace) {
    const int64_t room =
        std::max<int64_t>(static_cast<int64_t>(ctx.workspace_bytes) - kCublasLtWorkspace, 0);
    const int64_t row_bytes =
        params.weight.rows * static_cast<int64_t>(dtype_size(steps.product_dtype));
    const int64_t fit = room / row_bytes;
    if (rows > fit) {
      // Pieces of equal size, in whole tiles: a small last one would cost as much as a large one.
      constexpr int64_t kTileRows = 128;
      const int64_t pieces = fit > 0 ? (rows + fit - 1) / fit : 0;
      const int64_t even = pieces > 0 ? (rows + pieces - 1) / pieces : 0;
      steps.piece_rows = std::min((even + kTileRows - 1) / kTileRows * kTileRows, fit);
    }
  }
  return steps;
}

LinearContext::LinearContext(const LinearOptions& options, std::string_view card)
    : tune_(options.tune), entries_(256) {
  if (options.use_library) {
    library_ = &open_cublaslt(options.libraries);
  }
  check(!tune_ || !options.table_dirs.empty(), kOp, "tuning needs a directory for its tables");
  const std::string file =
      LinearTable::file_name(card, library_ != nullptr ? library_->version : "");
  for (const std::string& directory : options.table_dirs) {
    const std::string path = directory + "/" + file;
    if (tuned_path_.empty()) {
      tuned_path_ = path;
      tuned_.read(path);
    }
    table_.read(path);
  }
  int device = 0;
  check_cuda(cudaGetDevice(&device), kOp, "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, device), kOp,
             "cudaDeviceGetAttribute");
  // Last, so that nothing that throws comes after it.
  if (library_ != nullptr) library_->check_status(library_->create(&handle_), "cublasLtCreate");
}

LinearContext::~LinearContext() {
  if (handle_ != nullptr) library_->destroy(handle_);
}

// That cuBLASLt may take; 0 is all.
int32_t LinearContext::processors(const StepContext& ctx) const {
  const int32_t spare = spare_processors(ctx);
  return spare > 0 ? processors_ - spare : 0;
}

LinearPlan LinearContext::plan(const LinearParams& params, int64_t rows, const StepContext& ctx) {
  const WeightView& weight = params.weight;
  // What goes through the workspace in pieces is planned for a piece.
  const int64_t piece =
      params.gated() || params.bias != nullptr ? cublaslt_steps(params, rows, ctx).piece_rows : 0;
  const int64_t planned = piece > 0 ? piece : rows;
  const int64_t alignment = alignment_of(params);
  Key key;
  key.n = static_cast<int32_t>(weight.rows);
  key.k = static_cast<int32_t>(weight.cols);
  key.rows = static_cast<int32_t>(row_bucket(planned));
  key.dtype = params.dtype;
  key.out_dtype = params.out_dtype;
  key.flags = static_cast<uint8_t>(
      (params.gated() ? kGated : 0) | (params.bias != nullptr ? kBias : 0) |
      (ctx.batch_invariant ? kInvariant : 0) | (weight.row_scales != nullptr ? kScaled : 0) |
      (spare_processors(ctx) > 0 ? kBeside : 0));
  key.alignment = static_cast<uint8_t>(alignment);
  const LinearShape shape = {weight.rows,           weight.cols,      key.rows,
                             params.dtype,          params.out_dtype, params.gated(),
                             params.bias != nullptr};
  // The key has no room for the rows of all ranks, and there is nothing to look for.
  if (ctx.batch_invariant && params.whole_rows > weight.rows) {
    return choose(params, shape, planned, alignment, ctx);
  }
  const std::lock_guard lock(mutex_);
  if (const Entry& found = slot(entries_, key); found.key.rows != 0) return found.plan;
  const LinearPlan plan = choose(params, shape, planned, alignment, ctx);
  insert(key, plan);
  return plan;
}

LinearPlan LinearContext::choose(const LinearParams& params, const LinearShape& shape, int64_t rows,
                                 int64_t alignment, const StepContext& ctx) {
  LinearPlan plan;
  const bool skinny = skinny_supports(params, rows);
  const bool scaled = params.weight.row_scales != nullptr;  // only cuBLASLt scales rows
  if (ctx.batch_invariant) {
    if (skinny) {
      const int64_t whole_n = std::max(params.whole_rows, shape.n);
      plan.kind = LinearKind::kSkinny;
      plan.skinny = skinny_invariant(shape.n, shape.k, whole_n, rows);
    }
    return plan;
  }
  if (alignment >= kAlignment) {
    const bool measure =
        tune_ && !scaled && tuned_.find_exact(shape) == nullptr && !is_capturing(ctx);
    if (measure && tune(params, shape, rows, ctx, &plan)) return plan;
    const LinearConfig* measured = table_.find(shape);
    if (measured != nullptr && make_plan(params, *measured, rows, ctx, &plan)) return plan;
  }
  if (skinny && rows <= kSkinnyRows) {
    plan.kind = LinearKind::kSkinny;
    plan.skinny = skinny_default(rows, shape.n, shape.k, shape.gated);
    return plan;
  }
  const bool small = params.dtype == DType::kF32 &&
                     rows * shape.n < kLargeProduct / std::min(shape.k, kLargeProduct);
  if (!small && heuristic_plan(params, rows, alignment, ctx, &plan)) return plan;
  if (skinny) {
    plan.kind = LinearKind::kSkinny;
    plan.skinny = skinny_default(rows, shape.n, shape.k, shape.gated);
  }
  return plan;
}

bool LinearContext::make_plan(const LinearParams& params, const LinearConfig& config, int64_t rows,
                              const StepContext& ctx, LinearPlan* plan) const {
  const WeightView& weight = params.weight;
  LinearPlan made;
  made.kind = config.kind;
  if (config.kind == LinearKind::kSkinny) {
    if (!skinny_supports(params, rows)) return false;
    made.skinny = skinny_offers(config.skinny, rows, weight.rows, weight.cols, params.gated())
                      ? config.skinny
                      : skinny_default(rows, weight.rows, weight.cols, params.gated());
  } else if (config.kind == LinearKind::kCublasLt) {
    if (library_ == nullptr) return false;
    const CublasLtSteps steps = cublaslt_steps(params, rows, ctx);
    if (steps.piece_rows == 0) return false;
    CublasLtProduct described = main_product(*library_, params, steps, rows);
    described.set_processors(processors(ctx));
    if (!described.algorithm(handle_, config.cublaslt, &made.algo) ||
        !described.supports(handle_, made.algo, product_workspace(ctx))) {
      return false;
    }
  }
  *plan = made;
  return true;
}

bool LinearContext::heuristic_plan(const LinearParams& params, int64_t rows, int64_t alignment,
                                   const StepContext& ctx, LinearPlan* plan) const {
  if (library_ == nullptr) return false;
  const CublasLtSteps steps = cublaslt_steps(params, rows, ctx);
  if (steps.piece_rows == 0) return false;
  cublasLtMatmulHeuristicResult_t result;
  CublasLtProduct described = main_product(*library_, params, steps, rows);
  described.set_processors(processors(ctx));
  if (described.heuristics(handle_, product_workspace(ctx), alignment, 1, &result) == 0) {
    return false;
  }
  plan->kind = LinearKind::kCublasLt;
  plan->algo = result.algo;
  return true;
}

void LinearContext::multiply(const LinearParams& params, const LinearPlan& plan,
                             const CublasLtSteps& steps, int64_t first_row, int64_t rows, void* out,
                             const StepContext& ctx) const {
  const OpRange range(kProductOp);
  const WeightView& weight = params.weight;
  const char* x = static_cast<const char*>(params.x) +
                  first_row * weight.cols * static_cast<int64_t>(dtype_size(params.dtype));
  const size_t workspace_bytes = product_workspace(ctx);
  const bool scaled = weight.row_scales != nullptr;
  for (size_t i = 0; i < num_runs(weight); ++i) {
    const Run part = run_of(weight, i);
    CublasLtProduct described = product(*library_, params, steps, rows, part);
    described.set_processors(processors(ctx));
    const auto at = [&](const void* base, int64_t elements, DType dtype) {
      return static_cast<const char*>(base) + elements * static_cast<int64_t>(dtype_size(dtype));
    };
    const void* part_weight = at(weight.data, part.first * weight.cols, params.dtype);
    void* part_out = const_cast<char*>(at(out, part.first, steps.product_dtype));
    const auto run = [&](const cublasLtMatmulAlgo_t& algo) {
      return described.run(handle_, algo, part_weight, x, part_out, ctx.workspace, workspace_bytes,
                           stream_of(ctx), scaled ? weight.row_scales + part.first : nullptr,
                           scaled ? fp4_zero() : nullptr);
    };
    cublasStatus_t status = run(plan.algo);
    if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE) {
      // The algorithm suits the plan's number of rows, or its run, but not this one.
      LinearParams one = params;
      one.weight.data = part_weight;
      one.out = part_out;
      cublasLtMatmulHeuristicResult_t result;
      if (described.heuristics(handle_, workspace_bytes, alignment_of(one), 1, &result) > 0) {
        status = run(result.algo);
      }
    }
    library_->check_status(status, "cublasLtMatmul");
    count_launch(ctx);
  }
  if (ctx.sync_launches) check_kernel(kProductOp, ctx, cudaSuccess, dim3(), dim3(), 0);
}

LinearContext::Entry& LinearContext::slot(std::vector<Entry>& entries, const Key& key) const {
  uint64_t words[2];
  std::memcpy(words, &key, sizeof(key));
  uint64_t hash = words[0] * 0x9e3779b97f4a7c15ull ^ words[1];
  hash = (hash ^ hash >> 32) * 0xd6e8feb86659fd93ull;
  hash ^= hash >> 32;
  for (size_t at = hash;; ++at) {
    Entry& entry = entries[at & (entries.size() - 1)];
    if (entry.key.rows == 0 || std::memcmp(&entry.key, &key, sizeof(key)) == 0) return entry;
  }
}

void LinearContext::insert(const Key& key, const LinearPlan& plan) {
  if (2 * (num_entries_ + 1) > entries_.size()) {
    std::vector<Entry> larger(entries_.size() * 2);
    for (const Entry& entry : entries_) {
      if (entry.key.rows != 0) slot(larger, entry.key) = entry;
    }
    entries_ = std::move(larger);
  }
  slot(entries_, key) = {key, plan};
  ++num_entries_;
}

}  // namespace mrv1::cuda
