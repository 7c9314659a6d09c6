// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "core/device.h"
#include "ops/copy_blocks.h"
#include "ops/kv_cache.h"
#include "program/program.h"

namespace mrv1 {

// Scales that all elements of a layer's keys (or values) share, as a calibration found them: one,
// or one a head.
struct KvLayerScales {
  std::vector<float> key, value;
};

// What the KV caches of a program hold.
struct KvCacheSpec {
  std::optional<DType> dtype;                // FP8; none: the dtype of activations
  std::vector<KvLayerScales> static_scales;  // by kv layer; empty: each token and head has its own

  DType cache_dtype(const Program& program) const { return dtype.value_or(program.dtype()); }
  KvScaleKind scale_kind() const;
};

// "auto" for none, "fp8_e4m3" or "fp8_e5m2"; kInvalidArgument for any other name.
std::optional<DType> kv_cache_dtype_from_name(std::string_view name, std::string_view where);
std::string_view kv_cache_dtype_name(const std::optional<DType>& dtype);

// Throws kInvalidArgument naming the layer if scales do not fit the program, or are not finite and
// at least kMinKvScale.
void check_kv_spec(const KvCacheSpec& spec, const Program& program, std::string_view where);

// The cache of a kv layer; addresses are not filled in.
KvCacheLayer kv_cache_layer(const KvCacheSpec& spec, const Program& program, size_t kv_layer,
                            int32_t num_blocks, int32_t block_size);

// Fills all blocks of a layer with values uniform in [-1, 1), or below where it has scales of
// tokens, whose codes are uniform in what the format holds; static scales stay as they are. `key`
// and `first` as of FillRandomParams; returns the counter behind the last one used.
uint64_t fill_random(Device& device, const KvCacheLayer& layer, uint64_t key, uint64_t first);

// The caches of a program's kv layers. Layers at the same slot of different KV groups share memory
// (program/kv_layout.h): codes as well as the scales of tokens. Static scales are a layer's own.
class KvStore {
 public:
  KvStore(Device& device, const KvCacheSpec& spec, const Program& program, int32_t num_blocks,
          int32_t block_size);

  // Bytes of one block, of as many layers as a group has: keys, values and their scales.
  static int64_t block_bytes(const KvCacheSpec& spec, const Program& program, int32_t block_size);
  // Bytes beside the blocks: static scales, and what aligns the parts.
  static int64_t other_bytes(const KvCacheSpec& spec, const Program& program);

  // By kv layer; addresses never change.
  const std::vector<KvCacheLayer>& layers() const { return layers_; }
  // Arrays that a block has a part in, on the device: keys, values and scales of each slot.
  const CacheArray* arrays() const { return static_cast<const CacheArray*>(array_list_.data()); }
  int32_t num_arrays() const { return num_arrays_; }

  // Timing without a prefill.
  void fill_random(uint64_t seed);

 private:
  void load_static_scales(const KvCacheSpec& spec, const Program& program);

  Device& device_;
  KvLayout layout_;
  std::vector<KvCacheLayer> layers_;
  Buffer memory_, static_scales_, array_list_;
  int32_t num_arrays_ = 0;
};

}  // namespace mrv1
