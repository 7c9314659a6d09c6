// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <numeric>
#include <random>

#include "bind/bind.h"
#include "core/probes.h"
#include "ops/kernels.h"
#include "program/program.h"

namespace mrv1 {
namespace {

constexpr std::string_view kWhere = "cache_write_probe";
// Launches of a timed run: as many as fill the working set, within these bounds.
constexpr int64_t kLeastLaunches = 8, kMostLaunches = 256;
constexpr int32_t kPositions = 4096;
constexpr float kStaticScale = 0.0078125f;

// Times launches that write keys and values into a paged cache, each from rows and to slots of its
// own.
class CacheWriteProbe {
 public:
  struct Spec {
    int32_t tokens = 1;
    HeadShape shape;
    DType dtype = DType::kBF16;
    DType cache_dtype = DType::kBF16;
    KvScaleKind scales = KvScaleKind::kNone;
    bool heads_first = false;  // HND
    int32_t block_size = 16;
    int64_t working_set = 0;  // bytes that a run touches at least, if kMostLaunches can
  };

  CacheWriteProbe(std::shared_ptr<Device> device, const Spec& spec)
      : device_(std::move(device)), spec_(spec) {
    const HeadShape& shape = spec_.shape;
    const auto size = static_cast<int64_t>(dtype_size(spec_.dtype));
    const int64_t kv_cols = int64_t{shape.num_kv_heads} * shape.head_dim;
    const int64_t token_bytes =
        shape.qkv_cols() * size + 2 * kv_cols * static_cast<int64_t>(dtype_size(spec_.cache_dtype));
    const int64_t launch_bytes = token_bytes * spec_.tokens;
    copies_ = std::clamp<int64_t>(spec_.working_set / launch_bytes, 1, kMostLaunches);
    const int64_t rows = copies_ * spec_.tokens;
    const int64_t blocks = (rows + spec_.block_size - 1) / spec_.block_size;
    check(blocks * spec_.block_size <= std::numeric_limits<int32_t>::max(), kWhere, "tokens is ",
          spec_.tokens, ", too many");
    rows_ = filled(rows * shape.qkv_cols() * size, spec_.dtype);
    make_cache(static_cast<int32_t>(blocks));

    // Blocks are mixed, as they are in a cache that has been used for a while.
    std::vector<int32_t> order(static_cast<size_t>(blocks));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(0));
    std::vector<int32_t> slots(static_cast<size_t>(rows)), positions(slots.size());
    for (int64_t t = 0; t < rows; ++t) {
      slots[static_cast<size_t>(t)] =
          order[static_cast<size_t>(t / spec_.block_size)] * spec_.block_size +
          static_cast<int32_t>(t % spec_.block_size);
      positions[static_cast<size_t>(t)] = static_cast<int32_t>(t % kPositions);
    }
    slots_ = copied(slots.data(), slots.size() * sizeof(int32_t));
    positions_ = copied(positions.data(), positions.size() * sizeof(int32_t));
    const std::vector<float> angles(static_cast<size_t>(kPositions) * shape.head_dim, 0.70710678f);
    rope_ = copied(angles.data(), angles.size() * sizeof(float));
    if (device_->type() == DeviceType::kCuda) {
      flushed_words_ = spec_.working_set / static_cast<int64_t>(sizeof(uint64_t));
      flushed_ = device_->allocate(static_cast<size_t>(spec_.working_set), kWhere);
    }
  }

  // Seconds of a launch (of two, if they are separate) in each of `repeats` runs. part: "write",
  // "rope_write" in one launch or in "separate" ones. Launches overlap as those of a step, or wait
  // for the one before as single ops do.
  std::vector<double> time(const std::string& part, int32_t repeats, bool overlap) {
    check(part == "write" || part == "rope_write" || part == "separate", kWhere, "part = '", part,
          "': must be write, rope_write or separate");
    const int64_t launches = std::max(copies_, kLeastLaunches);
    const auto run = [&] {
      for (int64_t i = 0; i < launches; ++i) launch(part, i % copies_, overlap);
    };
    std::unique_ptr<Graph> graph;
    run_on_stream(*device_, [&] {
      run();
      graph = device_->capture(run);
    });
    std::vector<double> seconds;
    for (int32_t i = 0; i < repeats; ++i) {
      run_on_stream(*device_, [&] { seconds.push_back(seconds_of(*graph) / launches); });
    }
    return seconds;
  }

 private:
  Buffer filled(int64_t bytes, DType dtype) {
    Buffer buffer = device_->allocate(static_cast<size_t>(bytes), kWhere);
    fill_random(*device_, {buffer.data(), dtype, bytes / static_cast<int64_t>(dtype_size(dtype)), 1,
                           0, 0.0f, 1.0f});
    return buffer;
  }

  Buffer copied(const void* data, size_t bytes) {
    Buffer buffer = device_->allocate(bytes, kWhere);
    device_->copy_in(buffer.data(), data, bytes);
    return buffer;
  }

  void make_cache(int32_t blocks) {
    const HeadShape& shape = spec_.shape;
    cache_ = kv_cache_layer(spec_.cache_dtype, blocks, spec_.block_size, shape, spec_.scales);
    if (!spec_.heads_first) {
      cache_.head_stride = shape.head_dim;
      cache_.token_stride = int64_t{shape.num_kv_heads} * shape.head_dim;
      if (spec_.scales == KvScaleKind::kToken) {
        cache_.scales.head_stride = 1;
        cache_.scales.token_stride = shape.num_kv_heads;
      }
    }
    for (void** side : {&cache_.key, &cache_.value}) {
      sides_.push_back(device_->allocate(static_cast<size_t>(cache_.bytes()), kWhere));
      *side = sides_.back().data();
    }
    if (spec_.scales == KvScaleKind::kNone) return;
    const std::vector<float> scales(spec_.scales == KvScaleKind::kToken
                                        ? static_cast<size_t>(cache_.scale_bytes()) / 4
                                        : static_cast<size_t>(shape.num_kv_heads),
                                    kStaticScale);
    for (float** side : {&cache_.scales.key, &cache_.scales.value}) {
      sides_.push_back(copied(scales.data(), scales.size() * sizeof(float)));
      *side = static_cast<float*>(sides_.back().data());
    }
  }

  void launch(const std::string& part, int64_t copy, bool overlap) {
    const HeadShape& shape = spec_.shape;
    const int64_t first = copy * spec_.tokens;
    StepContext ctx;
    ctx.device = device_.get();
    ctx.pool = device_->pool();
    ctx.stream = device_->stream();
    ctx.overlap_launches = overlap;
    ctx.sizes.num_tokens = spec_.tokens;
    ctx.infer.positions = static_cast<int32_t*>(positions_.data()) + first;
    const SlotMapping slots{static_cast<int32_t*>(slots_.data()) + first, false};
    const auto size = static_cast<int64_t>(dtype_size(spec_.dtype));
    char* rows = static_cast<char*>(rows_.data()) + first * shape.qkv_cols() * size;
    const Kernels& kernels = device_->kernels();
    if (part != "write") {
      QkvPrepareParams params{};
      params.qkv = params.out = rows;
      params.shape = shape;
      params.dtype = spec_.dtype;
      params.rope = static_cast<const float*>(rope_.data());
      params.rope_pairs = shape.head_dim / 2;
      params.max_position = kPositions;
      if (part == "rope_write") {
        params.cache = &cache_;
        params.slots = slots;
      }
      kernels.qkv_prepare(params, ctx);
      if (part == "rope_write") return;
    }
    // Keys and values apart, as others call the op, or where a model has them.
    const int64_t kv_cols = int64_t{shape.num_kv_heads} * shape.head_dim;
    const bool packed = part == "separate";
    CacheWriteParams params{};
    params.key = packed ? rows + shape.q_cols() * size : rows;
    params.value =
        static_cast<const char*>(params.key) + (packed ? kv_cols : spec_.tokens * kv_cols) * size;
    params.key_stride = params.value_stride = packed ? shape.qkv_cols() : kv_cols;
    params.dtype = spec_.dtype;
    params.cache = &cache_;
    params.slots = slots;
    kernels.cache_write(params, ctx);
  }

  double seconds_of(const Graph& graph) {
    if (device_->type() == DeviceType::kCuda) {
      // Of what runs before, nothing is in the caches.
      cuda::fill_words(*device_, static_cast<uint64_t*>(flushed_.data()), flushed_words_);
      return cuda::time_launches(*device_, [&] { device_->launch(graph); });
    }
    const auto start = std::chrono::steady_clock::now();
    device_->launch(graph);
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    return elapsed.count();
  }

  std::shared_ptr<Device> device_;  // outlives the buffers
  Spec spec_;
  int64_t copies_ = 1;
  KvCacheLayer cache_;
  Buffer rows_, slots_, positions_, rope_, flushed_;
  int64_t flushed_words_ = 0;
  std::vector<Buffer> sides_;
};

struct CacheWriteProbeHandle : Handle<CacheWriteProbe> {
  using Handle::Handle;
};

CacheWriteProbe::Spec checked_spec(int32_t tokens, int32_t num_heads, int32_t num_kv_heads,
                                   int32_t head_dim, const std::string& dtype,
                                   const std::string& kv_cache_dtype, const std::string& scale,
                                   const std::string& layout, int32_t block_size,
                                   int64_t working_set) {
  const auto in_range = [](int64_t value, const char* name, int64_t limit) {
    check(value > 0 && value <= limit, kWhere, name, " is ", value, "; must be in [1, ", limit,
          "]");
  };
  in_range(tokens, "tokens", 1 << 24);
  in_range(num_heads, "num_heads", kMaxHeads);
  in_range(num_kv_heads, "num_kv_heads", kMaxHeads);
  in_range(head_dim, "head_dim", kMaxHeadDim);
  in_range(block_size, "block_size", 4096);
  check(working_set >= 1 << 20, kWhere, "working_set is ", working_set, "; must be at least 2**20");
  check(layout == "NHD" || layout == "HND", kWhere, "layout = '", layout, "': must be NHD or HND");
  CacheWriteProbe::Spec spec;
  spec.tokens = tokens;
  spec.shape = {num_heads, num_kv_heads, head_dim};
  spec.dtype = spec.cache_dtype = dtype_from_name(dtype);
  spec.heads_first = layout == "HND";
  spec.block_size = block_size;
  spec.working_set = working_set;
  if (kv_cache_dtype == "auto") {
    check(scale == "none", kWhere, "scale = '", scale, "': must be none for a cache of no FP8");
    return spec;
  }
  check(kv_cache_dtype == "fp8_e4m3" || kv_cache_dtype == "fp8_e5m2", kWhere, "kv_cache_dtype = '",
        kv_cache_dtype, "': must be auto, fp8_e4m3 or fp8_e5m2");
  check(scale == "static" || scale == "dynamic", kWhere, "scale = '", scale,
        "': must be static or dynamic for FP8");
  spec.cache_dtype = kv_cache_dtype == "fp8_e4m3" ? DType::kE4M3 : DType::kE5M2;
  spec.scales = scale == "static" ? KvScaleKind::kTensor : KvScaleKind::kToken;
  return spec;
}

}  // namespace

void bind_cache_write_probe(nb::module_& m) {
  nb::class_<CacheWriteProbeHandle>(
      m, "CacheWriteProbe",
      "Rows of keys and values and a paged cache to write them to: measures what that takes.\n\n"
      "Every launch of a run has rows and slots of its own, as long as `working_set` bytes, or "
      "256\n"
      "launches, allow.\n\n"
      "Args:\n"
      "    device: Where.\n"
      "    tokens: Of a launch.\n"
      "    num_heads: Query heads, which a rotary embedding turns too.\n"
      "    num_kv_heads: Heads of the cache.\n"
      "    head_dim: A multiple of 8 up to 256.\n"
      "    dtype: Of the rows, \"float32\" or \"bfloat16\".\n"
      "    kv_cache_dtype: \"auto\", \"fp8_e4m3\" or \"fp8_e5m2\".\n"
      "    scale: \"none\", or of FP8 \"static\" for one, \"dynamic\" for one a token and head.\n"
      "    layout: \"NHD\" or \"HND\": what lies between blocks and elements.\n"
      "    block_size: Tokens of a block.\n"
      "    working_set: Bytes.\n\n"
      "Raises:\n"
      "    InvalidArgumentError: something is not what it must be.\n"
      "    OutOfMemoryError: less memory is free.")
      .def(
          "__init__",
          [](CacheWriteProbeHandle* self, const DeviceHandle& device, int32_t tokens,
             int32_t num_heads, int32_t num_kv_heads, int32_t head_dim, const std::string& dtype,
             const std::string& kv_cache_dtype, const std::string& scale, const std::string& layout,
             int32_t block_size, int64_t working_set) {
            const CacheWriteProbe::Spec spec =
                checked_spec(tokens, num_heads, num_kv_heads, head_dim, dtype, kv_cache_dtype,
                             scale, layout, block_size, working_set);
            new (self) CacheWriteProbeHandle(
                std::make_shared<CacheWriteProbe>(device.share(), spec), "cache write probe");
          },
          nb::arg("device"), nb::arg("tokens"), nb::arg("num_heads"), nb::arg("num_kv_heads"),
          nb::arg("head_dim"), nb::arg("dtype"), nb::arg("kv_cache_dtype") = "auto",
          nb::arg("scale") = "none", nb::arg("layout") = "HND", nb::arg("block_size") = 16,
          nb::arg("working_set") = int64_t{1} << 26, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "time",
          [](const CacheWriteProbeHandle& self, const std::string& part, int32_t repeats,
             bool overlap) { return self->time(part, repeats, overlap); },
          nb::arg("part"), nb::arg("repeats"), nb::arg("overlap") = true,
          nb::call_guard<nb::gil_scoped_release>(),
          "Seconds of a launch in each of several runs: \"write\", \"rope_write\" in one launch,\n"
          "or both in \"separate\" ones. On a GPU launches overlap as in a step, or wait for each\n"
          "other as single ops do. A run on a GPU is one graph of 8 launches or more, timed "
          "by\n"
          "the GPU's clock, with nothing in its caches before.")
      .def("close", &CacheWriteProbeHandle::close);
}

}  // namespace mrv1
