// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
// No include guard: the inner loops for one instruction set. See simd_cpu.h, which comes before.

namespace mrv1::MRV1_SIMD_NAMESPACE {
namespace {

// Rounds a value to T and back, as a store and a load would.
template <typename T>
MRV1_INLINE Vec round_to(const Vec& x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    T lanes[kLanes];
    store(lanes, x);
    return load(lanes);
  }
}

// Calls fn(i, n) for pieces [i, i + n) of [0, count), all but the last with n == kLanes.
template <typename Fn>
MRV1_INLINE void for_each_vec(int64_t count, const Fn& fn) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) fn(i, kLanes);
  if (i < count) fn(i, static_cast<int>(count - i));
}

template <typename T>
MRV1_INLINE Vec load_up_to(const T* p, int n) {
  return n == kLanes ? load(p) : load_partial(p, n);
}

template <typename T>
MRV1_INLINE void store_up_to(T* p, const Vec& x, int n) {
  if (n == kLanes) {
    store(p, x);
  } else {
    store_partial(p, x, n);
  }
}

// ---- linear ----

// How a product is added to an accumulator. A step takes one stored column of float32 or one pair
// of columns of bfloat16: 4 bytes of a row of x, and 64 bytes of a panel.
template <typename T>
struct Step;

template <>
struct Step<float> {
  static constexpr int kCols = 1;
  struct Weight {
    Vec v;
  };
  struct Input {
    Vec v;
  };
  static MRV1_INLINE Weight weight(const char* p) {
    return {load(reinterpret_cast<const float*>(p))};
  }
  static MRV1_INLINE Input input(uint32_t word) { return {set1(bits_to_float(word))}; }
  static MRV1_INLINE Vec add(const Vec& acc, const Weight& w, const Input& x) {
    return fma(w.v, x.v, acc);
  }
};

#if defined(MRV1_SIMD_BF16_DOT)
template <>
struct Step<BFloat16> {
  static constexpr int kCols = 2;
  struct Weight {
    __m512i v;
  };
  struct Input {
    __m512i v;
  };
  static MRV1_INLINE Weight weight(const char* p) { return {_mm512_loadu_si512(p)}; }
  static MRV1_INLINE Input input(uint32_t word) {
    return {_mm512_set1_epi32(static_cast<int>(word))};
  }
  static MRV1_INLINE Vec add(const Vec& acc, const Weight& w, const Input& x) {
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)w.v, (__m512bh)x.v)};
  }
};
#else
template <>
struct Step<BFloat16> {
  static constexpr int kCols = 2;
  struct Weight {
    Vec first, second;
  };
  struct Input {
    Vec first, second;
  };
  static MRV1_INLINE Weight weight(const char* p) {
    const Words words = load_words(p);
    return {lower_half(words), upper_half(words)};
  }
  static MRV1_INLINE Input input(uint32_t word) {
    const Words words = set1_word(word);
    return {lower_half(words), upper_half(words)};
  }
  static MRV1_INLINE Vec add(const Vec& acc, const Weight& w, const Input& x) {
    return fma(w.second, x.second, fma(w.first, x.first, acc));
  }
};
#endif

// Register tiles, rows x panels. "Tall" tiles read a panel once for more rows. With no more than
// kNarrowRows it does not pay to widen bfloat16 rows ahead of the panels.
#if defined(MRV1_SIMD_AVX512)
constexpr int kWideRows = 6, kWidePanels = 4;
constexpr int kTallRows = 12, kTallPanels = 2;
constexpr int kNarrowRows = 4;
#elif defined(MRV1_SIMD_AVX2)
constexpr int kWideRows = 2, kWidePanels = 2;
constexpr int kTallRows = 5, kTallPanels = 1;
constexpr int kNarrowRows = 2;
#else
constexpr int kWideRows = 1, kWidePanels = 2;
constexpr int kTallRows = 3, kTallPanels = 1;
constexpr int kNarrowRows = 1;
#endif
// How far ahead of its use a panel is asked for.
constexpr int64_t kPrefetchBytes = 2048;

template <typename T, int kRows, int kPanels>
MRV1_INLINE void linear_tile(const LinearBlock& block, int64_t row, int panel) {
  using S = Step<T>;
  const char* x[kRows];
  const char* w[kPanels];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    x[r] = static_cast<const char*>(block.x) +
           (row + r) * block.x_stride * static_cast<int64_t>(sizeof(T));
  }
#pragma GCC unroll 16
  for (int p = 0; p < kPanels; ++p) w[p] = static_cast<const char*>(block.panels[panel + p]);

  Vec acc[kRows][kPanels];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p) acc[r][p] = set1(0.0f);
  }
  const auto step = [&](int64_t i, int64_t word_bytes) __attribute__((always_inline)) {
    typename S::Weight weights[kPanels];
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p) {
      weights[p] = S::weight(w[p] + i * 64);
      __builtin_prefetch(w[p] + i * 64 + kPrefetchBytes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      uint32_t word = 0;
      if (word_bytes == 4) {
        std::memcpy(&word, x[r] + i * 4, 4);
      } else {
        std::memcpy(&word, x[r] + i * 4, 2);
      }
      const typename S::Input input = S::input(word);
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p) acc[r][p] = S::add(acc[r][p], weights[p], input);
    }
  };
  const int64_t steps = block.cols / S::kCols;
  for (int64_t i = 0; i < steps; ++i) step(i, 4);
  // The last column of an odd number: its partner in the panel is zero, in x it is another row.
  if (block.cols % S::kCols != 0) step(steps, 2);

#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p) {
      store(block.out + (row + r) * block.out_stride + (panel + p) * kLanes, acc[r][p]);
    }
  }
}

// Runs tiles of kRows rows, then one of the rows that are left.
template <typename T, int kRows, int kPanels>
void linear_rows(const LinearBlock& block, int64_t row, int panel) {
  for (; row + kRows <= block.rows; row += kRows) linear_tile<T, kRows, kPanels>(block, row, panel);
  if constexpr (kRows > 1) {
    if (row < block.rows) linear_rows<T, kRows - 1, kPanels>(block, row, panel);
  }
}

#if !defined(MRV1_SIMD_BF16_DOT)

// Columns of x that are widened to float32 at a time: kTallRows of them stay in the first cache.
constexpr int64_t kWideCols = 512;

// Continues the sums in block.out over pairs of columns, from x as float32. The same operations in
// the same order as linear_tile<BFloat16>, without widening x again for every panel.
template <int kRows, int kPanels>
MRV1_INLINE void widened_tile(const LinearBlock& block, const float (*x)[kWideCols], int64_t row,
                              int panel, int64_t first_pair, int64_t num_pairs) {
  const char* w[kPanels];
  Vec acc[kRows][kPanels];
#pragma GCC unroll 16
  for (int p = 0; p < kPanels; ++p) {
    w[p] = static_cast<const char*>(block.panels[panel + p]) + first_pair * 64;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      acc[r][p] = first_pair == 0
                      ? set1(0.0f)
                      : load(block.out + (row + r) * block.out_stride + (panel + p) * kLanes);
    }
  }
  for (int64_t i = 0; i < num_pairs; ++i) {
    Step<BFloat16>::Weight weights[kPanels];
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p) {
      weights[p] = Step<BFloat16>::weight(w[p] + i * 64);
      __builtin_prefetch(w[p] + i * 64 + kPrefetchBytes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Step<BFloat16>::Input input{set1(x[r][2 * i]), set1(x[r][2 * i + 1])};
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p) {
        acc[r][p] = Step<BFloat16>::add(acc[r][p], weights[p], input);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p) {
      store(block.out + (row + r) * block.out_stride + (panel + p) * kLanes, acc[r][p]);
    }
  }
}

template <int kRows>
void widened_rows(const LinearBlock& block, int64_t row, int64_t col) {
  for (; row + kRows <= block.rows; row += kRows) {
    alignas(64) float x[kRows][kWideCols];
    const int64_t cols = block.cols - col < kWideCols ? block.cols - col : kWideCols;
    const int64_t num_pairs = (cols + 1) / 2;
    for (int r = 0; r < kRows; ++r) {
      const BFloat16* from =
          static_cast<const BFloat16*>(block.x) + (row + r) * block.x_stride + col;
      for_each_vec(cols,
                   [&](int64_t i, int lanes) { store(x[r] + i, load_up_to(from + i, lanes)); });
    }
    int panel = 0;
    for (; panel + kTallPanels <= block.num_panels; panel += kTallPanels) {
      widened_tile<kRows, kTallPanels>(block, x, row, panel, col / 2, num_pairs);
    }
    if constexpr (kTallPanels > 1) {
      for (; panel < block.num_panels; ++panel) {
        widened_tile<kRows, 1>(block, x, row, panel, col / 2, num_pairs);
      }
    }
  }
  if constexpr (kRows > 1) {
    if (row < block.rows) widened_rows<kRows - 1>(block, row, col);
  }
}

#endif

template <typename T>
void linear(const LinearBlock& block) {
#if !defined(MRV1_SIMD_BF16_DOT)
  if constexpr (sizeof(T) == 2) {
    if (block.rows > kNarrowRows) {
      for (int64_t col = 0; col < block.cols; col += kWideCols) {
        widened_rows<kTallRows>(block, 0, col);
      }
      return;
    }
  }
#endif
  int panel = 0;
  const bool wide = block.rows <= kWideRows || block.rows > kTallRows;
  if (wide) {
    for (; panel + kWidePanels <= block.num_panels; panel += kWidePanels) {
      linear_rows<T, kWideRows, kWidePanels>(block, 0, panel);
    }
  }
  for (; panel + kTallPanels <= block.num_panels; panel += kTallPanels) {
    linear_rows<T, kTallRows, kTallPanels>(block, 0, panel);
  }
  if constexpr (kTallPanels > 1) {
    for (; panel < block.num_panels; ++panel) linear_rows<T, kTallRows, 1>(block, 0, panel);
  }
}

template <typename T>
void store_row(const float* acc, const float* bias, void* out, int64_t n) {
  T* to = static_cast<T*>(out);
  for_each_vec(n, [&](int64_t i, int lanes) {
    Vec value = load_up_to(acc + i, lanes);
    if (bias != nullptr) value = add(value, load_up_to(bias + i, lanes));
    store_up_to(to + i, value, lanes);
  });
}

template <typename T, Activation kActivation>
void store_gated_mul_elements(const float* gate, const float* up, const float* gate_bias,
                              const float* up_bias, void* out, int64_t n) {
  T* to = static_cast<T*>(out);
  for_each_vec(n, [&](int64_t i, int lanes) {
    Vec g = load_up_to(gate + i, lanes);
    Vec u = load_up_to(up + i, lanes);
    if (gate_bias != nullptr) {
      g = add(g, load_up_to(gate_bias + i, lanes));
      u = add(u, load_up_to(up_bias + i, lanes));
    }
    store_up_to(to + i, gated_mul<kActivation>(round_to<T>(g), round_to<T>(u)), lanes);
  });
}

template <typename T>
void store_gated_mul_row(Activation activation, const float* gate, const float* up,
                         const float* gate_bias, const float* up_bias, void* out, int64_t n) {
  const auto run = activation == Activation::kSilu
                       ? store_gated_mul_elements<T, Activation::kSilu>
                       : store_gated_mul_elements<T, Activation::kGeluTanh>;
  run(gate, up, gate_bias, up_bias, out, n);
}

// ---- elementwise, norm, RoPE ----

template <typename T, Activation kActivation>
void gated_mul_elements(const void* gate, const void* up, void* out, int64_t n) {
  const T* g = static_cast<const T*>(gate);
  const T* u = static_cast<const T*>(up);
  T* to = static_cast<T*>(out);
  for_each_vec(n, [&](int64_t i, int lanes) {
    store_up_to(to + i, gated_mul<kActivation>(load_up_to(g + i, lanes), load_up_to(u + i, lanes)),
                lanes);
  });
}

template <typename T>
void gated_mul_row(Activation activation, const void* gate, const void* up, void* out, int64_t n) {
  const auto run = activation == Activation::kSilu ? gated_mul_elements<T, Activation::kSilu>
                                                   : gated_mul_elements<T, Activation::kGeluTanh>;
  run(gate, up, out, n);
}

template <typename T>
void soft_cap_row(const void* x, float cap, void* out, int64_t n) {
  const T* from = static_cast<const T*>(x);
  T* to = static_cast<T*>(out);
  for_each_vec(n, [&](int64_t i, int lanes) {
    store_up_to(to + i, soft_cap(load_up_to(from + i, lanes), 1.0f / cap, cap), lanes);
  });
}

template <typename T>
void add_row(const void* a, const void* b, void* out, int64_t n) {
  const T* x = static_cast<const T*>(a);
  const T* y = static_cast<const T*>(b);
  T* to = static_cast<T*>(out);
  for_each_vec(n, [&](int64_t i, int lanes) {
    store_up_to(to + i, add(load_up_to(x + i, lanes), load_up_to(y + i, lanes)), lanes);
  });
}

template <typename T>
void add_scaled_row(const void* x, float scale, float* sums, int64_t n) {
  const T* from = static_cast<const T*>(x);
  for_each_vec(n, [&](int64_t i, int lanes) {
    const Vec sum = fma(load_up_to(from + i, lanes), set1(scale), load_up_to(sums + i, lanes));
    store_up_to(sums + i, sum, lanes);
  });
}

template <typename T>
void norm_row(const NormRow& row) {
  const T* x = static_cast<const T*>(row.x);
  T* out = static_cast<T*>(row.out);
  Vec squares = set1(0.0f);
  if (row.residual != nullptr) {
    const T* residual = static_cast<const T*>(row.residual);
    T* sum = static_cast<T*>(row.sum);
    for_each_vec(row.cols, [&](int64_t i, int lanes) {
      const Vec v = round_to<T>(add(load_up_to(x + i, lanes), load_up_to(residual + i, lanes)));
      store_up_to(sum + i, v, lanes);
      squares = fma(v, v, squares);
    });
    x = sum;
  } else {
    for_each_vec(row.cols, [&](int64_t i, int lanes) {
      const Vec v = load_up_to(x + i, lanes);
      squares = fma(v, v, squares);
    });
  }
  const float mean = reduce_add(squares) / static_cast<float>(row.cols);
  const Vec inverse = set1(1.0f / std::sqrt(mean + row.eps));
  for_each_vec(row.cols, [&](int64_t i, int lanes) {
    const Vec v = mul(load_up_to(x + i, lanes), inverse);
    store_up_to(out + i, mul(v, load_up_to(row.weight + i, lanes)), lanes);
  });
}

template <typename T>
void rope_head(const void* x, const float* cos_sin, void* out, int64_t pairs, bool interleaved) {
  const T* from = static_cast<const T*>(x);
  T* to = static_cast<T*>(out);
  for_each_vec(pairs, [&](int64_t i, int lanes) {
    const Vec c = load_up_to(cos_sin + i, lanes);
    const Vec s = load_up_to(cos_sin + pairs + i, lanes);
    if (!interleaved) {
      const Vec a = load_up_to(from + i, lanes);
      const Vec b = load_up_to(from + pairs + i, lanes);
      store_up_to(to + i, fnma(b, s, mul(a, c)), lanes);
      store_up_to(to + pairs + i, fma(a, s, mul(b, c)), lanes);
      return;
    }
    T first[kLanes] = {};
    T second[kLanes] = {};
    for (int lane = 0; lane < lanes; ++lane) {
      first[lane] = from[2 * (i + lane)];
      second[lane] = from[2 * (i + lane) + 1];
    }
    const Vec a = load(first);
    const Vec b = load(second);
    store(first, fnma(b, s, mul(a, c)));
    store(second, fma(a, s, mul(b, c)));
    for (int lane = 0; lane < lanes; ++lane) {
      to[2 * (i + lane)] = first[lane];
      to[2 * (i + lane) + 1] = second[lane];
    }
  });
}

}  // namespace
}  // namespace mrv1::MRV1_SIMD_NAMESPACE

#include "ops/attention_body.h"
#include "ops/cache_code_body.h"
#include "ops/fp4_panel_body.h"

namespace mrv1::MRV1_SIMD_NAMESPACE {
namespace {

template <typename T>
constexpr TypedVectorOps typed_vector_ops() {
  return {linear<T>,        decode_fp4_panel<T>, store_row<T>,   store_gated_mul_row<T>,
          gated_mul_row<T>, soft_cap_row<T>,     add_row<T>,     add_scaled_row<T>,
          norm_row<T>,      rope_head<T>,        attention<T, T>};
}

}  // namespace

extern const VectorOps kVectorOps;
const VectorOps kVectorOps = {typed_vector_ops<float>(), typed_vector_ops<BFloat16>(),
                              attention<float, Float16>, code_ops<float>(),
                              code_ops<BFloat16>(),      code_ops<Float16>()};

}  // namespace mrv1::MRV1_SIMD_NAMESPACE
