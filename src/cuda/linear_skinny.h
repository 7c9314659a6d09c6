// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "ops/linear.h"

// bfloat16 linears of few rows, which cost what reading the weight costs. They are right for any
// number of rows.
namespace mrv1::cuda {

enum class SkinnyEngine : uint8_t {
  kMma,    // mma.sync, fed by cp.async; warps of a block split K. Any GPU since Ampere.
  kWgmma,  // wgmma, fed by TMA; blocks of a cluster split K. Hopper only.
  kWide,   // as kWgmma, with wider tiles, whose blocks load tokens for each other. Hopper only.
};

// How a weight is cut. For a given weight and config a row's result does not depend on the number
// of rows or on its place among them: of the fields only engine, split and warps decide the order
// of sums.
struct SkinnyConfig {
  SkinnyEngine engine = SkinnyEngine::kMma;
  uint8_t warps = 8;        // kMma: warps that split K; others: unused
  uint8_t split = 1;        // blocks of the cluster that split K; kMma: unused
  uint8_t stages = 3;       // of the rings through which weights stream; but for kMma two at least
  uint16_t tile_rows = 32;  // weight rows of a block's tile
  uint8_t share = 1;        // kWide: tiles of the cluster, whose blocks load tokens for each other

  friend bool operator==(const SkinnyConfig&, const SkinnyConfig&) = default;
};

// Whether linear_skinny takes this linear: bfloat16 x and weight, row-major, both aligned to 16
// bytes, cols a multiple of 8, and a GPU that can.
bool skinny_supports(const LinearParams& params, int64_t rows);

// The configs worth trying for a number of rows and a weight [n, k] on the current device.
std::vector<SkinnyConfig> skinny_configs(int64_t rows, int64_t n, int64_t k, bool gated);

// Whether linear_skinny takes the config for these sizes. A table may be older than the kernels.
bool skinny_offers(const SkinnyConfig& config, int64_t rows, int64_t n, int64_t k, bool gated);

// The config to take when nothing was measured.
SkinnyConfig skinny_default(int64_t rows, int64_t n, int64_t k, bool gated);

// The config for a weight when a row's result must not depend on the number of rows at all: what
// decides the order of sums is the same for all `rows`. Nor on the number of ranks that have n of a
// weight's `whole_n` rows: it follows from those.
SkinnyConfig skinny_invariant(int64_t n, int64_t k, int64_t whole_n, int64_t rows);

// Bytes of ctx.workspace that linear_skinny uses: none.
int64_t skinny_workspace_bytes(const SkinnyConfig& config, int64_t rows, int64_t n, int64_t k);

// The caller has made sure of skinny_supports and rows > 0. Rows of x and of the weight lie
// `stride` elements apart, a multiple of 8 and weight.cols at least.
void linear_skinny(const LinearParams& params, const SkinnyConfig& config, int64_t rows,
                   int64_t stride, const StepContext& ctx);

}  // namespace mrv1::cuda
