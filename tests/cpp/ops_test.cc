// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <limits>
#include <utility>

#include "ops_test_support.h"

namespace mrv1::test {
namespace {

constexpr DType kDTypes[] = {DType::kF32, DType::kBF16};
const float kNaN = std::numeric_limits<float>::quiet_NaN();
const float kInf = std::numeric_limits<float>::infinity();

// A row-major [rows, cols] matrix and its packed copy.
struct Weight {
  Weight(DType dtype, int64_t rows, int64_t cols, uint32_t seed)
      : source(random_tensor(dtype, rows * cols, seed)),
        packed(static_cast<size_t>(weight_bytes(dtype, WeightLayout::kPanel16, rows, cols))),
        view{packed.data(), dtype, WeightLayout::kPanel16, rows, cols} {
    ThreadPool pool(1);
    pack_panels(view, packed.data(), source.data(), dtype, 0, rows, pool);
  }
  Tensor source;
  std::vector<char> packed;
  WeightView view;
};

Tensor run_linear(const Tensor& x, const Weight& weight, const float* bias, int64_t rows,
                  DType out_dtype, Activation activation = Activation::kNone, int num_threads = 2) {
  Step step(static_cast<int>(rows), num_threads);
  const int64_t cols = activation != Activation::kNone ? weight.view.rows / 2 : weight.view.rows;
  Tensor out(out_dtype, rows * cols);
  out.fill(kNaN);
  linear_cpu(
      {x.data(), weight.view, bias, out.data(), x.dtype(), out_dtype, activation, false, false},
      step.ctx);
  return out;
}

TEST_CASE("linear agrees with float64") {
  struct Shape {
    int64_t rows, out, in;
  };
  const Shape shapes[] = {{1, 1, 1},     {1, 16, 2},    {3, 17, 7},   {2, 40, 65},
                          {5, 100, 128}, {7, 130, 33},  {12, 64, 96}, {13, 70, 51},
                          {50, 48, 64},  {200, 33, 40}, {17, 30, 32}, {81, 49, 320}};
  for (CpuIsa isa : supported_isas()) {
    const IsaScope scope(isa);
    CAPTURE(cpu_isa_name(isa));
    for (DType dtype : kDTypes) {
      for (DType out_dtype : kDTypes) {
        if (out_dtype != dtype && out_dtype != DType::kF32) continue;
        for (const Shape& shape : shapes) {
          CAPTURE(shape.rows);
          CAPTURE(shape.out);
          CAPTURE(shape.in);
          const Weight weight(dtype, shape.out, shape.in, 1);
          const Tensor x = random_tensor(dtype, shape.rows * shape.in, 2);
          const std::vector<float> bias = random_floats(shape.out, 3);
          const float* biases[] = {nullptr, bias.data()};
          for (const float* b : biases) {
            const Tensor out = run_linear(x, weight, b, shape.rows, out_dtype);
            for (int64_t r = 0; r < shape.rows; ++r) {
              for (int64_t n = 0; n < shape.out; ++n) {
                double sum = b == nullptr ? 0.0 : b[n];
                double magnitude = std::abs(sum);
                for (int64_t k = 0; k < shape.in; ++k) {
                  const double product =
                      double{x.get(r * shape.in + k)} * double{weight.source.get(n * shape.in + k)};
                  sum += product;
                  magnitude += std::abs(product);
                }
                const double tolerance =
                    magnitude * static_cast<double>(shape.in + 2) * std::ldexp(1.0, -24) +
                    std::abs(sum) * unit_roundoff(out_dtype) * 1.01;
                REQUIRE(std::abs(out.get(r * shape.out + n) - sum) <= tolerance);
              }
            }
          }
        }
      }
    }
  }
}

TEST_CASE("linear gives a row the same bits in any batch and on any number of threads") {
  constexpr int64_t kRows = 230, kOut = 208;
  for (CpuIsa isa : supported_isas()) {
    const IsaScope scope(isa);
    CAPTURE(cpu_isa_name(isa));
    for (DType dtype : kDTypes) {
      for (int64_t in : {77, 96}) {
        const Weight weight(dtype, kOut, in, 4);
        const Tensor x = random_tensor(dtype, kRows * in, 5);
        const Tensor all = run_linear(x, weight, nullptr, kRows, dtype);
        CHECK(run_linear(x, weight, nullptr, kRows, dtype, Activation::kNone, 1) == all);
        CHECK(run_linear(x, weight, nullptr, kRows, dtype, Activation::kNone, 3) == all);
        for (int64_t rows = 1; rows <= 64; ++rows) {
          CAPTURE(rows);
          const int64_t first = kRows - rows;
          Tensor part(dtype, rows * in);
          std::memcpy(part.data(), x.at(first * in),
                      static_cast<size_t>(part.at(part.count()) - part.at(0)));
          const Tensor out = run_linear(part, weight, nullptr, rows, dtype);
          REQUIRE(out.same_bits(all, 0, first * kOut, rows * kOut));
        }
      }
    }
  }
}

TEST_CASE("linear with an activation equals linear and gated_mul bit for bit") {
  for (CpuIsa isa : supported_isas()) {
    const IsaScope scope(isa);
    CAPTURE(cpu_isa_name(isa));
    for (DType dtype : kDTypes) {
      for (auto [half, in] :
           {std::pair<int64_t, int64_t>{16, 50}, {16, 64}, {48, 64}, {80, 50}, {80, 96}}) {
        for (int64_t rows : {1, 6, 9, 60, 250}) {
          const Weight weight(dtype, 2 * half, in, 6);
          const Tensor x = random_tensor(dtype, rows * in, 7);
          const std::vector<float> bias = random_floats(2 * half, 8);
          const float* biases[] = {nullptr, bias.data()};
          for (const float* b : biases) {
            const Tensor both = run_linear(x, weight, b, rows, dtype);
            Step step(static_cast<int>(rows));
            Tensor expected(dtype, rows * half);
            for (Activation activation : {Activation::kSilu, Activation::kGeluTanh}) {
              gated_mul_cpu({both.data(), expected.data(), half, dtype, activation}, step.ctx);
              CHECK(run_linear(x, weight, b, rows, dtype, activation) == expected);
            }
          }
        }
      }
    }
  }
}

TEST_CASE("linear keeps NaN and infinity in their rows") {
  constexpr int64_t kRows = 9, kOut = 20;
  for (CpuIsa isa : supported_isas()) {
    const IsaScope scope(isa);
    CAPTURE(cpu_isa_name(isa));
    for (DType dtype : kDTypes) {
      for (int64_t in : {31, 64}) {
        const Weight weight(dtype, kOut, in, 9);
        const Tensor clean = random_tensor(dtype, kRows * in, 10);
        const Tensor expected = run_linear(clean, weight, nullptr, kRows, dtype);
        for (float bad : {kNaN, kInf, -kInf}) {
          Tensor x = clean;
          for (int64_t k = 0; k < in; ++k) x.set(4 * in + k, k % 2 == 0 ? bad : kNaN);
          const Tensor out = run_linear(x, weight, nullptr, kRows, dtype);
          CHECK(out.same_bits(expected, 0, 0, 4 * kOut));
          CHECK(out.same_bits(expected, 5 * kOut, 5 * kOut, 4 * kOut));
          for (int64_t n = 0; n < kOut; ++n) CHECK(std::isnan(out.get(4 * kOut + n)));
        }
      }
    }
  }
}

TEST_CASE("linear refuses arguments that do not fit") {
  Step step(1);
  const Weight weight(DType::kF32, 24, 8, 1);
  Tensor x(DType::kF32, 8);
  Tensor out(DType::kF32, 24);
  LinearParams good{x.data(),    weight.view,       nullptr, out.data(), DType::kF32,
                    DType::kF32, Activation::kNone, false,   false};
  linear_cpu(good, step.ctx);
  LinearParams bad = good;
  bad.dtype = bad.out_dtype = DType::kBF16;
  CHECK_THROWS_AS(linear_cpu(bad, step.ctx), Error);
  bad = good;
  bad.out_dtype = DType::kBF16;
  CHECK_THROWS_AS(linear_cpu(bad, step.ctx), Error);
  bad = good;
  bad.activation = Activation::kSilu;
  CHECK_THROWS_AS(linear_cpu(bad, step.ctx), Error);
  bad = good;
  bad.weight.layout = WeightLayout::kRowMajor;
  CHECK_THROWS_AS(linear_cpu(bad, step.ctx), Error);
  bad = good;
  bad.dtype = DType::kF16;
  CHECK_THROWS_AS(linear_cpu(bad, step.ctx), Error);
}

uint16_t half_bits(int i) { return static_cast<uint16_t>(i * 7919); }

TEST_CASE("pack_panels and embedding: every source dtype, written in pieces, read back") {
  constexpr int64_t kRows = 75, kCols = 43;
  for (DType dtype : kDTypes) {
    for (DType source_dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
      std::vector<char> source(kRows * kCols * dtype_size(source_dtype));
      Tensor expected(dtype, kRows * kCols);
      const Tensor values = random_tensor(source_dtype == DType::kF16 ? DType::kF32 : source_dtype,
                                          kRows * kCols, 11);
      for (int64_t i = 0; i < kRows * kCols; ++i) {
        if (source_dtype == DType::kF16) {
          // Any bits but infinities and NaN, subnormals among them.
          Float16 half{half_bits(static_cast<int>(i))};
          if ((half.bits & 0x7c00u) == 0x7c00u) half.bits &= 0x83ffu;
          std::memcpy(source.data() + 2 * i, &half, 2);
          expected.set(i, to_float(half));
        } else {
          expected.set(i, values.get(i));
        }
      }
      if (source_dtype != DType::kF16) {
        std::memcpy(source.data(), values.data(), source.size());
      }
      const int64_t bytes = weight_bytes(dtype, WeightLayout::kPanel16, kRows, kCols);
      std::vector<char> packed(static_cast<size_t>(bytes));
      const WeightView view{packed.data(), dtype, WeightLayout::kPanel16, kRows, kCols};
      ThreadPool pool(2);
      const int64_t cuts[] = {0, 5, 30, 32, 75};
      for (int c = 0; c < 4; ++c) {
        pack_panels(
            view, packed.data(),
            source.data() + cuts[c] * kCols * static_cast<int64_t>(dtype_size(source_dtype)),
            source_dtype, cuts[c], cuts[c + 1] - cuts[c], pool);
      }

      Step step(kRows + 2);
      std::vector<int32_t> ids;
      for (int i = 0; i < kRows; ++i) ids.push_back((i * 11) % kRows);
      ids.push_back(-1);
      ids.push_back(kRows);
      step.ctx.infer.token_ids = ids.data();
      Tensor out(dtype, (kRows + 2) * kCols);
      out.fill(kNaN);
      embedding_cpu({view, out.data(), dtype, 1.0f, 0}, step.ctx);
      for (int64_t t = 0; t < kRows; ++t) {
        REQUIRE(out.same_bits(expected, t * kCols, ids[static_cast<size_t>(t)] * kCols, kCols));
      }
      for (int64_t i = kRows * kCols; i < out.count(); ++i) REQUIRE(out.get(i) == 0.0f);

      Tensor from_rows(dtype, (kRows + 2) * kCols);
      embedding_cpu({WeightView{expected.data(), dtype, WeightLayout::kRowMajor, kRows, kCols},
                     from_rows.data(), dtype, 1.0f, 0},
                    step.ctx);
      CHECK(from_rows == out);
    }
  }
  ThreadPool pool(1);
  const Weight weight(DType::kF32, 16, 4, 1);
  std::vector<char> packed(weight.packed.size());
  CHECK_THROWS_AS(
      pack_panels(weight.view, packed.data(), weight.source.data(), DType::kI32, 0, 16, pool),
      Error);
  CHECK_THROWS_AS(
      pack_panels(weight.view, packed.data(), weight.source.data(), DType::kF32, 8, 9, pool),
      Error);
}

TEST_CASE("gated_mul is accurate over the whole range, the same in every lane") {
  struct Case {
    Activation activation;
    double (*z)(double);
    double lowest;  // below, exp(-z) overflows float32 and the quotient is 0
    double ulps;    // an error of z is one of exp(-z) as many times over as z is large
  };
  const Case cases[] = {
      // exp within 2 ulp, a sum and a quotient.
      {Activation::kSilu, [](double v) { return v; }, -88.0, 3.0},
      {Activation::kGeluTanh,
       [](double v) { return std::sqrt(8.0 / M_PI) * (v + 0.044715 * v * v * v); }, -9.9, 200.0},
  };
  for (CpuIsa isa : supported_isas()) {
    const IsaScope scope(isa);
    CAPTURE(cpu_isa_name(isa));
    std::vector<float> gates;
    for (float v = -100.0f; v < 100.0f; v += 0.0137f) gates.push_back(v);
    const auto count = static_cast<int64_t>(gates.size());
    Tensor x(DType::kF32, 2 * count);
    for (int64_t i = 0; i < count; ++i) {
      x.set(i, gates[static_cast<size_t>(i)]);
      x.set(count + i, 1.0f);
    }
    for (const Case& c : cases) {
      Step step(1);
      Tensor out(DType::kF32, count);
      gated_mul_cpu({x.data(), out.data(), count, DType::kF32, c.activation}, step.ctx);
      double worst = 0.0;
      for (int64_t i = 0; i < count; ++i) {
        const double v = gates[static_cast<size_t>(i)];
        if (v < c.lowest) {
          CHECK(std::abs(out.get(i)) < 1e-35);
          continue;
        }
        const double expected = v / (1.0 + std::exp(-c.z(v)));
        worst = std::max(worst, std::abs(out.get(i) - expected) / std::abs(expected));
      }
      CHECK(worst <= c.ulps * std::ldexp(1.0, -23));

      // One element by itself is the tail of a vector.
      for (int64_t i = 0; i < count; i += 97) {
        const float alone[2] = {x.get(i), 1.0f};
        float result = 0.0f;
        gated_mul_cpu({alone, &result, 1, DType::kF32, c.activation}, step.ctx);
        REQUIRE(float_to_bits(result) == float_to_bits(out.get(i)));
      }
      const float special[] = {kNaN, kInf, 0.0f, -1000.0f, 1.0f, 1.0f, 1.0f, 1.0f};
      float results[4];
      gated_mul_cpu({special, results, 4, DType::kF32, c.activation}, step.ctx);
      CHECK(std::isnan(results[0]));
      CHECK(results[1] == kInf);
      CHECK(results[2] == 0.0f);
      CHECK(results[3] == 0.0f);
    }
  }
}

TEST_CASE("soft_cap is accurate near 0 and far from it") {
  for (CpuIsa isa : supported_isas()) {
    const IsaScope scope(isa);
    CAPTURE(cpu_isa_name(isa));
    std::vector<float> values;
    for (float v = 1e-30f; v < 1e4f; v *= 1.013f) {
      values.push_back(v);
      values.push_back(-v);
    }
    for (float v : {0.0f, kInf, -kInf, kNaN}) values.push_back(v);
    const auto count = static_cast<int64_t>(values.size());
    Step step(1);
    step.ctx.sizes.num_logits = 1;
    std::vector<float> out(values.size());
    for (float cap : {1.0f, 30.0f}) {
      soft_cap_cpu({values.data(), out.data(), count, cap}, step.ctx);
      double worst = 0.0;
      for (size_t i = 0; i + 4 < values.size(); ++i) {
        const double expected = cap * std::tanh(double{values[i]} / cap);
        worst = std::max(worst, std::abs(out[i] - expected) / std::abs(expected));
      }
      CHECK(worst <= 6.0 * std::ldexp(1.0, -23));
      CHECK(out[values.size() - 4] == 0.0f);
      CHECK(out[values.size() - 3] == cap);
      CHECK(out[values.size() - 2] == -cap);
      CHECK(std::isnan(out.back()));
    }
    CHECK_THROWS_AS(soft_cap_cpu({values.data(), out.data(), count, 0.0f}, step.ctx), Error);
  }
}

TEST_CASE("bfloat16 stores round to nearest even, NaN stays NaN") {
  for (CpuIsa isa : supported_isas()) {
    const IsaScope scope(isa);
    CAPTURE(cpu_isa_name(isa));
    // Sums of two bfloat16 need rounding; adding -0 keeps the bits.
    constexpr int kCount = 70000;
    Tensor a(DType::kBF16, kCount), b(DType::kBF16, kCount), out(DType::kBF16, kCount);
    std::mt19937 generator(12);
    for (int i = 0; i < kCount; ++i) {
      const auto bits = static_cast<uint16_t>(i < 65536 ? i : generator());
      const auto other =
          static_cast<uint16_t>(i % 3 == 0 ? 0x8000u : bits ^ (generator() & 0x3ffu));
      std::memcpy(a.at(i), &bits, 2);
      std::memcpy(b.at(i), &other, 2);
    }
    Step step(1);
    add_cpu({a.data(), b.data(), out.data(), kCount, DType::kBF16}, step.ctx);
    for (int i = 0; i < kCount; ++i) {
      const float sum = a.get(i) + b.get(i);
      if (std::isnan(sum)) {
        REQUIRE(std::isnan(out.get(i)));
      } else {
        REQUIRE(float_to_bits(out.get(i)) == float_to_bits(to_float(from_float<BFloat16>(sum))));
      }
    }
  }
}

TEST_CASE("rms_norm, with a residual and in place") {
  constexpr int64_t kRows = 11;
  for (CpuIsa isa : supported_isas()) {
    const IsaScope scope(isa);
    CAPTURE(cpu_isa_name(isa));
    for (DType dtype : kDTypes) {
      for (int64_t cols : {1, 15, 64, 1000}) {
        Step step(kRows);
        const Tensor x = random_tensor(dtype, kRows * cols, 13, 3.0f);
        const Tensor residual = random_tensor(dtype, kRows * cols, 14);
        const std::vector<float> weight = random_floats(cols, 15);
        Tensor sum(dtype, kRows * cols);
        add_cpu({x.data(), residual.data(), sum.data(), cols, dtype}, step.ctx);
        Tensor out(dtype, kRows * cols);
        rms_norm_cpu(
            {sum.data(), nullptr, weight.data(), out.data(), nullptr, cols, 1e-6f, dtype, false},
            step.ctx);
        for (int64_t r = 0; r < kRows; ++r) {
          double squares = 0.0;
          for (int64_t c = 0; c < cols; ++c) {
            const double v = sum.get(r * cols + c);
            REQUIRE(v == to_float(dtype == DType::kF32
                                      ? x.get(r * cols + c) + residual.get(r * cols + c)
                                      : to_float(from_float<BFloat16>(
                                            x.get(r * cols + c) + residual.get(r * cols + c)))));
            squares += v * v;
          }
          const double inverse = 1.0 / std::sqrt(squares / static_cast<double>(cols) + 1e-6);
          for (int64_t c = 0; c < cols; ++c) {
            const double expected =
                sum.get(r * cols + c) * inverse * weight[static_cast<size_t>(c)];
            REQUIRE(std::abs(out.get(r * cols + c) - expected) <=
                    std::abs(expected) * (unit_roundoff(dtype) * 1.01 + 1e-6));
          }
        }
        // Fused with the sum, and with every overlap that the contract allows.
        Tensor fused_x = x, fused_residual = residual;
        rms_norm_cpu({fused_x.data(), fused_residual.data(), weight.data(), fused_x.data(),
                      fused_residual.data(), cols, 1e-6f, dtype, false},
                     step.ctx);
        CHECK(fused_x == out);
        CHECK(fused_residual == sum);
      }
    }
  }
}

TEST_CASE("gather_rows") {
  for (DType dtype : kDTypes) {
    Step step(5);
    const Tensor x = random_tensor(dtype, 5 * 7, 16);
    std::vector<int32_t> indices = {4, 0, 0, 2};
    step.ctx.infer.logits_indices = indices.data();
    step.ctx.sizes.num_logits = 4;
    Tensor out(dtype, 4 * 7);
    gather_rows_cpu({x.data(), out.data(), 7, dtype}, step.ctx);
    for (int64_t l = 0; l < 4; ++l) {
      CHECK(out.same_bits(x, l * 7, indices[static_cast<size_t>(l)] * 7, 7));
    }
  }
}

TEST_CASE("qkv_prepare: the fused op equals its parts, the parts agree with float64") {
  constexpr int kTokens = 9, kMaxPosition = 40, kBlocks = 4, kBlockSize = 4;
  for (CpuIsa isa : supported_isas()) {
    const IsaScope scope(isa);
    CAPTURE(cpu_isa_name(isa));
    for (DType dtype : kDTypes) {
      struct Case {
        int head_dim, pairs;
        bool interleaved;
      };
      for (auto [head_dim, pairs, interleaved] : {Case{8, 4, false},
                                                  {8, 4, true},
                                                  {40, 20, false},
                                                  {40, 15, true},
                                                  {64, 32, false},
                                                  {64, 24, false},
                                                  {96, 48, true},
                                                  {256, 128, false},
                                                  {256, 16, true}}) {
        const HeadShape shape{6, 2, head_dim};
        const int64_t cols = shape.qkv_cols();
        Step step(kTokens);
        std::vector<int32_t> positions = {0, 39, 3, 4, 5, 6, 7, 0, 12};
        // Two groups; the second is used. Token 7 is padding.
        std::vector<int32_t> slots(2 * 16, 3);
        for (int t = 0; t < kTokens; ++t) slots[static_cast<size_t>(16 + t)] = 15 - t;
        slots[16 + 7] = -1;
        step.ctx.infer.positions = positions.data();
        step.ctx.infer.slot_mapping = slots.data();
        step.ctx.infer.max_tokens = 16;
        const int turned = 2 * pairs;  // elements of a head
        std::vector<float> rope(static_cast<size_t>(kMaxPosition * turned));
        for (int p = 0; p < kMaxPosition; ++p) {
          for (int i = 0; i < pairs; ++i) {
            const double angle = p * std::pow(10000.0, -2.0 * i / turned);
            rope[static_cast<size_t>(p * turned + i)] = static_cast<float>(std::cos(angle));
            rope[static_cast<size_t>(p * turned + pairs + i)] = static_cast<float>(std::sin(angle));
          }
        }
        const std::vector<float> q_norm = random_floats(head_dim, 17);
        const std::vector<float> k_norm = random_floats(head_dim, 18);
        const int64_t cache_size = int64_t{kBlocks} * 2 * kBlockSize * head_dim;
        Tensor key(dtype, cache_size), value(dtype, cache_size);
        key.fill(-7.0f);
        value.fill(-7.0f);
        KvCacheLayer cache = kv_cache_layer(dtype, kBlocks, kBlockSize, shape);
        cache.key = key.data();
        cache.value = value.data();

        const Tensor qkv = random_tensor(dtype, kTokens * cols, 19);
        Tensor fused = qkv;
        const QkvPrepareParams all{fused.data(),
                                   fused.data(),
                                   shape,
                                   dtype,
                                   q_norm.data(),
                                   k_norm.data(),
                                   1e-6f,
                                   rope.data(),
                                   pairs,
                                   interleaved,
                                   kMaxPosition,
                                   &cache,
                                   1};
        qkv_prepare_cpu(all, step.ctx);

        Tensor normed(dtype, kTokens * cols), rotated(dtype, kTokens * cols);
        QkvPrepareParams part = all;
        part.qkv = qkv.data();
        part.out = normed.data();
        part.rope = nullptr;
        part.cache = nullptr;
        qkv_prepare_cpu(part, step.ctx);
        part = all;
        part.qkv = normed.data();
        part.out = rotated.data();
        part.q_norm = part.k_norm = nullptr;
        part.cache = nullptr;
        qkv_prepare_cpu(part, step.ctx);
        CHECK(rotated == fused);
        Tensor part_key(dtype, cache_size), part_value(dtype, cache_size);
        part_key.fill(-7.0f);
        part_value.fill(-7.0f);
        KvCacheLayer part_cache = cache;
        part_cache.key = part_key.data();
        part_cache.value = part_value.data();
        cache_write_cpu({.key = rotated.at(int64_t{6} * head_dim),
                         .value = rotated.at(int64_t{8} * head_dim),
                         .key_stride = cols,
                         .value_stride = cols,
                         .dtype = dtype,
                         .cache = &part_cache,
                         .kv_group = 1},
                        step.ctx);
        CHECK(part_key == key);
        CHECK(part_value == value);

        const double roundoff = unit_roundoff(dtype) * 1.01 + 1e-6;
        for (int64_t t = 0; t < kTokens; ++t) {
          for (int h = 0; h < 10; ++h) {
            const int64_t at = t * cols + h * head_dim;
            if (h >= 8) {
              REQUIRE(fused.same_bits(qkv, at, at, head_dim));
              continue;
            }
            double squares = 0.0;
            for (int i = 0; i < head_dim; ++i) squares += std::pow(qkv.get(at + i), 2.0);
            for (int i = 0; i < head_dim; ++i) {
              const double expected = qkv.get(at + i) / std::sqrt(squares / head_dim + 1e-6) *
                                      (h < 6 ? q_norm : k_norm)[static_cast<size_t>(i)];
              REQUIRE(std::abs(normed.get(at + i) - expected) <= std::abs(expected) * roundoff);
            }
            for (int i = 0; i < pairs; ++i) {
              const size_t angle = static_cast<size_t>(positions[static_cast<size_t>(t)] * turned);
              const double c = rope[angle + static_cast<size_t>(i)];
              const double s = rope[angle + static_cast<size_t>(pairs + i)];
              const int64_t first = at + (interleaved ? 2 * i : i);
              const int64_t second = interleaved ? first + 1 : first + pairs;
              const double a = normed.get(first), b = normed.get(second);
              const double bound = (std::abs(a) + std::abs(b)) * roundoff;
              REQUIRE(std::abs(fused.get(first) - (a * c - b * s)) <= bound);
              REQUIRE(std::abs(fused.get(second) - (b * c + a * s)) <= bound);
            }
            REQUIRE(fused.same_bits(normed, at + turned, at + turned, head_dim - turned));
          }
          for (int h = 0; h < 2 && t != 7; ++h) {
            const int64_t slot = 15 - t;
            const int64_t index = slot / 4 * cache.block_stride + slot % 4 * cache.token_stride +
                                  h * cache.head_stride;
            REQUIRE(key.same_bits(fused, index, t * cols + (6 + h) * head_dim, head_dim));
            REQUIRE(value.same_bits(fused, index, t * cols + (8 + h) * head_dim, head_dim));
          }
        }
        // Slots that no token has, the padding's among them, are left alone.
        for (int64_t slot : {0, 3, 6, 8}) {
          const int64_t index = slot / 4 * cache.block_stride + slot % 4 * cache.token_stride;
          REQUIRE(key.get(index) == -7.0f);
        }
        std::vector<int32_t> far = positions;
        far[2] = kMaxPosition;
        step.ctx.infer.positions = far.data();
        CHECK_THROWS_AS(qkv_prepare_cpu(all, step.ctx), Error);
      }
    }
  }
}

}  // namespace
}  // namespace mrv1::test
