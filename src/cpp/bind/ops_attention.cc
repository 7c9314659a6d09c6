// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Methods of _core.Ops around the paged KV cache. python/mrv1/ops documents them.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "bind/cache_operand.h"
#include "bind/ops_call.h"

namespace mrv1 {
namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

// A batch as attention needs it, for as many calls as share it.
struct PlannedAttention {
  std::shared_ptr<Device> device;
  std::vector<StreamBuffer> buffers;
  InferParams infer{};
  RowState rows{};
  StepSizes sizes;
  AttentionPlan plan;
  int64_t num_blocks = 0;  // of the caches that its block table is for
};

struct PlannedAttentionHandle : Handle<PlannedAttention> {
  using Handle::Handle;
};

void check_heads(const OpCall& call, int32_t num_heads, int32_t num_kv_heads) {
  call.require(num_heads > 0 && num_kv_heads > 0 && num_heads % num_kv_heads == 0,
               "num_heads = ", num_heads, ": must be a positive multiple of num_kv_heads, ",
               num_kv_heads);
  call.require(num_heads <= kMaxHeads, "num_heads = ", num_heads, ": must be at most ", kMaxHeads);
}

HeadShape head_shape(OpCall& call, int64_t cols, int32_t num_heads, int32_t num_kv_heads) {
  check_heads(call, num_heads, num_kv_heads);
  const int64_t heads = int64_t{num_heads} + 2 * int64_t{num_kv_heads};
  call.require(cols % heads == 0, "qkv has ", cols, " columns; must be head_dim times the ", heads,
               " heads of q, k and v");
  return {num_heads, num_kv_heads, static_cast<int32_t>(cols / heads)};
}

// Slots of a cache write: -1 writes nothing, and nothing is written twice.
template <typename T>
void check_slot_values(OpCall& call, const Operand& slots, const KvCacheLayer& cache) {
  const std::span<const T> values = call.look_for_cache<T>(slots);
  const int64_t count = int64_t{cache.num_blocks} * cache.block_size;
  bool ascends = true;
  T last = -1;
  for (size_t i = 0; i < values.size(); ++i) {
    call.require(values[i] >= -1 && values[i] < count, "slot_mapping[", i, "] is ", values[i],
                 "; slots must be in [0, ", count, "), or -1 for none");
    if (values[i] < 0) continue;
    ascends = ascends && values[i] > last;
    last = values[i];
  }
  if (ascends) return;  // as those of one request do
  std::vector<T> sorted(values.begin(), values.end());
  std::sort(sorted.begin(), sorted.end());
  for (size_t i = 1; i < sorted.size(); ++i) {
    call.require(sorted[i] < 0 || sorted[i] != sorted[i - 1], "slot_mapping names slot ", sorted[i],
                 " twice; each must be written once");
  }
}

SlotMapping slots_operand(OpCall& call, nb::handle array, const KvCacheLayer& cache,
                          Operand& slots) {
  slots = call.input("slot_mapping", array);
  const bool is_wide = slots.dtype == element_type("int64").dlpack();
  call.contiguous(call.ndim(slots, 1, "[tokens]"));
  call.require(is_wide || slots.is(DType::kI32), "slot_mapping must be int32 or int64");
  call.require(slots.cols() <= kMaxInt, "slot_mapping has ", slots.cols(),
               " entries; must have fewer than 2**31");
  if (is_wide) {
    check_slot_values<int64_t>(call, slots, cache);
  } else {
    check_slot_values<int32_t>(call, slots, cache);
  }
  return {slots.data, is_wide};
}

void check_cache_heads(const OpCall& call, const KvCacheLayer& cache, int64_t heads,
                       int64_t head_dim) {
  call.require(cache.num_kv_heads == heads && cache.head_dim == head_dim, "key_cache has ",
               cache.num_kv_heads, " heads of ", cache.head_dim, "; must have ", heads, " of ",
               head_dim);
}

DType written_dtype(const OpCall& call, const Operand& operand) {
  return operand.is(DType::kF16) ? DType::kF16 : call.activation(operand);
}

nb::object qkv_prepare(const OpsHandle& self, const std::string& op, nb::handle qkv_array,
                       int32_t num_heads, int32_t num_kv_heads, nb::handle q_norm_array,
                       nb::handle k_norm_array, float eps, nb::handle rope_array,
                       nb::handle positions_array, bool interleaved, nb::handle key_array,
                       nb::handle value_array, nb::handle slots_array,
                       const std::string& kv_cache_dtype, nb::handle k_scale, nb::handle v_scale,
                       nb::handle out_array, nb::handle stream) {
  const auto context = self.share();
  OpCall call(*context, op.c_str(), stream);
  const Operand qkv = call.input("qkv", qkv_array);
  QkvPrepareParams params{};
  params.dtype = call.matrix(call.ndim(qkv, 2, "[tokens, (heads + 2 kv_heads) * head_dim]"));
  params.qkv = qkv.data;
  params.shape = head_shape(call, qkv.cols(), num_heads, num_kv_heads);
  check_head_dim(call, params.shape.head_dim);
  std::vector<Operand> read;
  if (!q_norm_array.is_none() || !k_norm_array.is_none()) {
    call.require(!q_norm_array.is_none() && !k_norm_array.is_none(),
                 "q_norm and k_norm must be given together");
    call.require(std::isfinite(eps) && eps >= 0.0f, "eps = ", eps,
                 ": must be finite and not negative");
    for (const auto& [name, array, to] : {std::tuple{"q_norm", q_norm_array, &params.q_norm},
                                          std::tuple{"k_norm", k_norm_array, &params.k_norm}}) {
      const Operand norm = call.input(name, array);
      call.floats(norm, params.shape.head_dim);
      *to = static_cast<const float*>(norm.data);
      read.push_back(norm);
    }
    params.eps = eps;
  }
  if (!rope_array.is_none()) {
    call.require(!positions_array.is_none(), "positions is missing; cos_sin needs it");
    const Operand rope = call.input("cos_sin", rope_array);
    call.typed(call.contiguous(call.ndim(rope, 2, "[max_position, 2 * pairs]")), DType::kF32);
    call.require(rope.cols() > 0 && rope.cols() % 2 == 0 && rope.cols() <= params.shape.head_dim &&
                     rope.rows() > 0,
                 "cos_sin is [", rope.rows(), ", ", rope.cols(),
                 "]; must be [max_position, 2 * pairs] with at most head_dim columns, ",
                 params.shape.head_dim);
    const Operand positions = call.input("positions", positions_array);
    call.ints(positions, qkv.rows());
    call.in_range(positions, 0, rope.rows(), "positions");
    params.rope = static_cast<const float*>(rope.data);
    params.rope_pairs = static_cast<int32_t>(rope.cols() / 2);
    params.interleaved = interleaved;
    params.max_position = rope.rows();
    call.context().infer.positions = static_cast<int32_t*>(positions.data);
    read.push_back(rope);
  }
  CacheOperand cache;
  if (!key_array.is_none() || !value_array.is_none() || !slots_array.is_none()) {
    call.require(!key_array.is_none() && !value_array.is_none() && !slots_array.is_none(),
                 "key_cache, value_cache and slot_mapping must be given together");
    cache = cache_operand(call, {key_array, value_array, k_scale, v_scale, kv_cache_dtype},
                          params.dtype, true);
    check_cache_heads(call, cache.layer, num_kv_heads, params.shape.head_dim);
    Operand slots;
    params.slots = slots_operand(call, slots_array, cache.layer, slots);
    call.shaped(slots, std::vector<int64_t>{qkv.rows()});
    params.cache = &cache.layer;
    read.push_back(slots);
    read.insert(read.end(), cache.arrays.begin(), cache.arrays.end());
  }
  const Operand out = call.output("out", out_array, qkv.sizes(), params.dtype);
  call.no_partial_overlap(out, qkv);
  for (const Operand& other : read) {
    call.require(out.data != other.data || out.size() == 0, "out is ", other.name);
    call.no_partial_overlap(out, other);
  }
  params.out = out.data;
  call.context().sizes.num_tokens = static_cast<int32_t>(qkv.rows());
  call.launch(0, [&](const Kernels& kernels, const StepContext& ctx) {
    if (qkv.rows() > 0) kernels.qkv_prepare(params, ctx);
  });
  return call.result(out);
}

// Writes the first tokens, as many as there are slots.
void write_cache(OpCall& call, CacheWriteParams params, int64_t tokens, int64_t heads,
                 int64_t head_dim, const CacheArguments& arguments, nb::handle slots_array) {
  const CacheOperand cache = cache_operand(call, arguments, params.dtype, true);
  check_cache_heads(call, cache.layer, heads, head_dim);
  Operand slots;
  params.slots = slots_operand(call, slots_array, cache.layer, slots);
  call.require(slots.cols() <= tokens, "slot_mapping has ", slots.cols(),
               " entries; must have at most one for each token, ", tokens);
  params.cache = &cache.layer;
  call.context().sizes.num_tokens = static_cast<int32_t>(slots.cols());
  call.launch(0, [&](const Kernels& kernels, const StepContext& ctx) {
    if (slots.cols() > 0) kernels.cache_write(params, ctx);
  });
}

void cache_write(const OpsHandle& self, nb::handle qkv_array, int32_t num_heads,
                 int32_t num_kv_heads, nb::handle key_array, nb::handle value_array,
                 nb::handle slots_array, const std::string& kv_cache_dtype, nb::handle k_scale,
                 nb::handle v_scale, nb::handle stream) {
  const auto context = self.share();
  OpCall call(*context, "cache_write", stream);
  const Operand qkv = call.input("qkv", qkv_array);
  call.contiguous(call.ndim(qkv, 2, "[tokens, (heads + 2 kv_heads) * head_dim]"));
  CacheWriteParams params{};
  params.dtype = written_dtype(call, qkv);
  const HeadShape shape = head_shape(call, qkv.cols(), num_heads, num_kv_heads);
  const auto size = static_cast<int64_t>(dtype_size(params.dtype));
  const int64_t kv_cols = int64_t{num_kv_heads} * shape.head_dim;
  params.key = static_cast<const char*>(qkv.data) + shape.q_cols() * size;
  params.value = static_cast<const char*>(params.key) + kv_cols * size;
  params.key_stride = params.value_stride = qkv.cols();
  write_cache(call, params, qkv.rows(), num_kv_heads, shape.head_dim,
              {key_array, value_array, k_scale, v_scale, kv_cache_dtype}, slots_array);
}

void reshape_and_cache(const OpsHandle& self, nb::handle key_array, nb::handle value_array,
                       nb::handle key_cache_array, nb::handle value_cache_array,
                       nb::handle slots_array, const std::string& kv_cache_dtype,
                       nb::handle k_scale, nb::handle v_scale, nb::handle stream) {
  const auto context = self.share();
  OpCall call(*context, "reshape_and_cache_flash", stream);
  const Operand key = call.input("key", key_array);
  CacheWriteParams params{};
  params.dtype = written_dtype(call, call.ndim(key, 3, "[tokens, kv_heads, head_dim]"));
  const Operand value = call.input("value", value_array);
  call.shaped(call.typed(call.ndim(value, 3, "[tokens, kv_heads, head_dim]"), params.dtype),
              key.sizes());
  for (const Operand* side : {&key, &value}) {
    const bool dense = (side->strides[2] == 1 || side->shape[2] == 1) &&
                       (side->strides[1] == side->shape[2] || side->shape[1] == 1) &&
                       (side->strides[0] >= 0);
    call.require(dense || side->size() == 0, side->name, " has strides [", side->strides[0], ", ",
                 side->strides[1], ", ", side->strides[2],
                 "]; the heads of a token must be contiguous");
  }
  params.key = key.data;
  params.value = value.data;
  params.key_stride = key.strides[0];
  params.value_stride = value.strides[0];
  write_cache(call, params, key.shape[0], key.shape[1], key.shape[2],
              {key_cache_array, value_cache_array, k_scale, v_scale, kv_cache_dtype}, slots_array);
}

// query_start_loc [B + 1] of at most `num_tokens` tokens; B.
int32_t check_starts(OpCall& call, const Operand& starts, int64_t num_tokens) {
  call.ints(starts);
  call.require(starts.cols() >= 1,
               "query_start_loc is empty; must have one entry more than "
               "there are requests");
  const std::span<const int32_t> values = call.look(starts);
  for (size_t i = 0; i < values.size(); ++i) {
    call.require(i == 0 ? values[i] == 0 : values[i] >= values[i - 1], "query_start_loc[", i,
                 "] is ", values[i], "; must begin at 0 and not decrease");
  }
  call.require(values.empty() || values.back() <= num_tokens, "query_start_loc ends at ",
               values.empty() ? 0 : values.back(), "; there are ", num_tokens, " tokens");
  return static_cast<int32_t>(starts.cols() - 1);
}

void check_table(OpCall& call, const Operand& table, int64_t num_requests) {
  call.typed(call.contiguous(call.ndim(table, 2, "[requests, max_blocks]")), DType::kI32);
  call.require(table.rows() == num_requests && table.cols() > 0 && table.cols() <= kMaxInt,
               "block_table is [", table.rows(), ", ", table.cols(), "]; must have ", num_requests,
               " rows and at least one column");
}

nb::object slot_mapping(const OpsHandle& self, nb::handle table_array, nb::handle positions_array,
                        nb::handle starts_array, int32_t block_size, nb::handle out_array,
                        nb::handle stream) {
  const auto context = self.share();
  OpCall call(*context, "slot_mapping", stream);
  call.require(block_size > 0, "block_size = ", block_size, ": must be positive");
  const Operand positions = call.input("positions", positions_array);
  call.ints(positions);
  const Operand starts = call.input("query_start_loc", starts_array);
  const int32_t num_requests = check_starts(call, starts, positions.cols());
  const Operand table = call.input("block_table", table_array);
  check_table(call, table, num_requests);
  call.in_range(positions, 0, table.cols() * block_size, "positions");
  call.in_range(table, 0, kMaxInt / block_size, "block ids");
  const Operand out = call.output("out", out_array, positions.sizes(), DType::kI32);
  for (const Operand* read : {&positions, &starts, &table}) call.no_partial_overlap(out, *read);
  TokenMapParams params{};
  params.num_requests = num_requests;
  params.num_tokens = static_cast<int32_t>(positions.cols());
  params.query_start_loc = static_cast<const int32_t*>(starts.data);
  params.positions = static_cast<int32_t*>(positions.data);
  params.slot_mapping = static_cast<int32_t*>(out.data);
  params.block_table = static_cast<const int32_t*>(table.data);
  params.max_blocks = static_cast<int32_t>(table.cols());
  params.block_size = block_size;
  call.launch(
      0, [&](const Kernels& kernels, const StepContext& ctx) { kernels.token_map(params, ctx); });
  return call.result(out);
}

nb::typed<nb::tuple, nb::object, nb::object, nb::object, nb::object, nb::object> infer_params(
    const OpsHandle& self, nb::handle starts_array, nb::handle lens_array, nb::handle table_array,
    int64_t num_tokens, int32_t block_size, nb::handle stream) {
  const auto context = self.share();
  OpCall call(*context, "infer_params", stream);
  call.require(block_size > 0, "block_size = ", block_size, ": must be positive");
  call.require(num_tokens >= 0 && num_tokens <= kMaxInt, "num_tokens = ", num_tokens,
               ": must be in [0, 2**31)");
  const Operand starts = call.input("query_start_loc", starts_array);
  const int32_t num_requests = check_starts(call, starts, num_tokens);
  const Operand lens = call.input("seq_lens", lens_array);
  call.ints(lens, num_requests);
  call.in_range(lens, 0, kMaxInt, "lengths");
  const Operand table = call.input("block_table", table_array);
  check_table(call, table, num_requests);
  call.in_range(table, 0, kMaxInt / block_size, "block ids");
  const auto output = [&](const char* name, int64_t count) {
    return call.output(name, nb::none(), {count}, DType::kI32);
  };
  const Operand positions = output("positions", num_tokens);
  const Operand token_batch = output("token_batch", num_tokens);
  const Operand slots = output("slot_mapping", num_tokens);
  const Operand row = output("row", num_requests);
  const Operand counts = output("counts", sizeof(InferCounts) / sizeof(int32_t));
  TokenMapParams params{};
  params.num_requests = num_requests;
  params.num_tokens = static_cast<int32_t>(num_tokens);
  params.query_start_loc = static_cast<const int32_t*>(starts.data);
  params.seq_lens = static_cast<const int32_t*>(lens.data);
  params.positions = static_cast<int32_t*>(positions.data);
  params.token_batch = static_cast<int32_t*>(token_batch.data);
  params.row = static_cast<int32_t*>(row.data);
  params.counts = static_cast<InferCounts*>(counts.data);
  params.slot_mapping = static_cast<int32_t*>(slots.data);
  params.block_table = static_cast<const int32_t*>(table.data);
  params.max_blocks = static_cast<int32_t>(table.cols());
  params.block_size = block_size;
  call.launch(
      0, [&](const Kernels& kernels, const StepContext& ctx) { kernels.token_map(params, ctx); });
  return nb::make_tuple(call.result(positions), call.result(token_batch), call.result(slots),
                        call.result(row), call.result(counts));
}

struct AttentionOptions {
  HeadShape shape;
  DType dtype, cache_dtype;
  int32_t window;
  float softcap;
  int32_t block_size;
  int64_t num_tokens;
};

// Reads the batch in and says what is to be launched; the arrays live as long as `planned`.
std::unique_ptr<PlannedAttention> plan_batch(OpCall& call, const AttentionOptions& options,
                                             const Operand& starts, const Operand& lens,
                                             const Operand& table, int64_t num_blocks) {
  call.require(options.window >= 0, "window = ", options.window, ": must not be negative");
  call.require(std::isfinite(options.softcap) && options.softcap >= 0.0f,
               "softcap = ", options.softcap, ": must be finite and not negative");
  call.require(options.num_tokens >= 0 && options.num_tokens <= kMaxInt,
               "num_tokens = ", options.num_tokens, ": must be in [0, 2**31)");
  const int32_t requests = check_starts(call, starts, options.num_tokens);
  call.ints(lens, requests);
  check_table(call, table, requests);
  call.require(options.block_size > 0, "block_size = ", options.block_size, ": must be positive");
  const std::span<const int32_t> from = call.look(starts);
  const std::span<const int32_t> lengths = call.look(lens);
  const std::span<const int32_t> blocks = call.look(table);
  for (size_t b = 0; b < lengths.size(); ++b) {
    const int64_t queries = from[b + 1] - from[b];
    const int64_t most = table.cols() * options.block_size;
    call.require(lengths[b] == 0 || (lengths[b] >= queries && lengths[b] <= most), "seq_lens[", b,
                 "] is ", lengths[b], "; must be 0, or in [", queries, ", ", most,
                 "]: the request's tokens of the call and what its blocks hold");
    const int64_t used = (lengths[b] + options.block_size - 1) / options.block_size;
    for (int64_t i = 0; i < used; ++i) {
      const int32_t block = blocks[static_cast<int64_t>(b) * table.cols() + i];
      call.require(block >= 0 && block < num_blocks, "block_table[", b, ", ", i, "] is ", block,
                   "; blocks must be in [0, ", num_blocks, ")");
    }
  }
  const auto ints = [&](int64_t count) {
    return static_cast<int32_t*>(call.scratch(count * static_cast<int64_t>(sizeof(int32_t))));
  };
  auto planned = std::make_unique<PlannedAttention>();
  planned->device = call.shared().device;
  planned->num_blocks = num_blocks;
  const auto tokens = static_cast<int32_t>(options.num_tokens);
  InferParams& infer = planned->infer;
  infer.max_requests = requests;
  infer.max_tokens = tokens;
  infer.query_start_loc = static_cast<int32_t*>(starts.data);
  infer.seq_lens = static_cast<int32_t*>(lens.data);
  infer.positions = ints(tokens);
  infer.token_batch = ints(tokens);
  infer.row = ints(requests);
  infer.counts = reinterpret_cast<InferCounts*>(ints(sizeof(InferCounts) / sizeof(int32_t)));
  RowState& rows = planned->rows;
  rows.num_rows = requests;
  rows.num_groups = 1;
  rows.block_size = options.block_size;
  rows.max_blocks = static_cast<int32_t>(table.cols());
  rows.max_model_len =
      static_cast<int32_t>(std::min<int64_t>(table.cols() * options.block_size, kMaxInt));
  rows.block_table = static_cast<int32_t*>(table.data);
  planned->sizes = {requests, tokens, 0};
  planned->plan.shape = options.shape;
  planned->plan.dtype = options.dtype;
  planned->plan.cache_dtype = options.cache_dtype;
  planned->plan.window = options.window;
  planned->plan.softcap = options.softcap;
  planned->plan.max_requests = std::max(requests, 1);
  planned->plan.max_tokens = std::max(tokens, 1);
  const int64_t bytes = call.device().kernels().attention_plan_bytes(planned->plan, call.device());
  planned->plan.data = call.scratch(bytes, true);
  return planned;
}

void use(OpCall& call, const PlannedAttention& planned) {
  StepContext& ctx = call.context();
  ctx.infer = planned.infer;
  ctx.rows = planned.rows;
  ctx.sizes = planned.sizes;
}

void launch_plan(const PlannedAttention& planned, const Kernels& kernels, const StepContext& ctx) {
  TokenMapParams params{};
  params.num_requests = ctx.sizes.num_requests;
  params.num_tokens = ctx.sizes.num_tokens;
  params.query_start_loc = ctx.infer.query_start_loc;
  params.seq_lens = ctx.infer.seq_lens;
  params.positions = ctx.infer.positions;
  params.token_batch = ctx.infer.token_batch;
  params.row = ctx.infer.row;
  params.counts = ctx.infer.counts;
  kernels.token_map(params, ctx);
  kernels.plan_attention(planned.plan, ctx);
}

// The plan keeps copies of the batch's arrays, so that the caller may write the next batch's.
std::unique_ptr<PlannedAttentionHandle> plan_attention(
    const OpsHandle& self, nb::handle starts_array, nb::handle lens_array, nb::handle table_array,
    int64_t num_tokens, int32_t num_heads, int32_t num_kv_heads, int32_t head_dim,
    int32_t block_size, int32_t num_blocks, const std::string& dtype_name, int32_t window,
    float softcap, const std::string& kv_cache_dtype, nb::handle stream) {
  const auto context = self.share();
  OpCall call(*context, "plan_attention", stream);
  const DType dtype = dtype_from_name(dtype_name);
  call.require(dtype == DType::kF32 || dtype == DType::kBF16 || dtype == DType::kF16, "dtype = '",
               dtype_name, "': must be float32, bfloat16 or float16");
  const DType cache_dtype = named_cache_dtype(call, kv_cache_dtype, dtype);
  check_heads(call, num_heads, num_kv_heads);
  check_head_dim(call, head_dim);
  Operand starts = call.input("query_start_loc", starts_array);
  Operand lens = call.input("seq_lens", lens_array);
  Operand table = call.input("block_table", table_array);
  std::unique_ptr<PlannedAttention> planned = plan_batch(call,
                                                         {{num_heads, num_kv_heads, head_dim},
                                                          dtype,
                                                          cache_dtype,
                                                          window,
                                                          softcap,
                                                          block_size,
                                                          num_tokens},
                                                         starts, lens, table, num_blocks);
  for (auto [operand, to] : {std::pair{&starts, &planned->infer.query_start_loc},
                             std::pair{&lens, &planned->infer.seq_lens},
                             std::pair{&table, &planned->rows.block_table}}) {
    const auto bytes = operand->size() * static_cast<int64_t>(sizeof(int32_t));
    *to = static_cast<int32_t*>(call.scratch(bytes));
    call.device().copy_in_stream(*to, operand->data, static_cast<size_t>(bytes), call.stream());
  }
  use(call, *planned);
  call.launch(0, [&](const Kernels& kernels, const StepContext& ctx) {
    launch_plan(*planned, kernels, ctx);
  });
  planned->buffers = call.take_scratch();
  return std::make_unique<PlannedAttentionHandle>(std::move(planned), "attention plan");
}

nb::object paged_attention(const OpsHandle& self, nb::handle q_array, nb::handle key_array,
                           nb::handle value_array, nb::handle table_array, nb::handle lens_array,
                           nb::handle starts_array, float scale, int32_t window, float softcap,
                           nb::handle plan_object, const std::string& kv_cache_dtype,
                           nb::handle k_scale, nb::handle v_scale, nb::handle out_array,
                           nb::handle stream) {
  const auto context = self.share();
  OpCall call(*context, "paged_attention", stream);
  call.require(std::isfinite(scale), "scale = ", scale, ": must be finite");
  const Operand q = call.input("q", q_array);
  call.ndim(q, 3, "[tokens, heads, head_dim]");
  const DType dtype = q.is(DType::kF16) ? DType::kF16 : call.activation(q);
  const bool dense = (q.strides[2] == 1 || q.shape[2] == 1) &&
                     (q.strides[1] == q.shape[2] || q.shape[1] == 1) &&
                     (q.strides[0] > 0 || q.shape[0] <= 1);
  call.require(dense || q.size() == 0, "q has strides [", q.strides[0], ", ", q.strides[1], ", ",
               q.strides[2],
               "]; the heads of a token must be contiguous, and tokens a positive stride apart");
  const CacheOperand taken =
      cache_operand(call, {key_array, value_array, k_scale, v_scale, kv_cache_dtype}, dtype, false);
  const KvCacheLayer& cache = taken.layer;
  call.require(q.shape[2] == cache.head_dim && q.shape[1] > 0 && q.shape[1] <= kMaxHeads &&
                   q.shape[1] % cache.num_kv_heads == 0,
               "q has ", q.shape[1], " heads of ", q.shape[2], "; must have a multiple of ",
               cache.num_kv_heads, " heads of ", cache.head_dim, ", as key_cache");
  const HeadShape shape{static_cast<int32_t>(q.shape[1]), cache.num_kv_heads, cache.head_dim};
  std::shared_ptr<PlannedAttention> planned;
  const bool is_new = plan_object.is_none();
  std::vector<Operand> read = taken.arrays;
  read.push_back(q);
  if (is_new) {
    const Operand table = call.input("block_table", table_array);
    const Operand lens = call.input("seq_lens", lens_array);
    const Operand starts = call.input("query_start_loc", starts_array);
    planned =
        plan_batch(call, {shape, dtype, cache.dtype, window, softcap, cache.block_size, q.shape[0]},
                   starts, lens, table, cache.num_blocks);
    read.insert(read.end(), {table, lens, starts});
  } else {
    call.require(nb::isinstance<PlannedAttentionHandle>(plan_object),
                 "plan must be what plan_attention made");
    planned = nb::cast<const PlannedAttentionHandle&>(plan_object).share();
    call.require(table_array.is_none() && lens_array.is_none() && starts_array.is_none(),
                 "plan has block_table, seq_lens and query_start_loc; they must not be given too");
    call.require(planned->device.get() == &call.device(), "plan is of ", planned->device->name(),
                 " and q lies on ", call.device().name());
    call.require(planned->plan.serves(shape, window, softcap) && planned->plan.dtype == dtype &&
                     planned->plan.cache_dtype == cache.dtype &&
                     planned->rows.block_size == cache.block_size,
                 "plan was made for other heads, dtype, kv_cache_dtype, window, softcap or "
                 "block_size");
    call.require(planned->num_blocks <= cache.num_blocks, "plan is for caches of ",
                 planned->num_blocks, " blocks; key_cache has ", cache.num_blocks);
    call.require(planned->sizes.num_tokens == q.shape[0], "plan is for ", planned->sizes.num_tokens,
                 " tokens; q has ", q.shape[0]);
  }
  const Operand out = call.output("out", out_array, q.sizes(), dtype);
  for (const Operand& operand : read) {
    call.require(out.data != operand.data || out.size() == 0, "out is ", operand.name);
    call.no_partial_overlap(out, operand);
  }
  use(call, *planned);
  WorkspaceLimits limits{};
  limits.head_dim = shape.head_dim;
  limits.num_threads = call.num_threads();
  const bool on_cpu = call.device().type() == DeviceType::kCpu;
  const int64_t workspace = on_cpu ? call.device().kernels().workspace_bytes(limits) : 0;
  PagedAttentionParams params{};
  params.qkv = q.data;
  params.out = out.data;
  params.shape = shape;
  params.dtype = dtype;
  params.scale = scale;
  params.window = window;
  params.softcap = softcap;
  params.cache = &cache;
  params.plan = &planned->plan;
  params.q_stride = q.shape[0] > 1 ? q.strides[0] : shape.q_cols();
  call.launch(workspace, [&](const Kernels& kernels, const StepContext& ctx) {
    if (is_new) launch_plan(*planned, kernels, ctx);
    kernels.paged_attention(params, ctx);
  });
  return call.result(out);
}

}  // namespace

void bind_attention_ops(nb::class_<OpsHandle>& ops, nb::module_& m) {
  nb::class_<PlannedAttentionHandle>(m, "PlannedAttention",
                                     "How the attention of one batch is divided; made by "
                                     "mrv1.ops.plan_attention.");
  const auto none = [](const char* name) { return nb::arg(name) = nb::none(); };
  ops.def("qkv_prepare", &qkv_prepare, nb::arg("op"), nb::arg("qkv"), nb::arg("num_heads"),
          nb::arg("num_kv_heads"), none("q_norm"), none("k_norm"), nb::arg("eps") = 0.0f,
          none("cos_sin"), none("positions"), nb::arg("interleaved") = false, none("key_cache"),
          none("value_cache"), none("slot_mapping"), nb::arg("kv_cache_dtype") = "auto",
          none("k_scale"), none("v_scale"), none("out"), none("stream"))
      .def("cache_write", &cache_write, nb::arg("qkv"), nb::arg("num_heads"),
           nb::arg("num_kv_heads"), nb::arg("key_cache"), nb::arg("value_cache"),
           nb::arg("slot_mapping"), nb::arg("kv_cache_dtype") = "auto", none("k_scale"),
           none("v_scale"), none("stream"))
      .def("reshape_and_cache_flash", &reshape_and_cache, nb::arg("key"), nb::arg("value"),
           nb::arg("key_cache"), nb::arg("value_cache"), nb::arg("slot_mapping"),
           nb::arg("kv_cache_dtype") = "auto", none("k_scale"), none("v_scale"), none("stream"))
      .def("slot_mapping", &slot_mapping, nb::arg("block_table"), nb::arg("positions"),
           nb::arg("query_start_loc"), nb::arg("block_size"), none("out"), none("stream"))
      .def("infer_params", &infer_params, nb::arg("query_start_loc"), nb::arg("seq_lens"),
           nb::arg("block_table"), nb::arg("num_tokens"), nb::arg("block_size"), none("stream"))
      .def("plan_attention", &plan_attention, nb::arg("query_start_loc"), nb::arg("seq_lens"),
           nb::arg("block_table"), nb::arg("num_tokens"), nb::arg("num_heads"),
           nb::arg("num_kv_heads"), nb::arg("head_dim"), nb::arg("block_size"),
           nb::arg("num_blocks"), nb::arg("dtype"), nb::arg("window") = 0,
           nb::arg("softcap") = 0.0f, nb::arg("kv_cache_dtype") = "auto", none("stream"))
      .def("paged_attention", &paged_attention, nb::arg("q"), nb::arg("key_cache"),
           nb::arg("value_cache"), none("block_table"), none("seq_lens"), none("query_start_loc"),
           nb::arg("scale") = 1.0f, nb::arg("window") = 0, nb::arg("softcap") = 0.0f, none("plan"),
           nb::arg("kv_cache_dtype") = "auto", none("k_scale"), none("v_scale"), none("out"),
           none("stream"));
}

}  // namespace mrv1
