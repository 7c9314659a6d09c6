// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "core/float4.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "ops/vector_ops.h"
#include "ops_test_support.h"

namespace mrv1::test {
namespace {

TEST_CASE("E2M1 rounds to nearest, ties to even, and saturates") {
  const auto encode = [](float value) {
    return static_cast<int>(from_float<Float4E2M1>(value).bits);
  };
  const auto decode = [](int code) { return to_float(Float4E2M1{static_cast<uint8_t>(code)}); };
  const float values[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  for (int code = 0; code < 8; ++code) {
    CAPTURE(code);
    CHECK(decode(code) == values[code]);
    CHECK(float_to_bits(decode(code | 8)) == float_to_bits(-values[code]));
    CHECK(encode(values[code]) == code);
    CHECK(encode(-values[code]) == (code | 8));
    if (code == 7) continue;
    const float middle = 0.5f * (values[code] + values[code + 1]);
    const int even = code % 2 == 0 ? code : code + 1;
    CHECK(encode(middle) == even);
    CHECK(encode(-middle) == (even | 8));
    CHECK(encode(std::nextafter(middle, 0.0f)) == code);
    CHECK(encode(std::nextafter(middle, 9.0f)) == code + 1);
  }
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (float beyond : {std::nextafter(6.0f, 9.0f), 1e30f, kInfinity}) {
    CHECK(encode(beyond) == 7);
    CHECK(encode(-beyond) == 15);
  }
  CHECK(encode(std::numeric_limits<float>::quiet_NaN()) == 7);
  CHECK(encode(std::numeric_limits<float>::denorm_min()) == 0);
}

// A weight in NVFP4 panels, and its values without row scales in panels of the dtype.
struct Weights {
  Weights(DType dtype, int64_t rows, int64_t cols, float row_scale)
      : fp4{.dtype = DType::kE2M1, .layout = WeightLayout::kPanel16, .rows = rows, .cols = cols},
        plain{.dtype = dtype, .layout = WeightLayout::kPanel16, .rows = rows, .cols = cols} {
    memory.resize(static_cast<size_t>(weight_parts(fp4).bytes));
    fp4 = placed(fp4, memory.data());
    std::vector<uint8_t> codes(static_cast<size_t>(rows * cols / 2));
    std::vector<uint8_t> scales(static_cast<size_t>(rows * cols / kFp4Block));
    for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(i * 167 + i / 251);
    // All finite scales, in turn.
    for (size_t i = 0; i < scales.size(); ++i) {
      scales[i] = static_cast<uint8_t>(i % 2 * 0x80 + i / 2 % 0x7f);
    }
    ThreadPool pool(2);
    pack_byte_panels(memory.data(), cols / 2, rows, codes.data(), 0, rows, pool);
    pack_byte_panels(memory.data() + weight_parts(fp4).scales, cols / kFp4Block, rows,
                     scales.data(), 0, rows, pool);
    auto* row_scales = reinterpret_cast<float*>(memory.data() + weight_parts(fp4).row_scales);
    std::fill_n(row_scales, rows, row_scale);
    std::vector<float> values(static_cast<size_t>(rows * cols));
    for (size_t i = 0; i < values.size(); ++i) {
      const auto code = static_cast<uint8_t>(codes[i / 2] >> (i % 2 * 4) & 0xf);
      values[i] = fp4_value({code}, {scales[i / kFp4Block]});
    }
    packed.resize(static_cast<size_t>(weight_bytes(plain)));
    plain.data = packed.data();
    pack_panels(plain, packed.data(), values.data(), DType::kF32, 0, rows, pool);
  }
  std::vector<char> memory, packed;
  WeightView fp4, plain;
};

TEST_CASE("panels of NVFP4 are decoded exactly, on every instruction set") {
  constexpr int64_t kRows = 16, kCols = 4096;
  for (CpuIsa isa : supported_isas()) {
    const IsaScope scope(isa);
    CAPTURE(cpu_isa_name(isa));
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      const Weights weights(dtype, kRows, kCols, 1.0f);
      std::vector<char> decoded(weights.packed.size());
      vector_ops(dtype, "test")
          .decode_fp4_panel(static_cast<const uint8_t*>(weights.fp4.data), weights.fp4.scales,
                            kCols, decoded.data());
      CHECK(decoded == weights.packed);
    }
  }
}

TEST_CASE("linear over NVFP4 has the bits of linear over its values") {
  for (CpuIsa isa : supported_isas()) {
    const IsaScope scope(isa);
    CAPTURE(cpu_isa_name(isa));
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      // Up to 256 columns sums are made in one go.
      for (auto [out_cols, cols] : {std::pair<int64_t, int64_t>{1, 16}, {40, 48}, {70, 256}}) {
        const Weights weights(dtype, out_cols, cols, 0.25f);
        for (int64_t rows : {1, 7, 65, 200}) {
          CAPTURE(rows);
          const Tensor x = random_tensor(dtype, rows * cols, 2);
          Step step(static_cast<int>(rows));
          Tensor fp4(DType::kF32, rows * out_cols), plain(DType::kF32, rows * out_cols);
          const auto run = [&](const WeightView& weight, Tensor& out) {
            linear_cpu({x.data(), weight, nullptr, out.data(), dtype, DType::kF32,
                        Activation::kNone, false, false},
                       step.ctx);
          };
          run(weights.fp4, fp4);
          run(weights.plain, plain);
          for (int64_t i = 0; i < plain.count(); ++i) plain.set(i, plain.get(i) * 0.25f);
          REQUIRE(fp4 == plain);
        }
      }
    }
  }
}

}  // namespace
}  // namespace mrv1::test
