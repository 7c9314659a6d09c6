// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Methods of _core.Ops that move blocks of a paged KV cache. python/mrv1/ops documents them.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <set>
#include <tuple>

#include "bind/cache_operand.h"
#include "bind/ops_call.h"

namespace mrv1 {
namespace {

// Which blocks go where.
using BlockPairs = std::vector<std::pair<int32_t, int32_t>>;

// The block arrays of a cache, where the kernels find them.
const CacheArray* list_arrays(OpCall& call, const std::vector<CacheArray>& arrays) {
  const size_t bytes = arrays.size() * sizeof(CacheArray);
  void* listed = call.scratch(static_cast<int64_t>(bytes));
  call.device().copy_in_stream(listed, arrays.data(), bytes, call.stream());
  return static_cast<const CacheArray*>(listed);
}

// Calls launch(count, first) for pieces of at most `most` of them.
template <typename Fn>
void by_pieces(size_t total, size_t most, const Fn& launch) {
  for (size_t first = 0; first < total; first += most) {
    launch(static_cast<int32_t>(std::min(total - first, most)), static_cast<int64_t>(first));
  }
}

void copy_blocks(const OpsHandle& self, nb::handle key, nb::handle value, const BlockPairs& mapping,
                 const std::string& kv_cache_dtype, nb::handle k_scale, nb::handle v_scale,
                 nb::handle stream) {
  const auto context = self.share();
  OpCall call(*context, "copy_blocks", stream);
  const CacheOperand cache =
      cache_operand(call, {key, value, k_scale, v_scale, kv_cache_dtype}, std::nullopt, true);
  std::vector<BlockCopy> copies;
  for (const auto& [source, target] : mapping) copies.push_back({source, target});
  check_copies(copies, cache.layer.num_blocks);
  const std::vector<CacheArray> arrays = block_arrays(cache.layer);
  CopyBlocksParams params{};
  params.arrays = list_arrays(call, arrays);
  params.num_arrays = static_cast<int32_t>(arrays.size());
  params.num_blocks = cache.layer.num_blocks;
  call.launch(0, [&](const Kernels& kernels, const StepContext& ctx) {
    by_pieces(copies.size(), CopyBlocksParams::kMaxCopies, [&](int32_t count, int64_t first) {
      params.count = count;
      std::copy_n(copies.begin() + first, count, params.copies);
      kernels.copy_blocks(params, ctx);
    });
  });
}

void zero_blocks(const OpsHandle& self, nb::handle key, nb::handle value,
                 const std::vector<int32_t>& blocks, const std::string& kv_cache_dtype,
                 nb::handle k_scale, nb::handle v_scale, nb::handle stream) {
  const auto context = self.share();
  OpCall call(*context, "zero_blocks", stream);
  const CacheOperand cache =
      cache_operand(call, {key, value, k_scale, v_scale, kv_cache_dtype}, std::nullopt, true);
  for (size_t i = 0; i < blocks.size(); ++i) {
    call.require(blocks[i] >= 0 && blocks[i] < cache.layer.num_blocks, "block_ids[", i, "] is ",
                 blocks[i], "; must be in [0, ", cache.layer.num_blocks, ")");
  }
  const std::vector<CacheArray> arrays = block_arrays(cache.layer);
  ZeroBlocksParams params{};
  params.arrays = list_arrays(call, arrays);
  params.num_arrays = static_cast<int32_t>(arrays.size());
  call.launch(0, [&](const Kernels& kernels, const StepContext& ctx) {
    by_pieces(blocks.size(), ZeroBlocksParams::kMaxBlocks, [&](int32_t count, int64_t first) {
      params.count = count;
      std::copy_n(blocks.begin() + first, count, params.blocks);
      kernels.zero_blocks(params, ctx);
    });
  });
}

DType gathered_dtype(const OpCall& call, const std::string& name, DType cache) {
  if (name.empty()) {
    call.require(!is_float8(cache),
                 "dtype is missing; an FP8 cache is gathered as float32, bfloat16 or float16");
    return cache;
  }
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  call.require(false, "dtype = '", name, "': must be float32, bfloat16 or float16");
  return cache;
}

nb::typed<nb::tuple, nb::object, nb::object> gather_blocks(
    const OpsHandle& self, nb::handle key, nb::handle value, nb::handle ids_array,
    int64_t num_tokens, const std::string& dtype, const std::string& kv_cache_dtype,
    nb::handle k_scale, nb::handle v_scale, nb::handle key_out, nb::handle value_out,
    nb::handle stream) {
  const auto context = self.share();
  OpCall call(*context, "gather_blocks", stream);
  const CacheOperand cache =
      cache_operand(call, {key, value, k_scale, v_scale, kv_cache_dtype}, std::nullopt, false);
  const KvCacheLayer& layer = cache.layer;
  const Operand ids = call.input("block_ids", ids_array);
  call.ints(ids);
  const std::span<const int32_t> blocks = call.look_for_cache<int32_t>(ids);
  for (size_t i = 0; i < blocks.size(); ++i) {
    call.require(blocks[i] >= 0 && blocks[i] < layer.num_blocks, "block_ids[", i, "] is ",
                 blocks[i], "; must be in [0, ", layer.num_blocks, ")");
  }
  const int64_t most = ids.cols() * layer.block_size;
  if (num_tokens < 0) num_tokens = most;
  call.require(num_tokens <= most, "num_tokens = ", num_tokens, ": must be at most ", most,
               ", what the blocks hold");
  GatherBlocksParams params{};
  params.cache = &layer;
  params.block_ids = static_cast<const int32_t*>(ids.data);
  params.num_tokens = num_tokens;
  params.dtype = gathered_dtype(call, dtype, layer.dtype);
  const std::vector<int64_t> shape = {num_tokens, layer.num_kv_heads, layer.head_dim};
  const Operand keys = call.output("key_out", key_out, shape, params.dtype);
  const Operand values = call.output("value_out", value_out, shape, params.dtype);
  params.key = keys.data;
  params.value = values.data;
  for (const Operand* out : {&keys, &values}) {
    call.no_partial_overlap(*out, ids);
    for (const Operand& read : cache.arrays) {
      call.require(out->data != read.data || out->size() == 0, out->name, " is ", read.name);
      call.no_partial_overlap(*out, read);
    }
  }
  call.require(keys.data != values.data || keys.size() == 0, "value_out is key_out");
  call.no_partial_overlap(keys, values);
  call.launch(0, [&](const Kernels& kernels, const StepContext& ctx) {
    kernels.gather_blocks(params, ctx);
  });
  return nb::make_tuple(call.result(keys), call.result(values));
}

// Bytes from a block to the next one, and of a block, whose elements follow each other.
std::pair<int64_t, int64_t> block_bytes(const OpCall& call, const Operand& operand) {
  int64_t stride = 1;
  for (int i = operand.ndim; i-- > 1;) {
    call.require(operand.shape[i] == 1 || operand.strides[i] == stride, operand.name,
                 " has stride ", operand.strides[i], " in dimension ", i,
                 "; the elements of a block must be contiguous");
    stride *= operand.shape[i];
  }
  call.require(operand.strides[0] >= stride || operand.shape[0] <= 1, operand.name, " has stride ",
               operand.strides[0], " in dimension 0; blocks must not overlap");
  const int64_t size = operand.dtype.bits / 8;
  return {operand.strides[0] * size, stride * size};
}

void swap_blocks(const OpsHandle& self, nb::handle source_array, nb::handle target_array,
                 const BlockPairs& mapping, nb::handle stream) {
  const auto context = self.share();
  OpCall call(*context, "swap_blocks", stream);
  // An array of another library says in which stream, rather than one of ours.
  const bool target_first =
      nb::isinstance<DeviceArray>(source_array) && !nb::isinstance<DeviceArray>(target_array);
  Operand source, target;
  if (target_first) target = call.in_place("target", target_array);
  source = call.input("source", source_array);
  if (!target_first) target = call.in_place("target", target_array);
  call.require(source.dtype == target.dtype, "target is of another dtype than source");
  call.require(source.ndim == target.ndim &&
                   std::equal(source.shape + 1, source.shape + source.ndim, target.shape + 1),
               "target has blocks of another shape than source");
  SwapBlocksParams params{};
  params.source = source.data;
  params.target = target.data;
  std::tie(params.source_stride, params.bytes) = block_bytes(call, source);
  std::tie(params.target_stride, params.bytes) = block_bytes(call, target);
  call.require(source.data != target.data || source.size() == 0, "target is source");
  call.no_partial_overlap(target, source);
  std::vector<BlockCopy> copies;
  std::set<int32_t> written;
  for (size_t i = 0; i < mapping.size(); ++i) {
    const auto& [from, to] = mapping[i];
    call.require(from >= 0 && from < source.shape[0], "block_mapping[", i, "] reads block ", from,
                 "; must be in [0, ", source.shape[0], ")");
    call.require(to >= 0 && to < target.shape[0], "block_mapping[", i, "] writes block ", to,
                 "; must be in [0, ", target.shape[0], ")");
    call.require(written.insert(to).second, "block_mapping writes block ", to,
                 " twice; each must be written once");
    copies.push_back({from, to});
  }
  call.launch(0, [&](const Kernels& kernels, const StepContext& ctx) {
    by_pieces(copies.size(), SwapBlocksParams::kMaxCopies, [&](int32_t count, int64_t first) {
      params.count = count;
      std::copy_n(copies.begin() + first, count, params.copies);
      kernels.swap_blocks(params, ctx);
    });
  });
}

}  // namespace

void bind_block_ops(nb::class_<OpsHandle>& ops) {
  const auto none = [](const char* name) { return nb::arg(name) = nb::none(); };
  ops.def("copy_blocks", &copy_blocks, nb::arg("key_cache"), nb::arg("value_cache"),
          nb::arg("block_mapping"), nb::arg("kv_cache_dtype") = "auto", none("k_scale"),
          none("v_scale"), none("stream"))
      .def("zero_blocks", &zero_blocks, nb::arg("key_cache"), nb::arg("value_cache"),
           nb::arg("block_ids"), nb::arg("kv_cache_dtype") = "auto", none("k_scale"),
           none("v_scale"), none("stream"))
      .def("gather_blocks", &gather_blocks, nb::arg("key_cache"), nb::arg("value_cache"),
           nb::arg("block_ids"), nb::arg("num_tokens") = -1, nb::arg("dtype") = "",
           nb::arg("kv_cache_dtype") = "auto", none("k_scale"), none("v_scale"), none("key_out"),
           none("value_out"), none("stream"))
      .def("swap_blocks", &swap_blocks, nb::arg("source"), nb::arg("target"),
           nb::arg("block_mapping"), none("stream"));
}

}  // namespace mrv1
