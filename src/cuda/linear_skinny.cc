// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <iterator>
#include <limits>

#include "linear_skinny_kernels.h"

namespace mrv1::cuda {
namespace {

constexpr int64_t kShortRow = 3072;    // columns
constexpr int64_t kWideRowsFrom = 24;  // fewer leave kWide's 64-wide side nearly empty
constexpr size_t kWideTried = 10;
constexpr int64_t kFewRows = 512;  // far beyond where kMma and kWgmma still win

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), kSkinnyOp, "cudaDeviceGetAttribute");
  return value;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

SkinnyConfig mma_of(int warps, int tile_rows) {
  return {.engine = SkinnyEngine::kMma,
          .warps = static_cast<uint8_t>(warps),
          .stages = 6,
          .tile_rows = static_cast<uint16_t>(tile_rows)};
}

// Measured on an H200. Short rows finish soonest with few, tall tiles, which read x less often;
// for long ones even shares of the multiprocessors count.
SkinnyConfig mma_config(int64_t rows, int64_t n, int64_t k, int sms) {
  const int64_t share = n / sms;  // weight rows of a multiprocessor
  if (share <= 16) return mma_of(16, 16);
  if (k <= kShortRow) {
    if (rows > 16) return mma_of(8, 32);
    for (const int tile_rows : {32, 48, 64}) {
      if (tile_rows >= share * 2 || tile_rows == 64) return mma_of(8, tile_rows);
    }
  }
  int best = 0;
  double best_fill = 0;
  for (const int tile_rows : {32, 16, 48}) {
    if (tile_rows == 16 && rows > 16) continue;
    const int64_t tiles = ceil_div(n, tile_rows);
    const double fill = static_cast<double>(tiles) / (ceil_div(tiles, sms) * sms);
    if (fill > best_fill * 1.05) {
      best = tile_rows;
      best_fill = fill;
    }
  }
  return mma_of(rows <= 16 && best < 48 ? 16 : 8, best);
}

SkinnyConfig wgmma_of(int64_t rows, int tile_rows, int split, int room) {
  const int tokens = rows <= 16 ? 16 : rows <= 32 ? 32 : rows <= 64 ? 64 : 128;
  return {
      .engine = SkinnyEngine::kWgmma,
      .warps = 1,
      .split = static_cast<uint8_t>(split),
      .stages = static_cast<uint8_t>(std::clamp(room * 1024 / ((tile_rows + tokens) * 128), 2, 12)),
      .tile_rows = static_cast<uint16_t>(tile_rows)};
}

// KB for the ring. Short rows of few tokens leave room for the next kernel's blocks, whose whole
// weight then is on its way; others want all the bytes in flight that a multiprocessor can hold.
int ring_room(int64_t rows, int64_t k) { return k <= kShortRow && rows <= 128 ? 104 : 220; }

// How many blocks split K to occupy the GPU, for few rows. Clusters of two fit all multiprocessors
// of an H200, those of three or more do not.
int wgmma_split(int64_t n, int sms) {
  const int64_t tiles = ceil_div(n, 64);
  if (tiles <= sms / 6) return 6;
  if (tiles <= sms / 4) return 4;
  return tiles * 2 <= sms * 3 / 2 ? 2 : 1;
}

SkinnyConfig wgmma_config(int64_t rows, int64_t n, int64_t k, int split, int sms) {
  const auto blocks = [&](int tile_rows) {
    return ceil_div(n, tile_rows) * ceil_div(rows, 128) * split;
  };
  const int room = ring_room(rows, k);
  // Many short-lived blocks, several on a multiprocessor, keep the memory busy while some finish.
  if (rows <= 128 && blocks(64) >= sms * 2 && split == 1) {
    if (rows <= 64) return wgmma_of(rows, 64, split, 52);
    return k <= kShortRow ? wgmma_of(rows, 64, split, 76) : wgmma_of(rows, 256, split, room);
  }
  if (blocks(64) <= sms || (k <= kShortRow && rows <= 128)) {
    return wgmma_of(rows, 64, split, room);
  }
  // The smallest tile that leaves one block a multiprocessor.
  for (const int tile_rows : {128, 192}) {
    if (blocks(tile_rows) <= sms) return wgmma_of(rows, tile_rows, split, room);
  }
  return wgmma_of(rows, 256, split, room);
}

// A way to cut a linear for kWide, and how long it should take.
struct WideCandidate {
  SkinnyConfig config;
  double seconds;
};

// What limits the memory and a multiprocessor, in bytes and multiply-adds a second. The weight
// comes from memory once; all that blocks read comes through the L2 cache, and what they share only
// once. Measured on an H200: the skinny kernels' reads of L2 at 64 and 128 rows, of all sizes of
// weights, add up to 6.2 to 6.6 TB/s.
struct Rates {
  double memory, multiprocessor, products;
  static constexpr double kL2 = 6.3e12;
  static constexpr double kStart = 2e-6;  // of a block, until products run, and its end
};

Rates rates_of_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), kSkinnyOp, "cudaGetDevice");
  const double memory_hz = 1e3 * attribute(cudaDevAttrMemoryClockRate, device);
  const double memory_bytes = attribute(cudaDevAttrGlobalMemoryBusWidth, device) / 8.0;
  const double hz = 1e3 * attribute(cudaDevAttrClockRate, device);
  // A fourth of the products' clock goes to their power.
  return {.memory = 0.93 * 2 * memory_hz * memory_bytes,
          .multiprocessor = 38 * hz,
          .products = 0.75 * 2048 * hz};
}

std::vector<WideCandidate> wide_candidates(int64_t rows, int64_t n, int64_t k, bool gated) {
  const Rates rates = rates_of_device();
  int slots[9] = {};  // blocks that run at once, in clusters of so many
  for (const int blocks : {1, 2, 3, 4, 6, 8}) slots[blocks] = wide_clusters(blocks) * blocks;
  const int64_t out_cols = gated ? n / 2 : n;
  std::vector<WideCandidate> candidates;
  for (const int tile_rows : kWideRows) {
    const int64_t token_tiles = ceil_div(rows, wide_tile_tokens(tile_rows));
    const int64_t tokens = ceil_div(rows, token_tiles);
    const int64_t product_tokens = ceil_div(tokens, 64) * 64;
    for (const int share : {1, 2, 4}) {
      const int64_t tiles = ceil_div(ceil_div(out_cols, gated ? tile_rows / 2 : tile_rows), share);
      for (const int split : {1, 2, 3, 4, 6, 8}) {
        const int cluster = share * split;
        if (cluster > 8 || slots[cluster] == 0 || k < split * 512) continue;
        const int64_t blocks = tiles * cluster * token_tiles;
        const double waves = static_cast<double>(ceil_div(blocks, slots[cluster]));
        const double depth = static_cast<double>(ceil_div(ceil_div(k, 64), split) * 64);
        const double read = depth * 2 * (tile_rows + static_cast<double>(tokens) / share);
        const double arrived = depth * 2 * static_cast<double>(tile_rows + tokens);
        const double products = depth * static_cast<double>(tile_rows * product_tokens);
        const double sums = split == 1 ? 0 : static_cast<double>(tile_rows * product_tokens) * 4;
        const double limits[] = {static_cast<double>(n) * static_cast<double>(k) * 2 / rates.memory,
                                 static_cast<double>(blocks) * read / Rates::kL2,
                                 waves * arrived / rates.multiprocessor,
                                 waves * products / rates.products};
        // They overlap, but never quite.
        double seconds = waves * Rates::kStart + static_cast<double>(blocks) * sums / Rates::kL2;
        seconds += 0.9 * *std::max_element(std::begin(limits), std::end(limits));
        for (const double limit : limits) seconds += 0.1 * limit;
        const int64_t stage_bytes = (product_tokens + tile_rows) * 128;
        const SkinnyConfig config = {.engine = SkinnyEngine::kWide,
                                     .warps = 1,
                                     .split = static_cast<uint8_t>(split),
                                     .stages = static_cast<uint8_t>(std::clamp<int64_t>(
                                         int64_t{225} * 1024 / stage_bytes, 2, 12)),
                                     .tile_rows = static_cast<uint16_t>(tile_rows),
                                     .share = static_cast<uint8_t>(share)};
        candidates.push_back({config, seconds});
      }
    }
  }
  return candidates;
}

}  // namespace

DeviceLimits device_limits() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), kSkinnyOp, "cudaGetDevice");
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  return {.sms = attribute(cudaDevAttrMultiProcessorCount, device),
          .major = major,
          .shared_bytes =
              static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)),
          .wgmma = major == 9 && wgmma_is_built()};
}

bool skinny_supports(const LinearParams& params, int64_t rows) {
  constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();
  const WeightView& weight = params.weight;
  return params.dtype == DType::kBF16 && weight.dtype == DType::kBF16 &&
         weight.layout == WeightLayout::kRowMajor && weight.row_scales == nullptr &&
         weight.cols % 8 == 0 && weight.cols > 0 && aligned(params.x) && aligned(weight.data) &&
         rows < kMaxInt && weight.rows < kMaxInt / 2 && weight.cols < kMaxInt / 2 &&
         device_limits().major >= 8;
}

SkinnyConfig skinny_default(int64_t rows, int64_t n, int64_t k, bool gated) {
  const DeviceLimits limits = device_limits();
  // Up to 16 rows mma wins by its short way from the last load to the output. Up to 32 it does
  // where tiles are few; beyond, it reads x too often.
  const bool few_tiles = n < 64 * limits.sms;
  if (!limits.wgmma || rows <= 16 || (rows <= 32 && few_tiles)) {
    return mma_config(rows, n, k, limits.sms);
  }
  // Enough tokens occupy the GPU without a split.
  const bool many = ceil_div(n, 256) * ceil_div(rows, 128) * 4 >= int64_t{limits.sms} * 3;
  int split = many ? 1 : wgmma_split(n, limits.sms);
  if (rows > 128) split = std::min(split, 3);
  return wgmma_config(rows, n, k, split, limits.sms);
}

SkinnyConfig skinny_invariant(int64_t n, int64_t k, int64_t whole_n, int64_t rows) {
  const DeviceLimits limits = device_limits();
  if (!limits.wgmma) return mma_config(/*rows=*/1, whole_n, k, limits.sms);
  return wgmma_config(rows, n, k, wgmma_split(whole_n, limits.sms), limits.sms);
}

std::vector<SkinnyConfig> skinny_configs(int64_t rows, int64_t n, int64_t k, bool gated) {
  std::vector<SkinnyConfig> configs;
  const auto add = [&](const SkinnyConfig& config) {
    if (std::find(configs.begin(), configs.end(), config) == configs.end()) {
      configs.push_back(config);
    }
  };
  const DeviceLimits limits = device_limits();
  if (rows <= kFewRows) add(skinny_default(rows, n, k, gated));
  if (rows <= (limits.wgmma ? 64 : kFewRows)) {
    for (const int tile_rows : {16, 32, 48, 64}) {
      for (const int warps : {8, 16}) {
        if (warps == 16 && tile_rows > 32 && limits.shared_bytes < 160 * 1024) continue;
        add(mma_of(warps, tile_rows));
      }
    }
  }
  if (limits.wgmma && rows > 8 && rows <= kFewRows) {
    for (const int tile_rows : {64, 128, 192, 256}) {
      for (const int split : {1, 2, 3, 4, 6}) {
        const int64_t blocks = (n + tile_rows - 1) / tile_rows * split;
        const bool sensible =
            split == 1 ? blocks * 2 >= limits.sms || tile_rows == 64 : blocks <= limits.sms * 3 / 2;
        if (sensible) {
          add(wgmma_of(rows, tile_rows, split, ring_room(rows, k)));
          if (tile_rows == 64) add(wgmma_of(rows, tile_rows, split, 52));
        }
      }
    }
  }
  if (limits.wgmma && rows >= kWideRowsFrom) {
    std::vector<WideCandidate> wide = wide_candidates(rows, n, k, gated);
    const auto better = [](const WideCandidate& a, const WideCandidate& b) {
      return a.seconds < b.seconds;
    };
    std::stable_sort(wide.begin(), wide.end(), better);
    wide.resize(std::min(wide.size(), rows <= kFewRows ? kWideTried : kWideTried / 2));
    for (const WideCandidate& candidate : wide) add(candidate.config);
  }
  return configs;
}

bool skinny_offers(const SkinnyConfig& config, int64_t rows, int64_t n, int64_t k, bool gated) {
  if (config.engine == SkinnyEngine::kWide) return device_limits().wgmma && wide_offers(config);
  if (config.engine == SkinnyEngine::kWgmma) return device_limits().wgmma && wgmma_offers(config);
  const std::vector<SkinnyConfig> configs = skinny_configs(rows, n, k, gated);
  return std::find(configs.begin(), configs.end(), config) != configs.end();
}

int64_t skinny_workspace_bytes(const SkinnyConfig&, int64_t, int64_t, int64_t) { return 0; }

void linear_skinny(const LinearParams& params, const SkinnyConfig& config, int64_t rows,
                   int64_t stride, const StepContext& ctx) {
  const SkinnyArgs args = {
      .x = static_cast<const BFloat16*>(params.x),
      .weight = static_cast<const BFloat16*>(params.weight.data),
      .bias = params.bias,
      .out = params.out,
      .tokens = static_cast<int>(rows),
      .n = static_cast<int>(params.weight.rows),
      .k = static_cast<int>(params.weight.cols),
      .stride = static_cast<int>(stride),
      .out_cols = static_cast<int>(params.out_cols()),
      .activation = params.activation,
      .out_f32 = params.out_dtype == DType::kF32,
  };
  const DeviceLimits limits = device_limits();
  switch (config.engine) {
    case SkinnyEngine::kMma:
      return skinny_mma(args, config, limits, ctx);
    case SkinnyEngine::kWgmma:
      return skinny_wgmma(args, config, limits, ctx);
    case SkinnyEngine::kWide:
      return skinny_wide(args, config, limits, ctx);
  }
}

}  // namespace mrv1::cuda
