// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "bind/cache_operand.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <span>

#include "ops/paged_attention.h"
#include "program/kv_store.h"

namespace mrv1 {
namespace {

constexpr int64_t kMaxSlots = std::numeric_limits<int32_t>::max();
constexpr const char* kCacheShape = "[blocks, block_size, kv_heads, head_dim]";
constexpr const char* kScaleShape =
    "[1], [kv_heads] or, for a scale of each token and head, [blocks, block_size, kv_heads]";

// A dimension of more than one element.
struct Dim {
  int64_t size, stride;
};

// The largest stride first.
std::vector<Dim> sorted_dims(const Operand& operand) {
  std::vector<Dim> dims;
  for (int i = 0; i < operand.ndim; ++i) {
    if (operand.shape[i] > 1) dims.push_back({operand.shape[i], operand.strides[i]});
  }
  std::sort(dims.begin(), dims.end(),
            [](const Dim& a, const Dim& b) { return a.stride > b.stride; });
  return dims;
}

// From the first element that `dims` address to past the last.
int64_t extent(std::span<const Dim> dims) {
  int64_t last = 0;
  for (const Dim& dim : dims) last += (dim.size - 1) * dim.stride;
  return last + 1;
}

// Each step is past all that smaller ones address, so no two elements lie at one place.
bool nests(std::span<const Dim> dims) {
  while (!dims.empty()) {
    const Dim first = dims.front();
    dims = dims.subspan(1);
    if (first.stride < extent(dims)) return false;
  }
  return true;
}

// Whether an element lies `distance` elements from another, by dimensions that nest.
bool has_distance(std::span<const Dim> dims, int64_t distance) {
  if (dims.empty()) return distance == 0;
  const Dim first = dims.front();
  const int64_t down = distance / first.stride - (distance % first.stride < 0 ? 1 : 0);
  for (int64_t steps : {down, down + 1}) {
    if (std::abs(steps) < first.size &&
        has_distance(dims.subspan(1), distance - steps * first.stride)) {
      return true;
    }
  }
  return false;
}

void check_positive_strides(const OpCall& call, const Operand& operand, int dims) {
  for (int i = 0; i < dims; ++i) {
    call.require(operand.strides[i] > 0 || operand.shape[i] <= 1, operand.name, " has stride ",
                 operand.strides[i], " in dimension ", i, "; must be positive");
  }
}

void check_same_strides(const OpCall& call, const Operand& key, const Operand& value) {
  call.require(std::equal(key.strides, key.strides + key.ndim, value.strides), value.name,
               " has other strides than ", key.name, "; they must be equal");
}

// No element lies where another one does.
void check_apart(const OpCall& call, const Operand& key, const Operand& value) {
  const std::vector<Dim> dims = sorted_dims(key);
  call.require(nests(dims), key.name,
               " has strides by which elements overlap or interleave; the step of each dimension "
               "must be past all that the smaller steps reach");
  const int64_t bytes = static_cast<const char*>(value.data) - static_cast<const char*>(key.data);
  const int64_t size = key.dtype.bits / 8;
  const bool overlaps = std::abs(bytes) < extent(dims) * size &&
                        (bytes % size != 0 || has_distance(dims, bytes / size));
  call.require(!overlaps, value.name, " overlaps ", key.name, "; they must share no element");
}

constexpr nb::dlpack::dtype kUint8{static_cast<uint8_t>(nb::dlpack::dtype_code::UInt), 8, 1};

// Element type of the cache.
DType cache_dtype(const OpCall& call, const Operand& key, const std::string& kv_cache_dtype,
                  std::optional<DType> activation) {
  if (const auto format = kv_cache_dtype_from_name(kv_cache_dtype, call.op())) {
    if (!(key.dtype == kUint8)) call.typed(key, *format);
    return *format;
  }
  for (DType format : {DType::kE4M3, DType::kE5M2}) {
    if (key.is(format)) return format;
  }
  call.require(!(key.dtype == kUint8), key.name,
               " is uint8; kv_cache_dtype must say which, fp8_e4m3 or fp8_e5m2");
  if (!activation.has_value()) {
    if (key.is(DType::kF16)) return DType::kF16;
    return call.activation(key);
  }
  call.typed(key, *activation);
  return *activation;
}

void check_static_scales(OpCall& call, const Operand& scales) {
  const std::span<const float> values = call.look_for_cache<float>(call.contiguous(scales));
  for (size_t i = 0; i < values.size(); ++i) {
    call.require(std::isfinite(values[i]) && values[i] >= kMinKvScale, scales.name, "[", i, "] is ",
                 values[i], "; scales must be finite and at least 2**-126");
  }
}

KvScales cache_scales(OpCall& call, const CacheArguments& arguments, const KvCacheLayer& layer,
                      bool written, std::vector<Operand>& arrays) {
  KvScales scales;
  const bool has_key = !arguments.k_scale.is_none(), has_value = !arguments.v_scale.is_none();
  if (!is_float8(layer.dtype)) {
    call.require(!has_key && !has_value, has_key ? "k_scale" : "v_scale",
                 " is given, and the cache is ", dtype_name(layer.dtype),
                 "; only an FP8 cache has scales");
    return scales;
  }
  call.require(has_key && has_value, has_key ? "v_scale" : "k_scale",
               " is missing; an FP8 cache needs k_scale and v_scale");
  const Operand key = call.scalars("k_scale", arguments.k_scale);
  const Operand value = call.scalars("v_scale", arguments.v_scale);
  for (const Operand* side : {&key, &value}) {
    call.typed(*side, DType::kF32);
    check_positive_strides(call, *side, side->ndim);
  }
  call.require(value.ndim == key.ndim, "v_scale must have the shape of k_scale");
  call.shaped(value, key.sizes());
  if (key.ndim == 3) {
    const int64_t shape[] = {layer.num_blocks, layer.block_size, layer.num_kv_heads};
    call.shaped(key, shape);
    check_same_strides(call, key, value);
    if (written) {
      check_apart(call, key, value);
      call.writable("k_scale", arguments.k_scale);
      call.writable("v_scale", arguments.v_scale);
    }
    scales.kind = KvScaleKind::kToken;
    scales.block_stride = key.strides[0];
    scales.token_stride = key.strides[1];
    scales.head_stride = key.strides[2];
  } else {
    const bool one = key.ndim == 1 && key.shape[0] == 1;
    call.require(one || (key.ndim == 1 && key.shape[0] == layer.num_kv_heads),
                 "k_scale must be of shape ", kScaleShape);
    scales.kind = one ? KvScaleKind::kTensor : KvScaleKind::kHead;
    scales.head_stride = one ? 0 : 1;
    check_static_scales(call, key);
    check_static_scales(call, value);
  }
  scales.key = static_cast<float*>(key.data);
  scales.value = static_cast<float*>(value.data);
  arrays.insert(arrays.end(), {key, value});
  return scales;
}

}  // namespace

DType named_cache_dtype(const OpCall& call, const std::string& kv_cache_dtype, DType activation) {
  return kv_cache_dtype_from_name(kv_cache_dtype, call.op()).value_or(activation);
}

void check_head_dim(const OpCall& call, int64_t head_dim) {
  call.require(head_dim > 0 && head_dim % 8 == 0 && head_dim <= kMaxHeadDim, "head_dim is ",
               head_dim, "; must be a multiple of 8 up to ", kMaxHeadDim);
}

CacheOperand cache_operand(OpCall& call, const CacheArguments& arguments,
                           std::optional<DType> activation, bool written) {
  const auto take = [&](const char* name, nb::handle array) {
    return written ? call.in_place(name, array) : call.input(name, array);
  };
  const Operand key = take("key_cache", arguments.key);
  const Operand value = take("value_cache", arguments.value);
  CacheOperand operand;
  operand.arrays = {key, value};
  KvCacheLayer& layer = operand.layer;
  layer.dtype = cache_dtype(call, key, arguments.kv_cache_dtype, activation);
  for (const Operand* side : {&key, &value}) {
    call.ndim(*side, 4, kCacheShape);
    call.require(side->dtype == key.dtype, side->name,
                 " is of another dtype than key_cache; they must be equal");
    call.require(side->strides[3] == 1 || side->shape[3] == 1, side->name, " has stride ",
                 side->strides[3], " in head_dim; must be 1");
    check_positive_strides(call, *side, 3);
  }
  call.shaped(value, key.sizes());
  call.require(key.shape[0] > 0 && key.shape[1] > 0 && key.shape[2] > 0,
               "key_cache must not be empty");
  check_head_dim(call, key.shape[3]);
  call.require(key.shape[2] <= kMaxHeads, "key_cache has ", key.shape[2],
               " heads; must have at most ", kMaxHeads);
  call.require(key.shape[0] <= kMaxSlots / key.shape[1], "key_cache has ", key.shape[0],
               " blocks of ", key.shape[1], " slots; must have fewer than 2**31 slots");
  check_same_strides(call, key, value);
  if (written) check_apart(call, key, value);
  layer.key = key.data;
  layer.value = value.data;
  layer.num_blocks = static_cast<int32_t>(key.shape[0]);
  layer.block_size = static_cast<int32_t>(key.shape[1]);
  layer.num_kv_heads = static_cast<int32_t>(key.shape[2]);
  layer.head_dim = static_cast<int32_t>(key.shape[3]);
  layer.block_stride = key.strides[0];
  layer.token_stride = key.strides[1];
  layer.head_stride = key.strides[2];
  layer.scales = cache_scales(call, arguments, layer, written, operand.arrays);
  return operand;
}

}  // namespace mrv1
