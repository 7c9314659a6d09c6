// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "cublaslt.h"
#include "linear_table.h"
#include "ops/linear.h"
#include "ops/linear_options.h"

namespace mrv1::cuda {

// cuBLASLt's part of the workspace. NVIDIA recommends this much for Hopper.
constexpr int64_t kCublasLtWorkspace = int64_t{32} << 20;
// The rest holds products that a second kernel finishes: rows go through it piece by piece. The
// most holds 8,192 rows of an 8B model's gate and up in one piece: four leave 3 % of the GPU idle
// at their ends.
constexpr int64_t kMinIntermediate = int64_t{32} << 20;
constexpr int64_t kMaxIntermediate = int64_t{512} << 20;

// Bytes of workspace for linears with up to `max_tokens` rows.
constexpr int64_t linear_workspace_bytes(int64_t max_tokens, int64_t gated_rows) {
  const int64_t wanted = max_tokens * gated_rows * static_cast<int64_t>(sizeof(BFloat16));
  return kCublasLtWorkspace + (wanted < kMinIntermediate
                                   ? kMinIntermediate
                                   : (wanted < kMaxIntermediate ? wanted : kMaxIntermediate));
}

// How to compute a linear, ready to run.
struct LinearPlan {
  LinearKind kind = LinearKind::kTiled;
  SkinnyConfig skinny;
  cublasLtMatmulAlgo_t algo;
};

// How cuBLASLt computes a linear: out of its reach are a bias on bfloat16 outputs and activations,
// which a kernel does afterwards, from an intermediate in the workspace.
struct CublasLtSteps {
  DType product_dtype;         // what the product is written as
  bool to_workspace;           // and where
  const float* epilogue_bias;  // bias that cuBLASLt adds
  const float* later_bias;     // bias that is added afterwards
  int64_t piece_rows;          // rows that go through the workspace at a time; 0 if none fit
};
CublasLtSteps cublaslt_steps(const LinearParams& params, int64_t rows, const StepContext& ctx);

// What the linears of one device share: the library's handle, the tuning tables, and the plans made
// so far. Callers may be several threads.
class LinearContext {
 public:
  // To be called, as all methods and the destructor, while the device is current.
  LinearContext(const LinearOptions& options, std::string_view card);
  ~LinearContext();
  LinearContext(const LinearContext&) = delete;
  LinearContext& operator=(const LinearContext&) = delete;

  // The plan for a linear of so many rows. Plans are made for ranges of rows, when a range is seen
  // first: that may take milliseconds, and with tuning seconds, and belongs into a warm-up. A plan
  // that is there is found without allocation in well under a microsecond.
  LinearPlan plan(const LinearParams& params, int64_t rows, const StepContext& ctx);

  // Runs a product through cuBLASLt.
  void multiply(const LinearParams& params, const LinearPlan& plan, const CublasLtSteps& steps,
                int64_t first_row, int64_t rows, void* out, const StepContext& ctx) const;

 private:
  // Everything that a plan depends on. Compared and hashed as two words.
  struct Key {
    int32_t n = 0, k = 0, rows = 0;
    DType dtype{}, out_dtype{};
    uint8_t flags = 0, alignment = 0;
  };
  static_assert(sizeof(Key) == 16);
  struct Entry {
    Key key;  // rows = 0: free
    LinearPlan plan;
  };

  int32_t processors(const StepContext& ctx) const;
  LinearPlan choose(const LinearParams& params, const LinearShape& shape, int64_t rows,
                    int64_t alignment, const StepContext& ctx);
  // False if the config cannot be used for these operands.
  bool make_plan(const LinearParams& params, const LinearConfig& config, int64_t rows,
                 const StepContext& ctx, LinearPlan* plan) const;
  bool heuristic_plan(const LinearParams& params, int64_t rows, int64_t alignment,
                      const StepContext& ctx, LinearPlan* plan) const;
  // linear_tune.cc
  std::vector<LinearConfig> candidates(const LinearParams& params, int64_t rows,
                                       const StepContext& ctx) const;
  bool tune(const LinearParams& params, const LinearShape& shape, int64_t rows,
            const StepContext& ctx, LinearPlan* plan);

  Entry& slot(std::vector<Entry>& entries, const Key& key) const;
  void insert(const Key& key, const LinearPlan& plan);

  const CublasLt* library_ = nullptr;
  cublasLtHandle_t handle_ = nullptr;
  int processors_ = 0;
  bool tune_;
  std::string tuned_path_;
  LinearTable table_;
  LinearTable tuned_;  // what tuned_path_ holds
  std::mutex mutex_;
  std::vector<Entry> entries_;  // open addressing; a power of two, at most half full
  size_t num_entries_ = 0;
};

// Runs a linear as planned. linear.cu
void run_linear(const LinearParams& params, int64_t rows, const LinearPlan& plan,
                const LinearContext& context, const StepContext& ctx);

}  // namespace mrv1::cuda
