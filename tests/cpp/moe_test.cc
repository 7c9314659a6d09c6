// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>

#include "ops/workspace_cpu.h"
#include "ops_test_support.h"

namespace mrv1::test {
namespace {

constexpr DType kDTypes[] = {DType::kF32, DType::kBF16};
const float kNaN = std::numeric_limits<float>::quiet_NaN();

// Equal row-major matrices and their packed copy.
struct Matrices {
  Matrices(DType dtype, int64_t count, int64_t rows, int64_t cols, uint32_t seed)
      : source(random_tensor(dtype, count * rows * cols, seed,
                             1.0f / std::sqrt(static_cast<float>(cols)))),
        view{.dtype = dtype,
             .layout = WeightLayout::kPanel16,
             .rows = count * rows,
             .cols = cols,
             .matrices = count} {
    packed.resize(static_cast<size_t>(weight_bytes(view)));
    view.data = packed.data();
    ThreadPool pool(1);
    // In pieces that end within matrices, as tensors of a checkpoint come.
    for (int64_t row = 0; row < view.rows; row += 48) {
      pack_panels(view, packed.data(), source.at(row * cols), dtype, row,
                  std::min<int64_t>(48, view.rows - row), pool);
    }
  }
  double get(int64_t matrix, int64_t row, int64_t col) const {
    return source.get((matrix * (view.rows / view.matrices) + row) * view.cols + col);
  }
  Tensor source;
  std::vector<char> packed;
  WeightView view;
};

struct Case {
  int64_t rows, hidden, intermediate;
  int32_t experts, top_k;
};

// A layer of experts, and rows that choose among them.
struct Layer {
  Layer(DType dtype, const Case& sizes)
      : sizes(sizes),
        gate_up(dtype, sizes.experts, 2 * sizes.intermediate, sizes.hidden, 1),
        down(dtype, sizes.experts, sizes.hidden, sizes.intermediate, 2),
        x(random_tensor(dtype, sizes.rows * sizes.hidden, 3)),
        weights(random_floats(sizes.rows * sizes.top_k, 4)) {
    std::mt19937 generator(5);
    std::vector<int32_t> order(static_cast<size_t>(sizes.experts));
    for (int32_t e = 0; e < sizes.experts; ++e) order[e] = e;
    for (int64_t row = 0; row < sizes.rows; ++row) {
      std::shuffle(order.begin(), order.end(), generator);
      experts.insert(experts.end(), order.begin(), order.begin() + sizes.top_k);
    }
  }

  MoeExpertsParams params(Tensor& out) {
    return {.x = x.data(),
            .experts = experts.data(),
            .weights = weights.data(),
            .gate_up = gate_up.view,
            .down = down.view,
            .out = out.data(),
            .dtype = x.dtype(),
            .out_dtype = out.dtype(),
            .activation = Activation::kSilu,
            .top_k = sizes.top_k,
            .first_expert = 0,
            .num_experts = sizes.experts};
  }

  void run(const MoeExpertsParams& params, int64_t tokens, int num_threads = 2) const {
    WorkspaceLimits limits{};
    limits.moe_rows = sizes.rows * sizes.top_k;
    limits.moe_hidden = sizes.hidden;
    limits.moe_intermediate = sizes.intermediate;
    limits.moe_experts = sizes.experts;
    limits.moe_element_bytes = static_cast<int64_t>(dtype_size(params.dtype));
    Step step(static_cast<int>(tokens), num_threads,
              static_cast<size_t>(moe_experts_workspace_cpu(limits)));
    moe_experts_cpu(params, step.ctx);
  }

  // In float64, without the roundings of the parts.
  std::vector<double> expected(int64_t row) const {
    std::vector<double> out(static_cast<size_t>(sizes.hidden));
    std::vector<double> inner(static_cast<size_t>(sizes.intermediate));
    for (int32_t j = 0; j < sizes.top_k; ++j) {
      const int32_t e = experts[row * sizes.top_k + j];
      for (int64_t i = 0; i < sizes.intermediate; ++i) {
        double gate = 0, up = 0;
        for (int64_t c = 0; c < sizes.hidden; ++c) {
          const double value = x.get(row * sizes.hidden + c);
          gate += gate_up.get(e, i, c) * value;
          up += gate_up.get(e, sizes.intermediate + i, c) * value;
        }
        inner[i] = gate / (1 + std::exp(-gate)) * up;
      }
      for (int64_t c = 0; c < sizes.hidden; ++c) {
        double sum = 0;
        for (int64_t i = 0; i < sizes.intermediate; ++i) sum += down.get(e, c, i) * inner[i];
        out[c] += weights[row * sizes.top_k + j] * sum;
      }
    }
    return out;
  }

  Case sizes;
  Matrices gate_up, down;
  Tensor x;
  std::vector<float> weights;
  std::vector<int32_t> experts;
};

TEST_CASE("moe_experts agrees with float64") {
  const Case cases[] = {{1, 64, 32, 8, 2}, {5, 33, 7, 3, 3}, {40, 96, 40, 5, 2}, {9, 20, 17, 4, 1}};
  // Beside the roundings of the parts, sums of float32 add up theirs over columns.
  const double summing = 2e-6;
  for (CpuIsa isa : supported_isas()) {
    const IsaScope scope(isa);
    CAPTURE(cpu_isa_name(isa));
    for (DType dtype : kDTypes) {
      for (const Case& sizes : cases) {
        CAPTURE(sizes.hidden);
        Layer layer(dtype, sizes);
        Tensor out(dtype, sizes.rows * sizes.hidden), alone(dtype, sizes.rows * sizes.hidden);
        out.fill(kNaN);
        layer.run(layer.params(out), sizes.rows);
        layer.run(layer.params(alone), sizes.rows, 1);
        CHECK(out == alone);
        for (int64_t row = 0; row < sizes.rows; ++row) {
          const std::vector<double> expected = layer.expected(row);
          double error = 0, size = 0;
          for (int64_t c = 0; c < sizes.hidden; ++c) {
            const double difference = out.get(row * sizes.hidden + c) - expected[c];
            error += difference * difference;
            size += expected[c] * expected[c];
          }
          REQUIRE(std::sqrt(error / size) <= summing + 6 * unit_roundoff(dtype));
        }
      }
    }
  }
}

TEST_CASE("moe_experts takes the rows of regions that count, and leaves the others alone") {
  const Case sizes{24, 32, 16, 6, 2};
  Layer layer(DType::kBF16, sizes);
  Tensor whole(DType::kF32, sizes.rows * sizes.hidden), out = whole;
  layer.run(layer.params(whole), sizes.rows);
  const std::vector<int32_t> counts = {3, 0, 8};
  // What does not count may be anything.
  for (int64_t row = 0; row < sizes.rows; ++row) {
    if (row % 8 < counts[row / 8]) continue;
    layer.x.set(row * sizes.hidden, kNaN);
    layer.experts[row * sizes.top_k] = std::numeric_limits<int32_t>::min();
  }
  out.fill(kNaN);
  MoeExpertsParams params = layer.params(out);
  params.regions = 3;
  params.region_rows = 8;
  params.counts = counts.data();
  layer.run(params, 1);
  for (int64_t row = 0; row < sizes.rows; ++row) {
    CAPTURE(row);
    if (row % 8 < counts[row / 8]) {
      CHECK(out.same_bits(whole, row * sizes.hidden, row * sizes.hidden, sizes.hidden));
    } else {
      for (int64_t c = 0; c < sizes.hidden; ++c) {
        REQUIRE(std::isnan(out.get(row * sizes.hidden + c)));
      }
    }
  }
}

TEST_CASE("choice_key orders values, then experts") {
  const float infinity = std::numeric_limits<float>::infinity();
  const float ascending[] = {kNaN, -infinity, -1.0f, -1e-45f, 0.0f, 1e-45f, 2.0f, infinity};
  for (size_t i = 1; i < std::size(ascending); ++i) {
    CAPTURE(i);
    CHECK(choice_key(ascending[i - 1], 0) < choice_key(ascending[i], kMaxExperts - 1));
  }
  CHECK(choice_key(-kNaN, 3) == choice_key(kNaN, 3));
  CHECK(choice_key(-0.0f, 3) == choice_key(0.0f, 3));
  CHECK(choice_key(1.0f, 3) > choice_key(1.0f, 4));
  CHECK(choice_key(kNaN, kMaxExperts - 1) > 0);
  for (int32_t e : {0, 1, kMaxExperts - 1}) CHECK(chosen_expert(choice_key(0.5f, e)) == e);
}

TEST_CASE("router_exp is accurate down to where it is 0") {
  for (float x = 0.0f; x > -87.0f; x -= 0.0137f) {
    const double exact = std::exp(double{x});
    REQUIRE(std::abs(router_exp(x) - exact) <= std::ldexp(exact, -21));
  }
  CHECK(router_exp(0.0f) == 1.0f);
  CHECK(router_exp(-88.0f) == 0.0f);
  CHECK(router_exp(-std::numeric_limits<float>::infinity()) == 0.0f);
  CHECK(std::isnan(router_exp(kNaN)));
  CHECK(sigmoid_score(100.0f) == 1.0f);
  CHECK(sigmoid_score(-100.0f) == 0.0f);
  CHECK(sigmoid_score(0.0f) == 0.5f);
  CHECK(std::isnan(sigmoid_score(kNaN)));
}

}  // namespace
}  // namespace mrv1::test
