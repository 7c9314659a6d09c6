// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
// No include guard: each vector_ops_<isa>.cc includes this once, after it has defined
// MRV1_SIMD_NAMESPACE and chosen the compiler's target, and gets 16 floats as `Vec` in a namespace
// of its own. Nothing here may be seen under two targets by one name.

#if defined(MRV1_SIMD_AVX512) || defined(MRV1_SIMD_AVX2)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "core/float8.h"

#define MRV1_INLINE inline __attribute__((always_inline))

namespace mrv1::MRV1_SIMD_NAMESPACE {

constexpr int kLanes = 16;
constexpr uint32_t kInfinityBits = 0x7f800000u;

#if defined(MRV1_SIMD_AVX512)

struct Vec {
  __m512 v;
};

MRV1_INLINE Vec set1(float value) { return {_mm512_set1_ps(value)}; }
MRV1_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
MRV1_INLINE Vec load(const BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
MRV1_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
MRV1_INLINE Vec load_partial(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(first_lanes(n), p)};
}
MRV1_INLINE Vec load_partial(const BFloat16* p, int n) {
  const __m256i half = _mm256_maskz_loadu_epi16(first_lanes(n), p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
// from_float<BFloat16> by lane.
MRV1_INLINE __m256i round_bf16(Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i upper = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, upper, _mm512_set1_epi32(0x40)));
}
MRV1_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
MRV1_INLINE void store(BFloat16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_bf16(a));
}
MRV1_INLINE void store_partial(float* p, Vec a, int n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), a.v);
}
MRV1_INLINE void store_partial(BFloat16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), round_bf16(a));
}
MRV1_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
MRV1_INLINE Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
MRV1_INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
MRV1_INLINE Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
MRV1_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
MRV1_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
MRV1_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
MRV1_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
// a * 2^n for whole n, rounded once.
MRV1_INLINE Vec scale_pow2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// Lanes of `a` where `test` is not NaN, else those of `test`.
MRV1_INLINE Vec keep_nan(Vec test, Vec a) {
  return {_mm512_mask_mov_ps(a.v, _mm512_cmp_ps_mask(test.v, test.v, _CMP_UNORD_Q), test.v)};
}
// Lanes [begin, end) of `a`, the rest `fill`.
MRV1_INLINE Vec keep_lanes(Vec a, int begin, int end, Vec fill) {
  const __mmask16 mask = static_cast<__mmask16>(first_lanes(end) & ~first_lanes(begin));
  return {_mm512_mask_mov_ps(fill.v, mask, a.v)};
}
// Words of a bfloat16 panel (pairs of columns) as floats: the first or the second column.
struct Words {
  __m512i v;
};
MRV1_INLINE Words load_words(const void* p) { return {_mm512_loadu_si512(p)}; }
MRV1_INLINE Words set1_word(uint32_t word) { return {_mm512_set1_epi32(static_cast<int>(word))}; }
MRV1_INLINE Vec lower_half(Words w) { return {_mm512_castsi512_ps(_mm512_slli_epi32(w.v, 16))}; }
MRV1_INLINE Vec upper_half(Words w) {
  return {
      _mm512_castsi512_ps(_mm512_and_si512(w.v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}

#elif defined(MRV1_SIMD_AVX2)

struct Vec {
  __m256 a, b;
};

MRV1_INLINE __m256 half_bf16(const BFloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
MRV1_INLINE __m128i round_half_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i upper = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
}

MRV1_INLINE Vec set1(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
MRV1_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
MRV1_INLINE Vec load(const BFloat16* p) { return {half_bf16(p), half_bf16(p + 8)}; }
MRV1_INLINE void store(float* p, Vec x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
MRV1_INLINE void store(BFloat16* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), round_half_bf16(x.a));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), round_half_bf16(x.b));
}
MRV1_INLINE Vec add(Vec x, Vec y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
MRV1_INLINE Vec sub(Vec x, Vec y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
MRV1_INLINE Vec mul(Vec x, Vec y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
MRV1_INLINE Vec div(Vec x, Vec y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
MRV1_INLINE Vec max(Vec x, Vec y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
MRV1_INLINE Vec min(Vec x, Vec y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
MRV1_INLINE Vec fma(Vec x, Vec y, Vec z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
MRV1_INLINE Vec fnma(Vec x, Vec y, Vec z) {
  return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}
MRV1_INLINE __m256 pow2_half(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
// a * 2^n for whole n in [-252, 254], in two factors so that subnormal results are rounded once.
MRV1_INLINE __m256 scale_half(__m256 v, __m256 exponent) {
  const __m256i n = _mm256_cvtps_epi32(exponent);
  const __m256i n1 = _mm256_srai_epi32(n, 1);
  return _mm256_mul_ps(_mm256_mul_ps(v, pow2_half(n1)), pow2_half(_mm256_sub_epi32(n, n1)));
}
MRV1_INLINE Vec scale_pow2(Vec x, Vec n) { return {scale_half(x.a, n.a), scale_half(x.b, n.b)}; }
MRV1_INLINE __m256 keep_nan_half(__m256 test, __m256 v) {
  return _mm256_blendv_ps(v, test, _mm256_cmp_ps(test, test, _CMP_UNORD_Q));
}
MRV1_INLINE Vec keep_nan(Vec test, Vec x) {
  return {keep_nan_half(test.a, x.a), keep_nan_half(test.b, x.b)};
}
struct Words {
  __m256i a, b;
};
MRV1_INLINE Words load_words(const void* p) {
  const __m256i* words = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(words), _mm256_loadu_si256(words + 1)};
}
MRV1_INLINE Words set1_word(uint32_t word) {
  const __m256i v = _mm256_set1_epi32(static_cast<int>(word));
  return {v, v};
}
MRV1_INLINE Vec lower_half(Words w) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(w.a, 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(w.b, 16))};
}
MRV1_INLINE Vec upper_half(Words w) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(w.a, mask)),
          _mm256_castsi256_ps(_mm256_and_si256(w.b, mask))};
}

#else

typedef float Quad __attribute__((vector_size(16)));
typedef uint32_t QuadWords __attribute__((vector_size(16)));
typedef int32_t QuadInts __attribute__((vector_size(16)));
typedef uint16_t QuadHalves __attribute__((vector_size(8)));
constexpr int kQuads = 4;

struct Vec {
  Quad q[kQuads];
};
struct Words {
  QuadWords q[kQuads];
};

template <typename To, typename From>
MRV1_INLINE To read_as(const From* p) {
  To value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}
template <typename Fn>
MRV1_INLINE Vec by_quad(const Fn& fn) {
  return Vec{{fn(0), fn(1), fn(2), fn(3)}};
}

MRV1_INLINE Vec set1(float value) {
  const Quad quad = {value, value, value, value};
  return Vec{{quad, quad, quad, quad}};
}
MRV1_INLINE Vec load(const float* p) {
  return by_quad([&](int i) { return read_as<Quad>(p + 4 * i); });
}
MRV1_INLINE Vec load(const BFloat16* p) {
  return by_quad([&](int i) {
    const QuadHalves halves = read_as<QuadHalves>(p + 4 * i);
    return reinterpret_cast<Quad>(__builtin_convertvector(halves, QuadWords) << 16);
  });
}
MRV1_INLINE void store(float* p, const Vec& x) { std::memcpy(p, x.q, sizeof(x.q)); }
// from_float<BFloat16> by lane.
MRV1_INLINE void store(BFloat16* p, const Vec& x) {
  for (int i = 0; i < kQuads; ++i) {
    const QuadWords bits = reinterpret_cast<QuadWords>(x.q[i]);
    const QuadWords rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const QuadWords nan = reinterpret_cast<QuadWords>(x.q[i] != x.q[i]);
    const QuadWords result = (((bits >> 16) | 0x40u) & nan) | (rounded & ~nan);
    const QuadHalves halves = __builtin_convertvector(result, QuadHalves);
    std::memcpy(p + 4 * i, &halves, sizeof(halves));
  }
}
MRV1_INLINE Vec add(const Vec& x, const Vec& y) {
  return by_quad([&](int i) { return x.q[i] + y.q[i]; });
}
MRV1_INLINE Vec sub(const Vec& x, const Vec& y) {
  return by_quad([&](int i) { return x.q[i] - y.q[i]; });
}
MRV1_INLINE Vec mul(const Vec& x, const Vec& y) {
  return by_quad([&](int i) { return x.q[i] * y.q[i]; });
}
MRV1_INLINE Vec div(const Vec& x, const Vec& y) {
  return by_quad([&](int i) { return x.q[i] / y.q[i]; });
}
MRV1_INLINE Vec max(const Vec& x, const Vec& y) {
  return by_quad([&](int i) { return x.q[i] > y.q[i] ? x.q[i] : y.q[i]; });
}
MRV1_INLINE Vec min(const Vec& x, const Vec& y) {
  return by_quad([&](int i) { return x.q[i] < y.q[i] ? x.q[i] : y.q[i]; });
}
// Rounds twice: the baseline has no fused multiply-add.
MRV1_INLINE Vec fma(const Vec& x, const Vec& y, const Vec& z) {
  return by_quad([&](int i) { return x.q[i] * y.q[i] + z.q[i]; });
}
MRV1_INLINE Vec fnma(const Vec& x, const Vec& y, const Vec& z) {
  return by_quad([&](int i) { return z.q[i] - x.q[i] * y.q[i]; });
}
// a * 2^n for whole n in [-252, 254], in two factors so that subnormal results are rounded once.
MRV1_INLINE Vec scale_pow2(const Vec& x, const Vec& n) {
  return by_quad([&](int i) {
    const QuadInts whole = __builtin_convertvector(n.q[i], QuadInts);
    const QuadInts n1 = whole >> 1;
    const QuadInts n2 = whole - n1;
    return x.q[i] * reinterpret_cast<Quad>((n1 + 127) << 23) *
           reinterpret_cast<Quad>((n2 + 127) << 23);
  });
}
MRV1_INLINE Vec keep_nan(const Vec& test, const Vec& x) {
  return by_quad([&](int i) { return test.q[i] != test.q[i] ? test.q[i] : x.q[i]; });
}
MRV1_INLINE Words load_words(const void* p) {
  Words words;
  std::memcpy(words.q, p, sizeof(words.q));
  return words;
}
MRV1_INLINE Words set1_word(uint32_t word) {
  const QuadWords quad = {word, word, word, word};
  return Words{{quad, quad, quad, quad}};
}
MRV1_INLINE Vec lower_half(const Words& w) {
  return by_quad([&](int i) { return reinterpret_cast<Quad>(w.q[i] << 16); });
}
MRV1_INLINE Vec upper_half(const Words& w) {
  return by_quad([&](int i) { return reinterpret_cast<Quad>(w.q[i] & 0xffff0000u); });
}

#endif

// Storage types that are only read here, as to_float has it (core/dtype.h, core/float8.h), by lane.
#if defined(MRV1_SIMD_AVX512)
constexpr int kCodeLanes = 16;
#elif defined(MRV1_SIMD_AVX2)
constexpr int kCodeLanes = 8;
#else
constexpr int kCodeLanes = 4;
#endif
typedef float CodeFloats __attribute__((vector_size(kCodeLanes * 4)));
typedef uint32_t CodeWords __attribute__((vector_size(kCodeLanes * 4)));

// kCodeLanes codes, each in a word of its own. Compilers make one element after the other of the
// plain conversion.
MRV1_INLINE CodeWords load_code_bytes(const void* p) {
#if defined(MRV1_SIMD_AVX512)
  return (CodeWords)_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#elif defined(MRV1_SIMD_AVX2)
  return (CodeWords)_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
#else
  typedef uint8_t Bytes __attribute__((vector_size(kCodeLanes)));
  return __builtin_convertvector(read_as<Bytes>(p), CodeWords);
#endif
}
MRV1_INLINE CodeWords load_code_halves(const void* p) {
#if defined(MRV1_SIMD_AVX512)
  return (CodeWords)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif defined(MRV1_SIMD_AVX2)
  return (CodeWords)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(read_as<QuadHalves>(p), CodeWords);
#endif
}

// The low byte of each word.
MRV1_INLINE void store_code_bytes(uint8_t* p, const CodeWords& words) {
#if defined(MRV1_SIMD_AVX512)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)words));
#else
  typedef uint8_t Bytes __attribute__((vector_size(kCodeLanes)));
  const Bytes bytes = __builtin_convertvector(words, Bytes);
  std::memcpy(p, &bytes, sizeof(bytes));
#endif
}

MRV1_INLINE CodeFloats words_to_floats(const CodeWords& words) {
  return reinterpret_cast<CodeFloats>(words);
}
MRV1_INLINE CodeWords floats_to_words(const CodeFloats& floats) {
  return reinterpret_cast<CodeWords>(floats);
}
MRV1_INLINE CodeWords select(const CodeWords& mask, const CodeWords& x, const CodeWords& y) {
  return (mask & x) | (~mask & y);
}

template <typename T>
struct CodeOf;
template <>
struct CodeOf<Float16> {
  static MRV1_INLINE CodeWords load(const void* p) { return load_code_halves(p); }
  static MRV1_INLINE CodeFloats decode(const CodeWords& code) {
    const CodeWords rest = (code & 0x7fffu) << 13;
    const CodeWords exponent = rest & (0x1fu << 23);
    const CodeWords special = reinterpret_cast<CodeWords>(exponent == (0x1fu << 23));
    const CodeWords normal = rest + (112u << 23) + (special & (112u << 23));
    const CodeWords raised = rest + (113u << 23);
    const CodeWords subnormal = floats_to_words(words_to_floats(raised) - 0x1p-14f);
    const CodeWords is_subnormal = reinterpret_cast<CodeWords>(exponent == 0);
    return words_to_floats(((code & 0x8000u) << 16) | select(is_subnormal, subnormal, normal));
  }
};
template <>
struct CodeOf<Float8E5M2> {
  static MRV1_INLINE CodeWords load(const void* p) { return load_code_bytes(p); }
  static MRV1_INLINE CodeFloats decode(const CodeWords& code) {
    return CodeOf<Float16>::decode(code << 8);
  }
};
template <>
struct CodeOf<Float8E4M3> {
  static MRV1_INLINE CodeWords load(const void* p) { return load_code_bytes(p); }
  static MRV1_INLINE CodeFloats decode(const CodeWords& code) {
    const CodeWords rest = code & 0x7fu;
    const CodeWords normal = (rest << 20) + (120u << 23);
    const CodeWords raised = (rest << 20) + (121u << 23);
    const CodeWords subnormal = floats_to_words(words_to_floats(raised) - 0x1p-6f);
    const CodeWords is_nan = reinterpret_cast<CodeWords>(rest == 0x7fu);
    const CodeWords finite = select(reinterpret_cast<CodeWords>(rest < 8u), subnormal, normal);
    return words_to_floats(((code & 0x80u) << 24) | (finite & ~is_nan) | (is_nan & 0x7fc00000u));
  }
};

template <typename T>
MRV1_INLINE Vec load_codes(const T* p) {
  CodeFloats floats[kLanes / kCodeLanes];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes / kCodeLanes; ++i) {
    floats[i] = CodeOf<T>::decode(CodeOf<T>::load(p + i * kCodeLanes));
  }
  Vec result;
  static_assert(sizeof(result) == sizeof(floats));
  std::memcpy(&result, floats, sizeof(result));
  return result;
}
MRV1_INLINE Vec load(const Float16* p) { return load_codes(p); }
MRV1_INLINE Vec load(const Float8E4M3* p) { return load_codes(p); }
MRV1_INLINE Vec load(const Float8E5M2* p) { return load_codes(p); }
// from_float<Float16> by lane.
MRV1_INLINE void store(Float16* p, const Vec& x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<Float16>(lanes[i]);
}

template <typename T>
MRV1_INLINE Vec load_partial(const T* p, int n) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, sizeof(T) * static_cast<size_t>(n));
  return load(lanes);
}
template <typename T>
MRV1_INLINE void store_partial(T* p, const Vec& x, int n) {
  T lanes[kLanes];
  store(lanes, x);
  std::memcpy(p, lanes, sizeof(T) * static_cast<size_t>(n));
}

#if !defined(MRV1_SIMD_AVX512)

// Lanes [begin, end) of `x`, the rest `fill`.
MRV1_INLINE Vec keep_lanes(const Vec& x, int begin, int end, const Vec& fill) {
  float lanes[kLanes];
  float kept[kLanes];
  store(lanes, fill);
  store(kept, x);
  for (int i = begin; i < end; ++i) lanes[i] = kept[i];
  return load(lanes);
}

#endif

// Sum and maximum of the 16 lanes, in a fixed order.
MRV1_INLINE float reduce_add(const Vec& x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}
MRV1_INLINE float reduce_max(const Vec& x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) {
      lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    }
  }
  return lanes[0];
}

// x = n ln 2 + r with |r| <= ln 2 / 2, and q such that exp(r) = 1 + q r: the Taylor polynomial of
// degree 7, whose remainder is below 0.1 ulp there.
struct ReducedExp {
  Vec n, r, q;
};
MRV1_INLINE ReducedExp reduce_exp(const Vec& x) {
  // Adding 1.5 * 2^23 leaves the nearest whole number in the low bits of the mantissa.
  const Vec shift = set1(12582912.0f);
  const Vec n = sub(fma(x, set1(1.44269504088896341f), shift), shift);
  // ln 2 in two parts, the first short enough for n times it to be exact.
  Vec r = fnma(n, set1(0.693359375f), x);
  r = fnma(n, set1(-2.12194440054690583e-4f), r);
  Vec p = set1(1.0f / 5040);
  p = fma(p, r, set1(1.0f / 720));
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  return {n, r, fma(p, r, set1(1.0f))};
}

// exp(x) within 2 ulp. Overflows to infinity, underflows through the subnormals to 0; NaN stays
// NaN.
MRV1_INLINE Vec exp(const Vec& x) {
  const ReducedExp e = reduce_exp(min(max(x, set1(-105.0f)), set1(89.0f)));
  return keep_nan(x, scale_pow2(fma(e.q, e.r, set1(1.0f)), e.n));
}

// tanh(x) within 4 ulp: m / (m + 2) with m = exp(2 x) - 1 = 2^n q r + (2^n - 1), which is accurate
// near 0, too. Past 10 it is 1 in float32. NaN stays NaN.
MRV1_INLINE Vec tanh(const Vec& x) {
  const ReducedExp e = reduce_exp(min(max(add(x, x), set1(-20.0f)), set1(20.0f)));
  const Vec power = scale_pow2(set1(1.0f), e.n);
  const Vec m = fma(power, mul(e.q, e.r), sub(power, set1(1.0f)));
  return keep_nan(x, div(m, add(m, set1(2.0f))));
}

// cap * tanh(x * scale), scale being 1 / cap times what x is scaled by.
MRV1_INLINE Vec soft_cap(const Vec& x, float scale, float cap) {
  return mul(tanh(mul(x, set1(scale))), set1(cap));
}

// activation(gate) * up.
template <Activation kActivation>
MRV1_INLINE Vec gated_mul(const Vec& gate, const Vec& up) {
  Vec z = gate;
  if constexpr (kActivation == Activation::kGeluTanh) {
    const Vec cube = mul(mul(gate, gate), gate);
    z = mul(fma(cube, set1(kGeluCubic), gate), set1(kGeluScale));
  }
  const Vec denominator = add(set1(1.0f), exp(sub(set1(0.0f), z)));
  return mul(div(gate, denominator), up);
}

}  // namespace mrv1::MRV1_SIMD_NAMESPACE
