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
};

// Requests with their histories in a paged cache whose blocks are dealt out in a scattered order.
// Every element that no request owns is NaN.
class Scene {
 public:
  Scene(DType dtype, const Config& config, std::vector<int> lengths, uint32_t seed)
      : dtype_(dtype), config_(config), lengths_(std::move(lengths)) {
    const int dim = config.shape.head_dim;
    const int longest = *std::max_element(lengths_.begin(), lengths_.end());
    max_blocks_ = (longest + config.block_size - 1) / config.block_size + 1;
    const int rows = static_cast<int>(lengths_.size());
    const int num_blocks = rows * max_blocks_ + 1;
    cache_.dtype = dtype;
    cache_.num_blocks = num_blocks;
    cache_.block_size = config.block_size;
    cache_.num_kv_heads = config.shape.num_kv_heads;
    cache_.head_dim = dim;
    cache_.token_stride = dim;
    cache_.head_stride = int64_t{dim} * config.block_size;
    cache_.block_stride = cache_.head_stride * config.shape.num_kv_heads;
    const int64_t size = cache_.block_stride * num_blocks;
    key_ = Tensor(dtype, size);
    value_ = Tensor(dtype, size);
    key_.fill(kNaN);
    value_.fill(kNaN);
    cache_.key = key_.data();
    cache_.value = value_.data();

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
          for (int i = 0; i < dim; ++i) {
            const int64_t at = index(row, p, h) + i;
            key_.set(at, qkv_.back().get(column(p, config.shape.num_heads + h) + i));
            value_.set(at,
                       qkv_.back().get(
                           column(p, config.shape.num_heads + config.shape.num_kv_heads + h) + i));
          }
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
    const int first = config_.window > 0 ? std::max(0, position - config_.window + 1) : 0;
    for (int h = 0; h < shape.num_heads; ++h) {
      const int kv_head = h / (shape.num_heads / shape.num_kv_heads);
      std::vector<double> scores;
      for (int p = first; p <= position; ++p) {
        double score = 0.0;
        for (int i = 0; i < dim; ++i) {
          score += double{qkv.get(column(position, h) + i)} *
                   double{qkv.get(column(p, shape.num_heads + kv_head) + i)};
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
          const double term =
              scores[static_cast<size_t>(p - first)] / sum *
              double{qkv.get(column(p, shape.num_heads + shape.num_kv_heads + kv_head) + i)};
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
    const auto rows = static_cast<int>(lengths_.size());
    const int32_t block =
        tables_[static_cast<size_t>((rows + row) * max_blocks_ + position / config_.block_size)];
    return block * cache_.block_stride + position % config_.block_size * cache_.token_stride +
           kv_head * cache_.head_stride;
  }

 private:
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
  std::vector<int32_t> tables_;
  std::vector<Tensor> qkv_;
};

const Config kConfigs[] = {
    {{4, 2, 128}, 16, 0},      {{3, 1, 64}, 16, 0},         {{2, 2, 40}, 16, 0},
    {{8, 1, 256}, 32, 0},      {{6, 2, 8}, 8, 0},           {{4, 2, 32}, 16, 50},
    {{2, 1, 24}, 16, 1},       {{70, 1, 16}, 16, 0},        {{2, 1, 72}, 1, 70},
    {{4, 2, 96}, 16, 0, 2.0f}, {{2, 1, 80}, 16, 33, 50.0f},
};

TEST_CASE("paged attention agrees with float64, and whole, chunked and decoded prompts are equal") {
  for (CpuIsa isa : supported_isas()) {
    const IsaScope scope(isa);
    CAPTURE(cpu_isa_name(isa));
    for (DType dtype : {DType::kF32, DType::kBF16}) {
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
        for (int p : {0, 1, 15, 16, 62, 63, 64, 65, 100, 127, 128, 149}) {
          scene.check_token(whole, p, 0, p);
        }
        scene.check_token(whole, 150, 1, 0);
        for (int p = 0; p < 67; ++p) scene.check_token(whole, 154 + p, 2, p);
        for (int64_t t : {151, 152, 153, 221, 260}) {
          for (int64_t c = 0; c < cols; ++c) REQUIRE(whole.get(t * cols + c) == 0.0f);
        }

        for (int chunk : {1, 7, 64}) {
          for (int begin = 0; begin < 150; begin += chunk) {
            const int end = std::min(begin + chunk, 150);
            const Tensor part = scene.run({{2, 66, 67}, {0, begin, end}}, 1 + begin % 3);
            REQUIRE(part.same_bits(whole, cols, begin * cols, (end - begin) * cols));
            REQUIRE(part.same_bits(whole, 0, (154 + 66) * cols, cols));
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

TEST_CASE("paged attention refuses arguments that do not fit") {
  Scene good(DType::kF32, {{2, 1, 8}, 16, 0}, {4}, 1);
  static_cast<void>(good.run({{0, 0, 4}}));
  Scene dtype(DType::kF32, {{2, 1, 8}, 16, 0}, {4}, 1);
  dtype.cache().dtype = DType::kBF16;
  CHECK_THROWS_AS(dtype.run({{0, 0, 4}}), Error);
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
