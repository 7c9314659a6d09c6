// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
// No include guard: the second part of vector_ops_body.h.

namespace mrv1::MRV1_SIMD_NAMESPACE {
namespace {

// The scratch of a tile. D is head_dim rounded up to 16.
struct AttentionScratch {
  char* queries;   // [rows, head_dim] of the type of products
  char* keys;      // kAttentionChunk / 16 panels of head_dim columns, as kPanel16
  char* decoded;   // [2, kAttentionChunk, head_dim]: keys and values of a cache of another type
  float* acc;      // [rows, D] unnormalised output
  float* probs;    // [rows, kAttentionChunk]
  float* row_max;  // [rows]
  float* row_sum;  // [rows]
};

MRV1_INLINE AttentionScratch split_scratch(const AttentionTile& tile, int64_t dim) {
  AttentionScratch s;
  float* p = static_cast<float*>(tile.scratch);
  s.queries = reinterpret_cast<char*>(p);
  p += kAttentionRows * dim;
  s.keys = reinterpret_cast<char*>(p);
  p += kAttentionChunk * dim;
  s.decoded = reinterpret_cast<char*>(p);
  p += 2 * kAttentionChunk * dim;
  s.acc = p;
  p += kAttentionRows * dim;
  s.probs = p;
  p += kAttentionRows * kAttentionChunk;
  s.row_max = p;
  s.row_sum = p + kAttentionRows;
  return s;
}

// dst[word * 16 + lane] = src[lane][word] for 4-byte words, a multiple of 4: 16 keys to one panel.
#if defined(MRV1_SIMD_AVX512)
MRV1_INLINE void pack_keys(const char* const* src, int64_t words, uint32_t* dst) {
  for (int64_t word = 0; word < words; word += 4) {
    // rows[j] holds 4 words each of keys j, 4 + j, 8 + j and 12 + j, ready for 4 x 4 transposes.
    __m512i rows[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const auto quad = [&](int k) __attribute__((always_inline)) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(src[4 * k + j] + word * 4));
      };
      rows[j] = _mm512_castsi128_si512(quad(0));
      rows[j] = _mm512_mask_broadcast_i32x4(rows[j], 0x00f0, quad(1));
      rows[j] = _mm512_mask_broadcast_i32x4(rows[j], 0x0f00, quad(2));
      rows[j] = _mm512_mask_broadcast_i32x4(rows[j], 0xf000, quad(3));
    }
    const __m512i low01 = _mm512_unpacklo_epi32(rows[0], rows[1]);
    const __m512i high01 = _mm512_unpackhi_epi32(rows[0], rows[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(rows[2], rows[3]);
    const __m512i high23 = _mm512_unpackhi_epi32(rows[2], rows[3]);
    uint32_t* out = dst + word * kLanes;
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(low01, low23));
    _mm512_storeu_si512(out + kLanes, _mm512_unpackhi_epi64(low01, low23));
    _mm512_storeu_si512(out + 2 * kLanes, _mm512_unpacklo_epi64(high01, high23));
    _mm512_storeu_si512(out + 3 * kLanes, _mm512_unpackhi_epi64(high01, high23));
  }
}
#else
MRV1_INLINE void pack_keys(const char* const* src, int64_t words, uint32_t* dst) {
  typedef uint32_t Four __attribute__((vector_size(16)));
  for (int64_t word = 0; word < words; word += 4) {
    for (int lane = 0; lane < kLanes; lane += 4) {
      Four rows[4];
      for (int j = 0; j < 4; ++j) std::memcpy(&rows[j], src[lane + j] + word * 4, 16);
      const Four low01 = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
      const Four high01 = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
      const Four low23 = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
      const Four high23 = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
      const Four columns[4] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5),
                               __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                               __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
                               __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
      for (int j = 0; j < 4; ++j) {
        std::memcpy(dst + (word + j) * kLanes + lane, &columns[j], 16);
      }
    }
  }
}
#endif

// Asks for the cache lines of count rows.
MRV1_INLINE void prefetch_rows(const char* const* rows, int count, int64_t bytes) {
  for (int j = 0; j < count; ++j) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(rows[j] + i);
  }
}

// acc[r] += probs[r, j] * values[j] over ascending j in [begin, end), for kVecs vectors of
// dimensions from `column` on, of which the last has `lanes` lanes.
template <typename T, int kRows, int kVecs>
MRV1_INLINE void value_tile(const float* probs, const char* const* values, int begin, int end,
                            int64_t column, int lanes, float* acc, int64_t acc_stride) {
  Vec sums[kRows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < kVecs; ++c) sums[r][c] = load(acc + r * acc_stride + c * kLanes);
  }
  for (int j = begin; j < end; ++j) {
    const T* value = reinterpret_cast<const T*>(values[j]) + column;
    Vec v[kVecs];
#pragma GCC unroll 16
    for (int c = 0; c < kVecs; ++c) {
      v[c] = c + 1 < kVecs ? load(value + c * kLanes) : load_up_to(value + c * kLanes, lanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec p = set1(probs[r * kAttentionChunk + j]);
#pragma GCC unroll 16
      for (int c = 0; c < kVecs; ++c) sums[r][c] = fma(p, v[c], sums[r][c]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < kVecs; ++c) store(acc + r * acc_stride + c * kLanes, sums[r][c]);
  }
}

template <typename T, int kRows, int kVecs>
void value_rows(const float* probs, const char* const* values, int begin, int end, int64_t column,
                int lanes, float* acc, int64_t acc_stride, int rows) {
  int r = 0;
  for (; r + kRows <= rows; r += kRows) {
    value_tile<T, kRows, kVecs>(probs + r * kAttentionChunk, values, begin, end, column, lanes,
                                acc + r * acc_stride, acc_stride);
  }
  if constexpr (kRows > 1) {
    if (r < rows) {
      value_rows<T, kRows - 1, kVecs>(probs + r * kAttentionChunk, values, begin, end, column,
                                      lanes, acc + r * acc_stride, acc_stride, rows - r);
    }
  }
}

template <typename T>
void add_values(const float* probs, const char* const* values, int begin, int end, int64_t head_dim,
                float* acc, int64_t acc_stride, int rows) {
  int64_t column = 0;
  for (; column + kWidePanels * kLanes <= head_dim; column += kWidePanels * kLanes) {
    value_rows<T, kWideRows, kWidePanels>(probs, values, begin, end, column, kLanes, acc + column,
                                          acc_stride, rows);
  }
  for (; column < head_dim; column += kLanes) {
    const int lanes = head_dim - column < kLanes ? static_cast<int>(head_dim - column) : kLanes;
    value_rows<T, kWideRows, 1>(probs, values, begin, end, column, lanes, acc + column, acc_stride,
                                rows);
  }
}

// Scores of one row to probabilities relative to the row's running maximum. Lanes outside
// [begin, end) become 0. Returns by what the row's earlier sums must be scaled.
MRV1_INLINE float softmax_chunk(float* scores, int begin, int end, float scale, float softcap,
                                float* row_max, float* row_sum) {
  const Vec minus_infinity = set1(bits_to_float(0xff800000u));
  const int num_vecs = (end + kLanes - 1) / kLanes;
  if (softcap > 0.0f) {
    for (int i = 0; i < num_vecs; ++i) {
      store(scores + i * kLanes, soft_cap(load(scores + i * kLanes), scale / softcap, softcap));
    }
    scale = 1.0f;
  }
  Vec highest = minus_infinity;
  for (int i = 0; i < num_vecs; ++i) {
    Vec s = mul(load(scores + i * kLanes), set1(scale));
    const int low = begin - i * kLanes;
    const int high = end - i * kLanes;
    if (low > 0 || high < kLanes) {
      s = keep_lanes(s,
                     low < 0        ? 0
                     : low > kLanes ? kLanes
                                    : low,
                     high < kLanes ? high : kLanes, minus_infinity);
    }
    store(scores + i * kLanes, s);
    highest = max(s, highest);
  }
  const float chunk_max = reduce_max(highest);
  const float new_max = chunk_max > *row_max ? chunk_max : *row_max;
  Vec sum = set1(0.0f);
  for (int i = 0; i < num_vecs; ++i) {
    const Vec p = exp(sub(load(scores + i * kLanes), set1(new_max)));
    store(scores + i * kLanes, p);
    sum = add(sum, p);
  }
  float factors[kLanes];
  store(factors, exp(set1(*row_max - new_max)));
  *row_max = new_max;
  *row_sum = *row_sum * factors[0] + reduce_add(sum);
  return factors[0];
}

#if defined(MRV1_SIMD_AVX512)
// FP8 to bfloat16, 32 codes at a time: the values of codes without a sign stand in four registers.
template <typename Code>
MRV1_INLINE void decode_by_table(const char* const* rows, int count, int64_t n, BFloat16* to) {
  constexpr int kCodes = 128, kStep = 32;
  Code codes[kCodes];
  BFloat16 values[kCodes];
  for (int i = 0; i < kCodes; ++i) codes[i].bits = static_cast<uint8_t>(i);
  for (int i = 0; i < kCodes; i += kLanes) store(values + i, load(codes + i));
  __m512i table[kCodes / kStep];
#pragma GCC unroll 4
  for (int i = 0; i < kCodes / kStep; ++i) table[i] = _mm512_loadu_si512(values + i * kStep);
  for (int j = 0; j < count; ++j, to += n) {
    for (int64_t i = 0; i < n; i += kStep) {
      const __mmask32 mask = n - i < kStep ? (__mmask32{1} << (n - i)) - 1 : ~__mmask32{0};
      const __m512i code = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, rows[j] + i));
      const __m512i low = _mm512_permutex2var_epi16(table[0], code, table[1]);
      const __m512i high = _mm512_permutex2var_epi16(table[2], code, table[3]);
      const __mmask32 is_high = _mm512_test_epi16_mask(code, _mm512_set1_epi16(0x40));
      const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(0x80)), 8);
      const __m512i value = _mm512_mask_blend_epi16(is_high, low, high);
      _mm512_mask_storeu_epi16(to + i, mask, _mm512_or_si512(value, sign));
    }
  }
}
#endif

// Rows of n elements to rows of T that follow each other, without scales: each code is a T,
// exactly.
template <typename T, typename Code>
void decode_rows(const char* const* rows, int count, int64_t n, T* to) {
#if defined(MRV1_SIMD_AVX512)
  if constexpr (sizeof(T) == sizeof(BFloat16) && sizeof(Code) == 1) {
    decode_by_table<Code>(rows, count, n, to);
    return;
  }
#endif
  for (int j = 0; j < count; ++j, to += n) {
    const Code* from = reinterpret_cast<const Code*>(rows[j]);
    for_each_vec(
        n, [&](int64_t i, int lanes) { store_up_to(to + i, load_up_to(from + i, lanes), lanes); });
  }
}

// Multiplies scores or probabilities of a row by what is the same for all elements of a key.
MRV1_INLINE void scale_positions(float* row, const float* scales, int count) {
  for (int i = 0; i < count; i += kLanes) store(row + i, mul(load(row + i), load(scales + i)));
}

// Flash-style online softmax (Milakov & Gimelshein 2018; Dao et al. 2022), each row by itself: what
// rows a tile holds decides only which keys and values are read together. Products take T, queries
// and outputs are of type Q. A cache of another type is decoded chunk by chunk; scales, one for a
// key and one for a value, are multiplied into scores and probabilities.
template <typename T, typename Q>
void attention(const AttentionTile& tile) {
  const int64_t dim = (tile.head_dim + kLanes - 1) / kLanes * kLanes;
  const int64_t size = sizeof(T);
  const int64_t cache_size = static_cast<int64_t>(dtype_size(tile.cache_dtype));
  void (*decode)(const char* const*, int, int64_t, T*) = nullptr;
  if (tile.cache_dtype == DType::kE4M3) {
    decode = decode_rows<T, Float8E4M3>;
  } else if (tile.cache_dtype == DType::kE5M2) {
    decode = decode_rows<T, Float8E5M2>;
  } else if (sizeof(Q) != sizeof(T)) {
    decode = decode_rows<T, Q>;
  }
  const int64_t head_dim = tile.head_dim;
  const int rows = tile.num_tokens * tile.num_heads;
  const AttentionScratch s = split_scratch(tile, dim);
  for (int t = 0; t < tile.num_tokens; ++t) {
    const Q* from = static_cast<const Q*>(tile.q) + t * tile.q_token_stride;
    T* to = reinterpret_cast<T*>(s.queries) + t * tile.num_heads * head_dim;
    if constexpr (sizeof(Q) == sizeof(T)) {
      std::memcpy(to, from, static_cast<size_t>(tile.num_heads * head_dim * size));
    } else {
      for_each_vec(tile.num_heads * head_dim, [&](int64_t i, int lanes) {
        store_up_to(to + i, load_up_to(from + i, lanes), lanes);
      });
    }
  }
  std::memset(s.acc, 0, static_cast<size_t>(rows * dim) * sizeof(float));
  for (int r = 0; r < rows; ++r) {
    s.row_max[r] = bits_to_float(0xff800000u);
    s.row_sum[r] = 0.0f;
  }

  const auto first_of = [&](int t) {
    const int64_t first = int64_t{tile.positions[t]} - tile.window + 1;
    return tile.window > 0 && first > 0 ? first : 0;
  };
  const int64_t tile_end = int64_t{tile.positions[tile.num_tokens - 1]} + 1;
  // Keys and values of the chunk in work and, for prefetching, keys of the next.
  const char* key_rows[2][kAttentionChunk];
  const char* values[kAttentionChunk];
  float key_scales[2][kAttentionChunk];
  float value_scales[2][kAttentionChunk];
  const auto count_at = [&](int64_t base) {
    return static_cast<int>(tile_end - base < kAttentionChunk ? tile_end - base : kAttentionChunk);
  };
  const auto find_keys = [&](int which, int64_t base) {
    const char** keys = key_rows[which];
    const int count = count_at(base);
    const int32_t* block = tile.block_table + base / tile.block_size;
    int64_t in_block = base % tile.block_size;
    for (int j = 0; j < count; ++j) {
      keys[j] = static_cast<const char*>(tile.key) +
                (*block * tile.block_stride + in_block * tile.token_stride) * cache_size;
      if (tile.key_scale != nullptr) {
        const int64_t at = *block * tile.scale_block_stride + in_block * tile.scale_token_stride;
        key_scales[which][j] = tile.key_scale[at];
        value_scales[which][j] = tile.value_scale[at];
      }
      if (++in_block == tile.block_size) {
        in_block = 0;
        ++block;
      }
    }
    // Lanes past the end are masked later; any readable key will do.
    for (int j = count; j < (count + kLanes - 1) / kLanes * kLanes; ++j) {
      keys[j] = keys[count - 1];
      key_scales[which][j] = value_scales[which][j] = 0.0f;
    }
  };
  const int64_t first_base = first_of(0) / kAttentionChunk * kAttentionChunk;
  find_keys(0, first_base);
  for (int64_t base = first_base; base < tile_end; base += kAttentionChunk) {
    const int count = count_at(base);
    const int which = static_cast<int>((base - first_base) / kAttentionChunk % 2);
    const char** keys = key_rows[which];
    for (int j = 0; j < count; ++j) {
      values[j] =
          static_cast<const char*>(tile.value) + (keys[j] - static_cast<const char*>(tile.key));
    }
    const int num_panels = (count + kLanes - 1) / kLanes;
    if (decode != nullptr) {
      T* decoded = reinterpret_cast<T*>(s.decoded);
      decode(keys, count, head_dim, decoded);
      for (int j = 0; j < num_panels * kLanes; ++j) {
        keys[j] = reinterpret_cast<const char*>(decoded + (j < count ? j : count - 1) * head_dim);
      }
    }

    LinearBlock block;
    block.x = s.queries;
    block.x_stride = head_dim;
    block.rows = rows;
    block.cols = head_dim;
    block.num_panels = num_panels;
    block.out = s.probs;
    block.out_stride = kAttentionChunk;
    for (int p = 0; p < num_panels; ++p) {
      char* panel = s.keys + p * kLanes * head_dim * size;
      pack_keys(keys + p * kLanes, head_dim * size / 4, reinterpret_cast<uint32_t*>(panel));
      block.panels[p] = panel;
    }
    prefetch_rows(values, count, head_dim * cache_size);
    linear<T>(block);
    if (decode != nullptr) {
      T* decoded = reinterpret_cast<T*>(s.decoded) + kAttentionChunk * head_dim;
      decode(values, count, head_dim, decoded);
      for (int j = 0; j < count; ++j) {
        values[j] = reinterpret_cast<const char*>(decoded + j * head_dim);
      }
    }

    bool same_range = true;
    int begins[kAttentionRows];
    int ends[kAttentionRows];
    for (int r = 0; r < rows; ++r) {
      const int t = r / tile.num_heads;
      const int64_t begin = first_of(t) - base;
      const int64_t end = int64_t{tile.positions[t]} + 1 - base;
      begins[r] = static_cast<int>(begin < 0 ? 0 : begin);
      ends[r] = static_cast<int>(end > count ? count : end);
      same_range = same_range && begins[r] == begins[0] && ends[r] == ends[0];
      if (begins[r] >= ends[r]) continue;
      float* probs = s.probs + r * kAttentionChunk;
      if (tile.key_scale != nullptr) scale_positions(probs, key_scales[which], ends[r]);
      const float factor = softmax_chunk(probs, begins[r], ends[r], tile.scale, tile.softcap,
                                         s.row_max + r, s.row_sum + r);
      if (tile.key_scale != nullptr) scale_positions(probs, value_scales[which], ends[r]);
      for (int64_t i = 0; i < dim; i += kLanes) {
        store(s.acc + r * dim + i, mul(load(s.acc + r * dim + i), set1(factor)));
      }
    }
    if (base + kAttentionChunk < tile_end) {
      find_keys(1 - which, base + kAttentionChunk);
      prefetch_rows(key_rows[1 - which], count_at(base + kAttentionChunk), head_dim * cache_size);
    }
    // A row must not meet values it may not see, were they only multiplied by 0: they may be NaN.
    if (same_range) {
      add_values<T>(s.probs, values, begins[0], ends[0], head_dim, s.acc, dim, rows);
    } else {
      for (int r = 0; r < rows; ++r) {
        add_values<T>(s.probs + r * kAttentionChunk, values, begins[r], ends[r], head_dim,
                      s.acc + r * dim, dim, 1);
      }
    }
  }

  for (int r = 0; r < rows; ++r) {
    Q* out = static_cast<Q*>(tile.out) + r / tile.num_heads * tile.out_token_stride +
             r % tile.num_heads * head_dim;
    const Vec sum = set1(s.row_sum[r]);
    const float* acc = s.acc + r * dim;
    for_each_vec(head_dim, [&](int64_t i, int lanes) {
      store_up_to(out + i, div(load(acc + i), sum), lanes);
    });
  }
}

}  // namespace
}  // namespace mrv1::MRV1_SIMD_NAMESPACE
