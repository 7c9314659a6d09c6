// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
// No include guard: part of vector_ops_body.h. NVFP4 panels become panels of activations' dtypes.

#include "core/float4.h"

namespace mrv1::MRV1_SIMD_NAMESPACE {
namespace {

// to_float(Float4E2M1) of the four low bits of each word.
MRV1_INLINE CodeFloats decode_fp4(const CodeWords& code) {
#if defined(MRV1_SIMD_AVX512)
  const __m512 values = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f,
                                       -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
  return (CodeFloats)_mm512_permutexvar_ps((__m512i)code, values);
#else
  const CodeWords rest = code & 7u;
  const CodeWords normal = (rest << 22) + (126u << 23);
  const CodeWords below_one = (0u - rest) & float_to_bits(0.5f);
  const CodeWords value = select(reinterpret_cast<CodeWords>(rest < 2u), below_one, normal);
  return words_to_floats(((code & 8u) << 28) | value);
#endif
}

// Both columns of a pair, as a panel has them.
MRV1_INLINE void store_pair(BFloat16* panel, int lane, const CodeFloats& first,
                            const CodeFloats& second) {
  const CodeWords words = (floats_to_words(first) >> 16) | (floats_to_words(second) & 0xffff0000u);
  std::memcpy(panel + 2 * lane, &words, sizeof(words));
}
MRV1_INLINE void store_pair(float* panel, int lane, const CodeFloats& first,
                            const CodeFloats& second) {
  std::memcpy(panel + lane, &first, sizeof(first));
  std::memcpy(panel + kLanes + lane, &second, sizeof(second));
}

template <typename T>
void decode_fp4_panel(const uint8_t* codes, const uint8_t* scales, int64_t cols, void* panel) {
  T* out = static_cast<T*>(panel);
  for (int64_t block = 0; block < cols / kFp4Block; ++block) {
#pragma GCC unroll 4
    for (int lane = 0; lane < kLanes; lane += kCodeLanes) {
      const CodeFloats scale = CodeOf<Float8E4M3>::decode(load_code_bytes(scales + lane));
#pragma GCC unroll 8
      for (int pair = 0; pair < kFp4Block / 2; ++pair) {
        const CodeWords bytes = load_code_bytes(codes + pair * kLanes + lane);
        store_pair(out + pair * 2 * kLanes, lane, decode_fp4(bytes) * scale,
                   decode_fp4(bytes >> 4) * scale);
      }
    }
    codes += kFp4Block / 2 * kLanes;
    scales += kLanes;
    out += kFp4Block * kLanes;
  }
}

}  // namespace
}  // namespace mrv1::MRV1_SIMD_NAMESPACE
