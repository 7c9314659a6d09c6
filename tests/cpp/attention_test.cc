// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>

#include "ops/workspace_cpu.h"
#include "ops_test_support.h"

namespace mrv1::test {
namespace {

const float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Config {
  HeadShape shape;
  int block_size = 16;
  int window = 0;
  float softcap = 0.0f;
  DType cache_dtype = DType::kI32;  // kI32: as the queries
  KvScaleKind scales = KvScaleKind::kNone;
};

// Requests with their histories in a paged cache whose blocks are dealt out in a scattered order.
// Every element that no request owns is NaN.
class Scene {
 public:
  Scene(DType dtype, const Config& config, std::vector<int> lengths, uint32_t seed)
      : dtype_(dtype), config_(config), lengths_(std::move(lengths)) {
    const int longest = *std::max_element(lengths_.begin(), lengths_.end());
    max_blocks_ = (longest + config.block_size - 1) / config.block_size + 1;
    const int rows = static_cast<int>(lengths_.size());
    const int num_blocks = rows * max_blocks_ + 1;
    const DType cache_dtype = config.cache_dtype == DType::kI32 ? dtype : config.cache_dtype;
    cache_ =
        kv_cache_layer(cache_dtype, num_blocks, config.block_size, config.shape, config.scales);
    const int64_t size = cache_.block_stride * num_blocks;
    key_ = Tensor(cache_dtype, size);
    value_ = Tensor(cache_dtype, size);
    key_.fill(kNaN);
    value_.fill(kNaN);
    cache_.key = key_.data();
    cache_.value = value_.data();
    const KvScales& scales = cache_.scales;
    const int64_t per_block = std::max<int64_t>(scales.block_stride, config.shape.num_kv_heads);
    key_scales_.assign(static_cast<size_t>(per_block * num_blocks), kNaN);
    value_scales_ = key_scales_;
    cache_.scales.key = key_scales_.data();
    cache_.scales.value = value_scales_.data();
    for (int h = 0; scales.kind != KvScaleKind::kToken && h < config.shape.num_kv_heads; ++h) {
      const auto at = static_cast<size_t>(scales.index(0, 0, h));
      key_scales_[at] = 0.011f * static_cast<float>(1 + at);
      value_scales_[at] = 0.007f * static_cast<float>(1 + at);
    }

    // Group 0's table is left unset: group 1 is the one in use.
    tables_.assign(static_cast<size_t>(2 * rows * max_blocks_), 0);
    std::vector<int32_t> free_blocks;
    for (int b = 1; b < num_blocks; ++b) free_blocks.push_back(b);
    std::shuffle(free_blocks.begin(), free_blocks.end(), std::mt19937(seed));
    for (int row = 0; row < rows; ++row) {
      const int length = lengths_[static_cast<size_t>(row)];
      for (int b = 0; b * config.block_size < length; ++b) {
        tables_[static_cast<size_t>((rows + row) * max_blocks_ + b)] = free_blocks.back();
        free_blocks.pop_back();
      }
      qkv_.push_back(random_tensor(dtype, int64_t{length} * config.shape.qkv_cols(),
                                   seed + 1 + static_cast<uint32_t>(row)));
      for (int p = 0; p < length; ++p) {
        for (int h = 0; h < config.shape.num_kv_heads; ++h) {
          const int key_head = config.shape.num_heads + h;
          write_head(row, p, h, column(p, key_head), key_, key_scales_);
          write_head(row, p, h, column(p, key_head + config.shape.num_kv_heads), value_,
                     value_scales_);
        }
      }
    }
  }

  struct Part {
    int row, begin, end;  // a row of -1 is padding
  };

  // Attention of the parts' tokens in one batch: [tokens, q_cols].
  Tensor run(const std::vector<Part>& parts, int num_threads = 2) {
    std::vector<int32_t> token_batch, positions, batch_row;
    for (const Part& part : parts) {
      for (int p = part.begin; p < part.end; ++p) {
        token_batch.push_back(part.row < 0 ? -1 : static_cast<int32_t>(batch_row.size()));
        positions.push_back(part.row < 0 ? 0 : p);
      }
      batch_row.push_back(part.row);
    }
    const int64_t cols = config_.shape.qkv_cols();
    Tensor qkv(dtype_, static_cast<int64_t>(positions.size()) * cols);
    qkv.fill(kNaN);
    int64_t token = 0;
    for (const Part& part : parts) {
      for (int p = part.begin; p < part.end; ++p, ++token) {
        if (part.row < 0) continue;
        const Tensor& source = qkv_[static_cast<size_t>(part.row)];
        std::memcpy(qkv.at(token * cols), source.at(p * cols),
                    static_cast<size_t>(config_.shape.q_cols()) * dtype_size(dtype_));
      }
    }
    WorkspaceLimits limits{};
    limits.head_dim = config_.shape.head_dim;
    limits.num_threads = num_threads;
    Step step(static_cast<int>(positions.size()), num_threads,
              static_cast<size_t>(paged_attention_workspace_cpu(limits)));
    step.ctx.sizes.num_requests = static_cast<int32_t>(parts.size());
    step.ctx.infer.token_batch = token_batch.data();
    step.ctx.infer.positions = positions.data();
    step.ctx.infer.row = batch_row.data();
    step.ctx.rows.num_rows = static_cast<int32_t>(lengths_.size());
    step.ctx.rows.num_groups = 2;
    step.ctx.rows.block_size = config_.block_size;
    step.ctx.rows.max_blocks = max_blocks_;
    step.ctx.rows.block_table = tables_.data();
    Tensor out(dtype_, static_cast<int64_t>(positions.size()) * config_.shape.q_cols());
    out.fill(kNaN);
    paged_attention_cpu({qkv.data(), out.data(), config_.shape, dtype_, scale(), config_.window,
                         config_.softcap, &cache_, 1, nullptr},
                        step.ctx);
    return out;
  }

  // Compares one token's row of `out` with float64.
  void check_token(const Tensor& out, int64_t out_token, int row, int position) const {
    const HeadShape& shape = config_.shape;
    const int dim = shape.head_dim;
    const Tensor& qkv = qkv_[static_cast<size_t>(row)];
    const auto element = [&](const Tensor& side, const std::vector<float>& scales, int p, int h,
                             int i) {
      return double{side.get(index(row, p, h) + i)} * scale_of(scales, row, p, h);
    };
    const int first = config_.window > 0 ? std::max(0, position - config_.window + 1) : 0;
    for (int h = 0; h < shape.num_heads; ++h) {
      const int kv_head = h / (shape.num_heads / shape.num_kv_heads);
      std::vector<double> scores;
      for (int p = first; p <= position; ++p) {
        double score = 0.0;
        for (int i = 0; i < dim; ++i) {
          score +=
              double{qkv.get(column(position, h) + i)} * element(key_, key_scales_, p, kv_head, i);
        }
        score *= scale();
        if (config_.softcap > 0.0f) score = config_.softcap * std::tanh(score / config_.softcap);
        scores.push_back(score);
      }
      const double highest = *std::max_element(scores.begin(), scores.end());
      double sum = 0.0;
      for (double& score : scores) sum += score = std::exp(score - highest);
      for (int i = 0; i < dim; ++i) {
        double expected = 0.0, magnitude = 0.0;
        for (int p = first; p <= position; ++p) {
          const double term = scores[static_cast<size_t>(p - first)] / sum *
                              element(value_, value_scales_, p, kv_head, i);
          expected += term;
          magnitude += std::abs(term);
        }
        const double got = out.get(out_token * shape.q_cols() + h * dim + i);
        REQUIRE(std::abs(got - expected) <=
                magnitude * 2e-5 + std::abs(expected) * unit_roundoff(dtype_) * 1.01);
      }
    }
  }

  Tensor& key() { return key_; }
  Tensor& value() { return value_; }
  KvCacheLayer& cache() { return cache_; }
  int64_t index(int row, int position, int kv_head) const {
    return block(row, position) * cache_.block_stride +
           position % config_.block_size * cache_.token_stride + kv_head * cache_.head_stride;
  }

 private:
  int32_t block(int row, int position) const {
    const auto rows = static_cast<int>(lengths_.size());
    return tables_[static_cast<size_t>((rows + row) * max_blocks_ + position / config_.block_size)];
  }
  size_t scale_index(int row, int position, int kv_head) const {
    return static_cast<size_t>(
        cache_.scales.index(block(row, position), position % config_.block_size, kv_head));
  }
  double scale_of(const std::vector<float>& scales, int row, int position, int kv_head) const {
    if (config_.scales == KvScaleKind::kNone) return 1.0;
    return double{scales[scale_index(row, position, kv_head)]};
  }
  // A head of qkv to the cache, as the contract of KvScales has it.
  void write_head(int row, int position, int kv_head, int64_t from, Tensor& side,
                  std::vector<float>& scales) {
    const Tensor& qkv = qkv_.back();
    float inverse = 1.0f;
    if (config_.scales != KvScaleKind::kNone) {
      float& scale = scales[scale_index(row, position, kv_head)];
      if (config_.scales == KvScaleKind::kToken) {
        float highest = 0.0f;
        for (int i = 0; i < config_.shape.head_dim; ++i) {
          highest = std::max(highest, std::abs(qkv.get(from + i)));
        }
        const float most = side.dtype() == DType::kE4M3 ? Float8E4M3::kMax : Float8E5M2::kMax;
        scale = std::max(highest / most, kMinKvScale);
      }
      inverse = 1.0f / scale;
    }
    for (int i = 0; i < config_.shape.head_dim; ++i) {
      side.set(index(row, position, kv_head) + i, qkv.get(from + i) * inverse);
    }
  }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(config_.shape.head_dim)); }
  int64_t column(int position, int head) const {
    return int64_t{position} * config_.shape.qkv_cols() + int64_t{head} * config_.shape.head_dim;
  }

  DType dtype_;
  Config config_;
  std::vector<int> lengths_;
  int max_blocks_ = 0;
  KvCacheLayer cache_;
  Tensor key_, value_;
  std::vector<float> key_scales_, value_scales_;
  std::vector<int32_t> tables_;
  std::vector<Tensor> qkv_;
};

const Config kConfigs[] = {
    {{4, 2, 128}, 16, 0},
    {{3, 1, 64}, 16, 0},
    {{2, 2, 40}, 16, 0},
    {{8, 1, 256}, 32, 0},
    {{6, 2, 8}, 8, 0},
    {{4, 2, 32}, 16, 50},
    {{2, 1, 24}, 16, 1},
    {{70, 1, 16}, 16, 0},
    {{2, 1, 72}, 1, 70},
    {{4, 2, 96}, 16, 0, 2.0f},
    {{2, 1, 80}, 16, 33, 50.0f},
    {{4, 2, 128}, 16, 0, 0.0f, DType::kE4M3, KvScaleKind::kToken},
    {{4, 2, 40}, 16, 50, 2.0f, DType::kE4M3, KvScaleKind::kHead},
    {{6, 2, 8}, 8, 0, 0.0f, DType::kE4M3, KvScaleKind::kTensor},
    {{3, 1, 64}, 16, 20, 0.0f, DType::kE5M2, KvScaleKind::kToken},
    {{70, 1, 24}, 1, 0, 0.0f, DType::kE5M2, KvScaleKind::kTensor},
};

TEST_CASE("paged attention agrees with float64, and whole, chunked and decoded prompts are equal") {
  for (CpuIsa isa : supported_isas()) {
    const IsaScope scope(isa);
    CAPTURE(cpu_isa_name(isa));
    for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
      for (const Config& config : kConfigs) {
        CAPTURE(config.shape.num_heads);
        CAPTURE(config.shape.head_dim);
        CAPTURE(config.window);
        const std::vector<int> lengths = {150, 1, 67};
        Scene scene(dtype, config, lengths, 20);
        const int64_t cols = config.shape.q_cols();
        // A batch with padding in its middle and at its end.
        const Tensor whole =
            scene.run({{0, 0, 150}, {1, 0, 1}, {-1, 0, 3}, {2, 0, 67}, {-1, 0, 40}});
        const int edges[] = {0, 1, 15, 16, 62, 63, 64, 65, 100, 127, 128, 149};
        for (int p : edges) scene.check_token(whole, p, 0, p);
        scene.check_token(whole, 150, 1, 0);
        for (int p = 0; p < 67; p += 6) scene.check_token(whole, 154 + p, 2, p);
        for (int64_t t : {151, 152, 153, 221, 260}) {
          for (int64_t c = 0; c < cols; ++c) REQUIRE(whole.get(t * cols + c) == 0.0f);
        }

        const auto check_part = [&](int begin, int end) {
          const Tensor part = scene.run({{2, 66, 67}, {0, begin, end}}, 1 + begin % 3);
          REQUIRE(part.same_bits(whole, cols, begin * cols, (end - begin) * cols));
          REQUIRE(part.same_bits(whole, 0, (154 + 66) * cols, cols));
        };
        for (int p : edges) check_part(p, p + 1);
        for (int chunk : {7, 64}) {
          for (int begin = 0; begin < 150; begin += chunk) {
            check_part(begin, std::min(begin + chunk, 150));
          }
        }
      }
    }
  }
}

TEST_CASE("paged attention does not let a NaN reach tokens that do not see it") {
  const Config config{{4, 2, 64}, 16, 20};
  for (CpuIsa isa : supported_isas()) {
    const IsaScope scope(isa);
    CAPTURE(cpu_isa_name(isa));
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      Scene scene(dtype, config, {100}, 30);
      const Tensor clean = scene.run({{0, 0, 100}});
      for (int64_t i = 0; i < 64; ++i) {
        scene.key().set(scene.index(0, 40, 0) + i, kNaN);
        scene.value().set(scene.index(0, 70, 1) + i, kNaN);
      }
      const Tensor out = scene.run({{0, 0, 100}});
      for (int64_t p = 0; p < 100; ++p) {
        for (int64_t h = 0; h < 4; ++h) {
          const int64_t at = p * config.shape.q_cols() + h * 64;
          const int64_t bad = h < 2 ? 40 : 70;
          if (p >= bad && p < bad + 20) {
            REQUIRE(std::isnan(out.get(at)));
          } else {
            REQUIRE(out.same_bits(clean, at, at, 64));
          }
        }
      }
    }
  }
}

TEST_CASE("paged attention reads every FP8 code as the value it stands for") {
  // One position that is seen: the output is its value.
  for (CpuIsa isa : supported_isas()) {
    const IsaScope scope(isa);
    CAPTURE(cpu_isa_name(isa));
    for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
      for (DType cache : {DType::kE4M3, DType::kE5M2}) {
        const Config config{{1, 1, 256}, 16, 0, 0.0f, cache, KvScaleKind::kTensor};
        Scene scene(dtype, config, {1}, 3);
        scene.cache().scales.value[0] = 0.25f;
        auto* codes = reinterpret_cast<uint8_t*>(scene.value().at(scene.index(0, 0, 0)));
        for (int i = 0; i < 256; ++i) codes[i] = static_cast<uint8_t>(i);
        const Tensor out = scene.run({{0, 0, 1}});
        for (int i = 0; i < 256; ++i) {
          CAPTURE(i);
          Tensor expected(dtype, 1);
          const float value = scene.value().get(scene.index(0, 0, 0) + i);
          expected.set(0, value * 0.25f);
          if (std::isnan(value)) {
            REQUIRE(std::isnan(out.get(i)));
          } else {
            REQUIRE(out.get(i) == expected.get(0));
          }
        }
      }
    }
  }
}

TEST_CASE("paged attention refuses arguments that do not fit") {
  Scene good(DType::kF32, {{2, 1, 8}, 16, 0}, {4}, 1);
  static_cast<void>(good.run({{0, 0, 4}}));
  Scene dtype(DType::kF32, {{2, 1, 8}, 16, 0}, {4}, 1);
  dtype.cache().dtype = DType::kBF16;
  CHECK_THROWS_AS(dtype.run({{0, 0, 4}}), Error);
  Scene unscaled(DType::kF32, {{2, 1, 8}, 16, 0, 0.0f, DType::kE4M3, KvScaleKind::kToken}, {4}, 1);
  unscaled.cache().scales.kind = KvScaleKind::kNone;
  CHECK_THROWS_AS(unscaled.run({{0, 0, 4}}), Error);
  Scene scaled(DType::kF32, {{2, 1, 8}, 16, 0}, {4}, 1);
  scaled.cache().scales.kind = KvScaleKind::kTensor;
  CHECK_THROWS_AS(scaled.run({{0, 0, 4}}), Error);
  Scene heads(DType::kF32, {{3, 1, 8}, 16, 0}, {4}, 1);
  heads.cache().num_kv_heads = 2;
  CHECK_THROWS_AS(heads.run({{0, 0, 4}}), Error);
  Scene dim(DType::kF32, {{2, 1, 12}, 16, 0}, {4}, 1);
  CHECK_THROWS_AS(dim.run({{0, 0, 4}}), Error);
  Scene block(DType::kF32, {{2, 1, 8}, 16, 0}, {4}, 1);
  block.cache().block_size = 8;
  CHECK_THROWS_AS(block.run({{0, 0, 4}}), Error);
}

}  // namespace
}  // namespace mrv1::test
