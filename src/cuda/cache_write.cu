// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// A thread takes pieces of 16 bytes (eight elements where codes are made of them) of keys and of
// values at the same place, all of which it asks for before it stores the first. The slot of a
// token is asked for at the same time, as only stores depend on it. For a scale of each token and
// head the pieces of a head lie in neighbouring lanes, a power of two of them.
// What is not aligned takes the last kernel, a warp for a head.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "cache_head.cuh"
#include "fast_divider.cuh"
#include "launch.h"
#include "ops/cache_write.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "cache_write";
constexpr int kThreads = 256;
constexpr int kPieceSize = 8;
// Vectors of keys, and as many of values, that a thread has in flight: more where bits are only
// copied, as the others need registers; one below kManyPieces, which is too little to do for all
// processors.
constexpr int kCopied = 4;
constexpr int kQuantised = 2;
constexpr int64_t kManyPieces = 1 << 18;

struct WriteArgs {
  const void* key;
  const void* value;
  int64_t key_stride, value_stride;  // elements
  KvCacheLayer cache;
  SlotMapping slots;
  int64_t num_tokens;
  // A chunk of tokens, whose places have 32 bits.
  int64_t chunk_tokens;
  // Places of a token, and of a head: pieces, or lanes where those are more.
  cuda::FastDivider row_places, head_places, block_size;
};

// What a thread does at one place.
struct Place {
  int64_t token;
  int32_t head;
  int32_t piece;  // of the head
  bool is_valid;
};

__device__ __forceinline__ Place place_of(const WriteArgs& args, uint32_t index) {
  const int64_t first_token = blockIdx.y * args.chunk_tokens;
  uint32_t within, piece;
  const uint32_t token = args.row_places.divide(index, within);
  const uint32_t head = args.head_places.divide(within, piece);
  const int64_t end = min(args.num_tokens - first_token, args.chunk_tokens);
  return {first_token + token, static_cast<int32_t>(head), static_cast<int32_t>(piece),
          token < end};
}

struct Target {
  uint32_t block, place;
};

__device__ __forceinline__ Target target_of(const WriteArgs& args, int64_t slot) {
  Target target;
  target.block = args.block_size.divide(static_cast<uint32_t>(slot), target.place);
  return target;
}

// `size`: of an element. Copies bits.
template <int kUnroll>
__global__ void __launch_bounds__(kThreads)
    cache_copy_kernel(const __grid_constant__ WriteArgs args, int32_t size) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const uint32_t first = blockIdx.x * (kThreads * kUnroll) + threadIdx.x;
  const int64_t vector_size = cuda::kVectorBytes / size;
  Place places[kUnroll];
  int32_t slots[kUnroll];
  uint4 keys[kUnroll], values[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    places[i] = place_of(args, first + i * kThreads);
    if (!places[i].is_valid) continue;
    const int64_t within =
        int64_t{places[i].head} * args.cache.head_dim + places[i].piece * vector_size;
    const int64_t key = (places[i].token * args.key_stride + within) * size;
    const int64_t value = (places[i].token * args.value_stride + within) * size;
    keys[i] = __ldcs(reinterpret_cast<const uint4*>(static_cast<const char*>(args.key) + key));
    values[i] =
        __ldcs(reinterpret_cast<const uint4*>(static_cast<const char*>(args.value) + value));
    slots[i] = static_cast<int32_t>(args.slots[places[i].token]);
  }
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (!places[i].is_valid || slots[i] < 0) continue;
    const Target target = target_of(args, slots[i]);
    const int64_t index =
        (cuda::cache_index(args.cache, target.block, target.place, places[i].head) +
         places[i].piece * vector_size) *
        size;
    *reinterpret_cast<uint4*>(static_cast<char*>(args.cache.key) + index) = keys[i];
    *reinterpret_cast<uint4*>(static_cast<char*>(args.cache.value) + index) = values[i];
  }
}

// Eight elements as they were loaded.
template <typename T>
struct Piece {
  uint4 vectors[kPieceSize / cuda::kVectorSize<T>];

  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (size_t i = 0; i < sizeof(vectors) / sizeof(uint4); ++i) {
      vectors[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
    }
  }
  __device__ __forceinline__ void unpack(float (&values)[kPieceSize]) const {
    if constexpr (sizeof(T) == 4) {
      float half[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        cuda::unpack(vectors[i], half);
#pragma unroll
        for (int j = 0; j < 4; ++j) values[4 * i + j] = half[j];
      }
    } else {
      cuda::unpack_as<T>(vectors[0], values);
    }
  }
};

__device__ __forceinline__ uint32_t max_halves(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t result;
  asm("max.u16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
#else
  return __vmaxu2(a, b);
#endif
}

// The largest finite magnitude among keys and among values, of a lane or of several. Magnitudes are
// in the order of their bits, so those of 16 bits are compared as integers, two at a time.
template <typename T>
class Largest {
 public:
  __device__ __forceinline__ void set(const Piece<T>& key, const Piece<T>& value) {
    halves_ = both(key.vectors[0], value.vectors[0]);
    if ((halves_ & 0xffffu) >= kInfinity || halves_ >> 16 >= kInfinity) {
      halves_ = both(finite(key.vectors[0]), finite(value.vectors[0]));
    }
  }
  // With those of the lane whose number differs by `offset`.
  __device__ __forceinline__ void exchange(int offset) {
    halves_ = max_halves(halves_, __shfl_xor_sync(cuda::kFullWarp, halves_, offset));
  }
  __device__ __forceinline__ float of(int side) const {
    return to_float(T{static_cast<uint16_t>(side == 0 ? halves_ & 0xffffu : halves_ >> 16)});
  }

 private:
  static_assert(sizeof(T) == 2);
  static constexpr uint32_t kInfinity = std::is_same_v<T, BFloat16> ? 0x7f80 : 0x7c00;
  static constexpr uint32_t kMagnitudes = 0x7fff7fff;

  static __device__ __forceinline__ uint32_t pairs(uint4 vector) {
    return max_halves(max_halves(vector.x & kMagnitudes, vector.y & kMagnitudes),
                      max_halves(vector.z & kMagnitudes, vector.w & kMagnitudes));
  }
  static __device__ __forceinline__ uint32_t both(uint4 key, uint4 value) {
    const uint32_t keys = pairs(key), values = pairs(value);
    return max_halves(__byte_perm(keys, values, 0x5410), __byte_perm(keys, values, 0x7632));
  }
  static __device__ uint32_t finite(uint32_t word) {
    const uint32_t low = word & 0x7fffu, high = word >> 16 & 0x7fffu;
    return (low < kInfinity ? low : 0) | (high < kInfinity ? high : 0) << 16;
  }
  static __device__ uint4 finite(uint4 vector) {
    return make_uint4(finite(vector.x), finite(vector.y), finite(vector.z), finite(vector.w));
  }

  uint32_t halves_;  // of keys below, of values above
};

template <>
class Largest<float> {
 public:
  __device__ __forceinline__ void set(const Piece<float>& key, const Piece<float>& value) {
    float values[kPieceSize];
    key.unpack(values);
    sides_[0] = cuda::largest_finite(values);
    value.unpack(values);
    sides_[1] = cuda::largest_finite(values);
  }
  __device__ __forceinline__ void exchange(int offset) {
#pragma unroll
    for (float& side : sides_) {
      side = fmaxf(side, __shfl_xor_sync(cuda::kFullWarp, side, offset));
    }
  }
  __device__ __forceinline__ float of(int side) const { return sides_[side]; }

 private:
  float sides_[2];
};

// Lanes of a head where it has a scale for each token: kAnyLanes, if they are no constant.
constexpr int kNoLanes = 0;
constexpr int kAnyLanes = -1;

template <typename T, typename F, int kLanes, int kUnroll>
__global__ void __launch_bounds__(kThreads)
    cache_quantise_kernel(const __grid_constant__ WriteArgs args, int32_t any_lanes) {
  constexpr bool kStoresScales = kLanes != kNoLanes;
  cuda::launch_next();
  cuda::wait_for_previous();
  const uint32_t first = blockIdx.x * (kThreads * kUnroll) + threadIdx.x;
  const KvScales& scales = args.cache.scales;
  Place places[kUnroll];
  int32_t slots[kUnroll];
  Piece<T> pieces[kUnroll][2];
  [[maybe_unused]] float scale[kUnroll][2];  // static ones
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    Place& place = places[i];
    place = place_of(args, first + i * kThreads);
    slots[i] = -1;
    const bool has_piece =
        place.is_valid && (!kStoresScales || place.piece * kPieceSize < args.cache.head_dim);
    pieces[i][0] = {};
    pieces[i][1] = {};
    if (!has_piece) continue;
    const int64_t within = int64_t{place.head} * args.cache.head_dim + place.piece * kPieceSize;
    const T* key = static_cast<const T*>(args.key) + place.token * args.key_stride + within;
    const T* value = static_cast<const T*>(args.value) + place.token * args.value_stride + within;
    pieces[i][0].load(key);
    pieces[i][1].load(value);
    slots[i] = static_cast<int32_t>(args.slots[place.token]);
    if constexpr (!kStoresScales) {
      scale[i][0] = scales.key[place.head * scales.head_stride];
      scale[i][1] = scales.value[place.head * scales.head_stride];
    }
  }
  [[maybe_unused]] Largest<T> largest[kUnroll];
  if constexpr (kStoresScales) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) largest[i].set(pieces[i][0], pieces[i][1]);
    // One level after the other, so that exchanges do not wait for each other.
    const int lanes = kLanes == kAnyLanes ? any_lanes : kLanes;
#pragma unroll
    for (int offset = cuda::kWarpSize / 2; offset > 0; offset /= 2) {
      if (offset >= lanes) continue;
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) largest[i].exchange(offset);
    }
  }
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (slots[i] < 0) continue;
    const Target target = target_of(args, slots[i]);
    const Place& place = places[i];
    const int64_t index = cuda::cache_index(args.cache, target.block, target.place, place.head) +
                          place.piece * kPieceSize;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float factor;
      if constexpr (!kStoresScales) {
        factor = scale[i][side];
      } else {
        factor = kv_token_scale<F>(largest[i].of(side));
        if (place.piece == 0) {
          (side == 0 ? scales.key
                     : scales.value)[scales.index(target.block, target.place, place.head)] = factor;
        }
      }
      float values[kPieceSize];
      pieces[i][side].unpack(values);
      char* codes = static_cast<char*>(side == 0 ? args.cache.key : args.cache.value);
      *reinterpret_cast<uint2*>(codes + index) = cuda::encode<F>(values, 1.0f / factor);
    }
  }
}

constexpr int kWarps = kThreads / cuda::kWarpSize;

// A warp for a head of the keys or of the values, element by element. F: T where bits are copied.
template <typename T, typename F>
__global__ void __launch_bounds__(kThreads)
    cache_plain_kernel(const __grid_constant__ WriteArgs args) {
  constexpr int kMaxElements = 8;  // of a lane: heads have at most 256
  cuda::launch_next();
  cuda::wait_for_previous();
  const KvCacheLayer& cache = args.cache;
  const int lane = threadIdx.x % cuda::kWarpSize;
  const int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / cuda::kWarpSize;
  const int64_t token = index / (2 * cache.num_kv_heads);
  if (token >= args.num_tokens) return;
  const auto rest = static_cast<int32_t>(index % (2 * cache.num_kv_heads));
  const bool is_key = rest < cache.num_kv_heads;
  const int32_t head = is_key ? rest : rest - cache.num_kv_heads;
  const int64_t slot = args.slots[token];
  if (slot < 0) return;
  const Target target = target_of(args, slot);
  const T* from = static_cast<const T*>(is_key ? args.key : args.value) +
                  token * (is_key ? args.key_stride : args.value_stride) +
                  int64_t{head} * cache.head_dim;
  F* to = static_cast<F*>(is_key ? cache.key : cache.value) +
          cuda::cache_index(cache, target.block, target.place, head);
  if constexpr (std::is_same_v<T, F>) {
    for (int32_t i = lane; i < cache.head_dim; i += cuda::kWarpSize) to[i] = from[i];
  } else {
    float values[kMaxElements];
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kMaxElements; ++i) {
      const int at = i * cuda::kWarpSize + lane;
      values[i] = at < cache.head_dim ? to_float(from[at]) : 0.0f;
      largest = fmaxf(largest, cuda::finite_magnitude(values[i]));
    }
    const KvScales& scales = cache.scales;
    float* stored =
        (is_key ? scales.key : scales.value) + scales.index(target.block, target.place, head);
    float scale;
    if (scales.kind == KvScaleKind::kToken) {
#pragma unroll
      for (int offset = cuda::kWarpSize / 2; offset > 0; offset /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(cuda::kFullWarp, largest, offset));
      }
      scale = kv_token_scale<F>(largest);
      if (lane == 0) *stored = scale;
    } else {
      scale = *stored;
    }
    const float inverse = 1.0f / scale;
#pragma unroll
    for (int i = 0; i < kMaxElements; ++i) {
      const int at = i * cuda::kWarpSize + lane;
      const auto code = static_cast<uint8_t>(cuda::encode_pair<F>(values[i] * inverse, 0.0f));
      if (at < cache.head_dim) to[at] = F{code};
    }
  }
}

// Whether pieces lie where vectors may: 16 bytes of the source, `target_bytes` of the cache.
bool is_aligned(const CacheWriteParams& params, int64_t target_bytes) {
  const KvCacheLayer& cache = *params.cache;
  const auto size = static_cast<int64_t>(dtype_size(params.dtype));
  const auto target_size = static_cast<int64_t>(dtype_size(cache.dtype));
  const auto divides = [](int64_t bytes, auto... numbers) {
    return ((static_cast<int64_t>(numbers) % bytes == 0) && ...);
  };
  const auto address = [](const void* pointer) { return reinterpret_cast<intptr_t>(pointer); };
  return divides(cuda::kVectorBytes, address(params.key), address(params.value),
                 params.key_stride * size, params.value_stride * size) &&
         divides(target_bytes, address(cache.key), address(cache.value),
                 cache.block_stride * target_size, cache.token_stride * target_size,
                 cache.head_stride * target_size);
}

// Launches kernels by places: `kernel` for many of them, `small` for few.
template <typename... Params>
void launch_places(const StepContext& ctx, WriteArgs& args, int32_t head_places,
                   void (*kernel)(Params...), int in_flight, void (*small)(Params...),
                   int32_t extra) {
  const int64_t row = int64_t{args.cache.num_kv_heads} * head_places;
  // Indices of threads beyond the last token stay below 2^31, too.
  constexpr int64_t kMaxPlaces = (int64_t{1} << 31) - (1 << 16);
  check(row <= kMaxPlaces / 2, kOp, args.cache.num_kv_heads, " heads are too many");
  args.chunk_tokens = std::max<int64_t>(1, std::min(args.num_tokens, kMaxPlaces / row));
  args.row_places = cuda::FastDivider(static_cast<uint32_t>(row));
  args.head_places = cuda::FastDivider(static_cast<uint32_t>(head_places));
  const bool is_small = args.num_tokens * row < kManyPieces;
  const int64_t tile = int64_t{kThreads} * (is_small ? 1 : in_flight);
  const int64_t blocks = (args.chunk_tokens * row + tile - 1) / tile;
  const int64_t chunks = (args.num_tokens + args.chunk_tokens - 1) / args.chunk_tokens;
  const dim3 grid(static_cast<uint32_t>(blocks), static_cast<uint32_t>(chunks));
  cuda::launch(kOp, ctx, is_small ? small : kernel, grid, kThreads, 0, args, extra);
}

template <typename T, typename F>
void launch_quantise(const StepContext& ctx, WriteArgs& args) {
  constexpr int kMost = kQuantised * static_cast<int>(sizeof(BFloat16)) / sizeof(T);
  const int32_t pieces = args.cache.head_dim / kPieceSize;
  const auto run = [&](auto lanes, int32_t head_places) {
    constexpr int kLanes = decltype(lanes)::value;
    launch_places(ctx, args, head_places, cache_quantise_kernel<T, F, kLanes, kMost>, kMost,
                  cache_quantise_kernel<T, F, kLanes, 1>, head_places);
  };
  if (args.cache.scales.kind != KvScaleKind::kToken) {
    return run(std::integral_constant<int, kNoLanes>{}, pieces);
  }
  int32_t lanes = 1;
  while (lanes < pieces) lanes *= 2;
  if (lanes == 16) return run(std::integral_constant<int, 16>{}, lanes);
  run(std::integral_constant<int, kAnyLanes>{}, lanes);
}

template <typename T, typename F>
void launch_plain(const StepContext& ctx, WriteArgs& args) {
  const int64_t heads = args.num_tokens * 2 * args.cache.num_kv_heads;
  const int64_t blocks = (heads + kWarps - 1) / kWarps;
  check(blocks <= std::numeric_limits<int32_t>::max(), kOp, heads, " heads are too many");
  cuda::launch(kOp, ctx, cache_plain_kernel<T, F>, dim3(static_cast<uint32_t>(blocks)), kThreads, 0,
               args);
}

template <typename T>
void launch_write(const CacheWriteParams& params, const StepContext& ctx, WriteArgs& args) {
  const KvCacheLayer& cache = args.cache;
  if (!is_float8(cache.dtype)) {
    if (!is_aligned(params, cuda::kVectorBytes)) return launch_plain<T, T>(ctx, args);
    return launch_places(ctx, args, cache.head_dim / cuda::kVectorSize<T>,
                         cache_copy_kernel<kCopied>, kCopied, cache_copy_kernel<1>,
                         static_cast<int32_t>(sizeof(T)));
  }
  const auto quantise = [&](auto format) {
    using F = typename decltype(format)::type;
    if (!is_aligned(params, kPieceSize)) return launch_plain<T, F>(ctx, args);
    launch_quantise<T, F>(ctx, args);
  };
  if (cache.dtype == DType::kE4M3) {
    quantise(TypeTag<Float8E4M3>{});
  } else {
    quantise(TypeTag<Float8E5M2>{});
  }
}

}  // namespace

void cache_write_cuda(const CacheWriteParams& params, const StepContext& ctx) {
  const KvCacheLayer& cache = *params.cache;
  check_cache_write(kOp, cache, {cache.num_kv_heads, cache.num_kv_heads, cache.head_dim},
                    params.dtype);
  if (ctx.sizes.num_tokens == 0) return;
  WriteArgs args{};
  args.key = params.key;
  args.value = params.value;
  args.key_stride = params.key_stride;
  args.value_stride = params.value_stride;
  args.cache = cache;
  args.slots = slots_of(params.slots, params.kv_group, ctx);
  args.num_tokens = ctx.sizes.num_tokens;
  args.block_size = cuda::FastDivider(static_cast<uint32_t>(cache.block_size));
  switch (params.dtype) {
    case DType::kF32:
      return launch_write<float>(params, ctx, args);
    case DType::kBF16:
      return launch_write<BFloat16>(params, ctx, args);
    default:
      return launch_write<Float16>(params, ctx, args);
  }
}

}  // namespace mrv1
