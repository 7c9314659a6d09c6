// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Products of moe_experts with NVFP4 weights and many rows: experts are copied to scratch in
// bfloat16, some at a time, and multiplied by moe_wgmma, which scales the sums of each weight row.
#include <algorithm>

#include "launch.h"
#include "linear_fp4.h"
#include "moe_schedule.h"

namespace mrv1::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kAlignment = 256;
// Rows of an expert from which on a copy costs less than decoding its codes for every 32.
constexpr int64_t kCopiedRows = 96;

constexpr int64_t aligned(int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// The groups of experts [first, first + experts), numbered from the first of them. All lie by
// expert.
__global__ void __launch_bounds__(kThreads)
    piece_kernel(MoeSchedule schedule, int32_t first, int32_t experts, MoeGroup* groups,
                 int32_t* num_groups) {
  __shared__ int32_t before, inside;
  launch_next();
  if (threadIdx.x == 0) before = inside = 0;
  wait_for_previous();
  __syncthreads();
  const int32_t total = *schedule.num_groups;
  for (int32_t i = threadIdx.x; i < total; i += kThreads) {
    const int32_t expert = schedule.groups[i].expert;
    if (expert < first) atomicAdd(&before, 1);
    if (expert >= first && expert < first + experts) atomicAdd(&inside, 1);
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < inside; i += kThreads) {
    MoeGroup group = schedule.groups[before + i];
    group.expert -= first;
    groups[i] = group;
  }
  if (threadIdx.x == 0) *num_groups = inside;
}

// Where copies begin in the scratch, behind the groups of a piece and their number.
int64_t copies_at(int64_t pairs, int64_t num_experts) {
  const int64_t most_groups = pairs + 2 * num_experts;
  return aligned(most_groups * static_cast<int64_t>(sizeof(MoeGroup))) + kAlignment;
}

}  // namespace

bool moe_fp4_copies(int64_t rows, int64_t top_k, int64_t num_experts) {
  return rows * top_k >= kCopiedRows * num_experts;
}

int64_t moe_fp4_copy_bytes(int64_t elements, int64_t num_experts, int64_t pairs) {
  if (elements == 0 || pairs < kCopiedRows * num_experts) return 0;
  const int64_t all = elements * static_cast<int64_t>(sizeof(BFloat16));
  const int64_t one = all / num_experts;
  return copies_at(pairs, num_experts) + std::max(one, std::min(all, kMaxFp4Scratch));
}

void moe_fp4_copied(const MoeProduct& product, const MoeCut& cut, void* scratch, int64_t bytes,
                    const StepContext& ctx) {
  const WeightView& weight = product.weight;
  const int64_t rows = product.weight_rows();
  const int64_t pairs = int64_t{product.rows.num_rows} * product.rows.top_k;
  char* base = static_cast<char*>(scratch);
  const int64_t begin = copies_at(pairs, weight.matrices);
  auto* copies = reinterpret_cast<BFloat16*>(base + begin);
  const int64_t matrix_bytes = rows * weight.cols * static_cast<int64_t>(sizeof(BFloat16));
  const int64_t fit = std::min((bytes - begin) / matrix_bytes, weight.matrices);
  check_internal(fit > 0, kMoeOp, "scratch has ", bytes, " bytes, which hold no expert of ",
                 matrix_bytes);
  const int64_t pieces = (weight.matrices + fit - 1) / fit;
  const int64_t experts = (weight.matrices + pieces - 1) / pieces;
  MoeProduct part = product;
  part.schedule.groups = reinterpret_cast<MoeGroup*>(base);
  part.schedule.num_groups = reinterpret_cast<int32_t*>(base + begin - kAlignment);
  for (int64_t first = 0; first < weight.matrices; first += experts) {
    const int64_t count = std::min(experts, weight.matrices - first);
    launch(kMoeOp, ctx, piece_kernel, 1, kThreads, 0, product.schedule, static_cast<int32_t>(first),
           static_cast<int32_t>(count), part.schedule.groups, part.schedule.num_groups);
    fp4_dequantize(weight, first, count, copies, ctx);
    part.weight = {.data = copies,
                   .dtype = DType::kBF16,
                   .rows = rows * count,
                   .cols = weight.cols,
                   .matrices = count,
                   .row_scales = weight.row_scales + first * rows};
    moe_wgmma(part, cut, /*weights_first=*/false, ctx);
  }
}

}  // namespace mrv1::cuda
