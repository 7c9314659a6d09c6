// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
// No include guard: heads as FP8 codes, for one instruction set. See simd_cpu.h, which comes
// before.

namespace mrv1::MRV1_SIMD_NAMESPACE {
namespace {

MRV1_INLINE CodeFloats code_floats(const float* p) {
  CodeFloats floats;
  std::memcpy(&floats, p, sizeof(floats));
  return floats;
}
MRV1_INLINE CodeFloats code_floats(const BFloat16* p) {
  return words_to_floats(load_code_halves(p) << 16);
}
MRV1_INLINE CodeFloats code_floats(const Float16* p) {
  return CodeOf<Float16>::decode(load_code_halves(p));
}

// float8_from_float by lane.
template <typename F>
MRV1_INLINE CodeWords encode_lanes(const CodeFloats& values) {
  constexpr int kShift = 23 - F::kMantissaBits;
  constexpr uint32_t kMinNormal = (128u - F::kBias) << 23;
  constexpr uint32_t kRebias = (127u - F::kBias) << F::kMantissaBits;
  constexpr uint32_t kStepAsLastPlace = kMinNormal + (static_cast<uint32_t>(kShift) << 23);
  const CodeWords bits = floats_to_words(values);
  const CodeWords sign = (bits >> 24) & 0x80u;
  const CodeWords magnitude = bits & 0x7fffffffu;
  const CodeWords rounded = magnitude + ((1u << (kShift - 1)) - 1) + ((magnitude >> kShift) & 1u);
  const CodeWords normal = (rounded >> kShift) - kRebias;
  const CodeWords subnormal =
      floats_to_words(words_to_floats(magnitude) + bits_to_float(kStepAsLastPlace)) -
      kStepAsLastPlace;
  const CodeWords is_subnormal = reinterpret_cast<CodeWords>(magnitude < kMinNormal);
  CodeWords code = select(is_subnormal, subnormal, normal);
  const CodeWords is_most = reinterpret_cast<CodeWords>(code > uint32_t{F::kMaxCode});
  code = sign | (is_most & uint32_t{F::kMaxCode}) | (~is_most & code);
  const CodeWords is_nan = reinterpret_cast<CodeWords>(magnitude > 0x7f800000u);
  return (is_nan & 0x7fu) | (~is_nan & code);
}

// Calls fn(i, n, floats) for pieces [i, i + n) of [0, count); lanes from n on are 0.
template <typename T, typename Fn>
MRV1_INLINE void for_each_code_vec(const T* values, int64_t count, const Fn& fn) {
  int64_t i = 0;
  for (; i + kCodeLanes <= count; i += kCodeLanes) fn(i, kCodeLanes, code_floats(values + i));
  if (i < count) {
    T rest[kCodeLanes] = {};
    std::memcpy(rest, values + i, sizeof(T) * static_cast<size_t>(count - i));
    fn(i, static_cast<int>(count - i), code_floats(rest));
  }
}

template <typename T>
float largest_finite(const void* values, int64_t count) {
  CodeWords largest = {};
  for_each_code_vec(
      static_cast<const T*>(values), count, [&](int64_t, int, const CodeFloats& floats) {
        // Magnitudes are in the order of their bits.
        const CodeWords magnitude = floats_to_words(floats) & 0x7fffffffu;
        const CodeWords finite = magnitude & reinterpret_cast<CodeWords>(magnitude < kInfinityBits);
        largest = select(reinterpret_cast<CodeWords>(finite > largest), finite, largest);
      });
  uint32_t most = 0;
  for (int lane = 0; lane < kCodeLanes; ++lane) most = largest[lane] > most ? largest[lane] : most;
  return bits_to_float(most);
}

template <typename T, typename F>
void encode(const void* values, float inverse, void* codes, int64_t count) {
  F* to = static_cast<F*>(codes);
  for_each_code_vec(static_cast<const T*>(values), count,
                    [&](int64_t i, int lanes, const CodeFloats& floats) {
                      uint8_t bytes[kCodeLanes];
                      store_code_bytes(bytes, encode_lanes<F>(floats * inverse));
                      std::memcpy(to + i, bytes, static_cast<size_t>(lanes));
                    });
}

template <typename T>
constexpr CodeOps code_ops() {
  return {largest_finite<T>, encode<T, Float8E4M3>, encode<T, Float8E5M2>};
}

}  // namespace
}  // namespace mrv1::MRV1_SIMD_NAMESPACE
