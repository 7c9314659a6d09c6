// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "program/kv_store.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "ops/fill_random.h"

namespace mrv1 {
namespace {

// Of each part of the memory, as kernels read it in vectors.
constexpr int64_t kPartAlignment = 256;

int64_t align(int64_t bytes) {
  return (bytes + kPartAlignment - 1) / kPartAlignment * kPartAlignment;
}

// Parts of a slot's memory: keys, values and, where tokens have them, the scales of both.
int64_t num_parts(const KvCacheSpec& spec) {
  return spec.scale_kind() == KvScaleKind::kToken ? 4 : 2;
}

bool has_one_each(const KvLayerScales& scales) {
  return scales.key.size() == 1 && scales.value.size() == 1;
}

// Floats of a layer's static scales of keys, or of values.
int64_t static_count(const KvCacheSpec& spec, const HeadShape& heads) {
  return spec.scale_kind() == KvScaleKind::kHead ? heads.num_kv_heads : 1;
}

}  // namespace

KvScaleKind KvCacheSpec::scale_kind() const {
  if (!dtype.has_value()) return KvScaleKind::kNone;
  if (static_scales.empty()) return KvScaleKind::kToken;
  const bool one = std::all_of(static_scales.begin(), static_scales.end(), has_one_each);
  return one ? KvScaleKind::kTensor : KvScaleKind::kHead;
}

std::optional<DType> kv_cache_dtype_from_name(std::string_view name, std::string_view where) {
  if (name == "fp8_e4m3") return DType::kE4M3;
  if (name == "fp8_e5m2") return DType::kE5M2;
  check(name == "auto", where, "kv_cache_dtype is '", name,
        "', must be auto, fp8_e4m3 or fp8_e5m2");
  return std::nullopt;
}

std::string_view kv_cache_dtype_name(const std::optional<DType>& dtype) {
  if (!dtype.has_value()) return "auto";
  return *dtype == DType::kE4M3 ? "fp8_e4m3" : "fp8_e5m2";
}

void check_kv_spec(const KvCacheSpec& spec, const Program& program, std::string_view where) {
  check(!spec.dtype.has_value() || is_float8(*spec.dtype), where, "a KV cache of ",
        dtype_name(spec.dtype.value_or(DType::kF32)), " is not supported");
  if (spec.static_scales.empty()) return;
  check(spec.dtype.has_value(), where, "kv_scales are for an FP8 cache, kv_cache_dtype is auto");
  check(spec.static_scales.size() == program.kv_layers().size(), where, "kv_scales has ",
        spec.static_scales.size(), " layers, must have ", program.kv_layers().size());
  for (size_t i = 0; i < spec.static_scales.size(); ++i) {
    const auto heads = static_cast<size_t>(program.kv_layers()[i].num_kv_heads);
    for (const auto& [side, scales] : {std::pair("key", &spec.static_scales[i].key),
                                       std::pair("value", &spec.static_scales[i].value)}) {
      check(scales->size() == 1 || scales->size() == heads, where, "layer ", i, " has ",
            scales->size(), " ", side, " scales, must have 1 or one for each of ", heads, " heads");
      for (const float scale : *scales) {
        check(std::isfinite(scale) && scale >= kMinKvScale, where, "a ", side, " scale of layer ",
              i, " is ", scale, ", must be finite and at least 2^-126");
      }
    }
  }
}

KvCacheLayer kv_cache_layer(const KvCacheSpec& spec, const Program& program, size_t kv_layer,
                            int32_t num_blocks, int32_t block_size) {
  return kv_cache_layer(spec.cache_dtype(program), num_blocks, block_size,
                        program.kv_layers()[kv_layer], spec.scale_kind());
}

int64_t KvStore::block_bytes(const KvCacheSpec& spec, const Program& program, int32_t block_size) {
  int64_t bytes = 0;
  for (const size_t i : program.kv_layout().slot_layers()) {
    const KvCacheLayer layer = kv_cache_layer(spec, program, i, 1, block_size);
    bytes += 2 * (layer.bytes() + layer.scale_bytes());
  }
  return bytes;
}

int64_t KvStore::other_bytes(const KvCacheSpec& spec, const Program& program) {
  const auto slots = static_cast<int64_t>(program.kv_layout().slot_layers().size());
  int64_t bytes =
      slots * num_parts(spec) * (kPartAlignment + static_cast<int64_t>(sizeof(CacheArray)));
  if (!spec.static_scales.empty()) {
    for (const HeadShape& heads : program.kv_layers()) {
      bytes += 2 * static_count(spec, heads) * static_cast<int64_t>(sizeof(float));
    }
  }
  return bytes;
}

KvStore::KvStore(Device& device, const KvCacheSpec& spec, const Program& program,
                 int32_t num_blocks, int32_t block_size)
    : device_(device), layout_(program.kv_layout()) {
  const int64_t bytes = block_bytes(spec, program, block_size) * num_blocks;
  const std::vector<size_t> slots = layout_.slot_layers();
  const auto slack = static_cast<int64_t>(slots.size()) * num_parts(spec) * kPartAlignment;
  memory_ = device_.allocate(static_cast<size_t>(bytes + slack), "KV cache");
  for (size_t i = 0; i < layout_.layers.size(); ++i) {
    layers_.push_back(kv_cache_layer(spec, program, i, num_blocks, block_size));
  }
  char* next = static_cast<char*>(memory_.data());
  const auto take = [&](int64_t part) {
    char* at = next;
    next += align(part);
    return at;
  };
  std::vector<CacheArray> arrays;
  for (const size_t i : slots) {
    KvCacheLayer& layer = layers_[i];
    for (void** side : {&layer.key, &layer.value}) *side = take(layer.bytes());
    if (layer.scales.kind == KvScaleKind::kToken) {
      for (float** side : {&layer.scales.key, &layer.scales.value}) {
        *side = reinterpret_cast<float*>(take(layer.scale_bytes()));
      }
    }
    const std::vector<CacheArray> parts = block_arrays(layer);
    arrays.insert(arrays.end(), parts.begin(), parts.end());
  }
  for (size_t i = 0; i < layers_.size(); ++i) {
    const KvCacheLayer& owner = layers_[slots[static_cast<size_t>(layout_.layers[i].slot)]];
    layers_[i].key = owner.key;
    layers_[i].value = owner.value;
    layers_[i].scales.key = owner.scales.key;
    layers_[i].scales.value = owner.scales.value;
  }
  load_static_scales(spec, program);
  num_arrays_ = static_cast<int32_t>(arrays.size());
  array_list_ = device_.allocate(arrays.size() * sizeof(CacheArray), "KV cache");
  device_.copy_in(array_list_.data(), arrays.data(), arrays.size() * sizeof(CacheArray));
}

void KvStore::load_static_scales(const KvCacheSpec& spec, const Program& program) {
  if (spec.static_scales.empty()) return;
  std::vector<float> values;
  std::vector<size_t> starts;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const auto count = static_cast<size_t>(static_count(spec, program.kv_layers()[i]));
    for (const std::vector<float>* side :
         {&spec.static_scales[i].key, &spec.static_scales[i].value}) {
      starts.push_back(values.size());
      for (size_t j = 0; j < count; ++j) {
        values.push_back(side->size() == 1 ? side->front() : (*side)[j]);
      }
    }
  }
  static_scales_ = device_.allocate(values.size() * sizeof(float), "KV cache");
  device_.copy_in(static_scales_.data(), values.data(), values.size() * sizeof(float));
  auto* base = static_cast<float*>(static_scales_.data());
  for (size_t i = 0; i < layers_.size(); ++i) {
    layers_[i].scales.key = base + starts[2 * i];
    layers_[i].scales.value = base + starts[2 * i + 1];
  }
}

uint64_t fill_random(Device& device, const KvCacheLayer& layer, uint64_t key, uint64_t first) {
  const auto fill = [&](void* data, DType dtype, int64_t count, float center, float width) {
    fill_random(device, {data, dtype, count, key, first, center, width});
    first += static_cast<uint64_t>(count);
  };
  const bool codes = is_float8(layer.dtype);
  const float most = layer.dtype == DType::kE5M2 ? Float8E5M2::kMax : Float8E4M3::kMax;
  for (void* side : {layer.key, layer.value}) {
    fill(side, layer.dtype, layer.elements(), 0.0f, codes ? most : 1.0f);
  }
  if (layer.scales.kind == KvScaleKind::kToken) {
    const int64_t count = layer.scale_bytes() / static_cast<int64_t>(sizeof(float));
    for (float* side : {layer.scales.key, layer.scales.value}) {
      fill(side, DType::kF32, count, 0.75f / most, 0.25f / most);
    }
  }
  return first;
}

void KvStore::fill_random(uint64_t seed) {
  uint64_t first = 0;
  for (const size_t i : layout_.slot_layers()) {
    first = mrv1::fill_random(device_, layers_[i], seed, first);
  }
}

}  // namespace mrv1
