// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "program/program.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/error.h"
#include "core/float4.h"
#include "dist/communicator.h"

namespace mrv1 {

std::string_view op_name(const Op& op) {
  const bool silu = op.activation == Activation::kSilu;
  switch (op.kind) {
    case OpKind::kEmbedding:
      return "embedding";
    case OpKind::kRmsNorm:
      return "rms_norm";
    case OpKind::kAdd:
      return "add";
    case OpKind::kLinear:
      return "linear";
    case OpKind::kGatedMul:
      return silu ? "silu_mul" : "gelu_mul";
    case OpKind::kQkNorm:
      return "qk_norm";
    case OpKind::kRope:
      return "rope";
    case OpKind::kCacheWrite:
      return "cache_write";
    case OpKind::kPagedAttention:
      return "paged_attention";
    case OpKind::kGatherRows:
      return "gather_rows";
    case OpKind::kSoftCap:
      return "soft_cap";
    case OpKind::kMoeRoute:
      return "moe_route";
    case OpKind::kMoeExperts:
      return "moe_experts";
    case OpKind::kMoeDispatch:
      return "moe_dispatch";
    case OpKind::kMoeCombine:
      return "moe_combine";
    case OpKind::kAllReduce:
      return "all_reduce";
    case OpKind::kAllGather:
      return "all_gather";
    case OpKind::kStageReceive:
      return "stage_receive";
    case OpKind::kStageRelease:
      return "stage_release";
    case OpKind::kStageSend:
      return "stage_send";
    case OpKind::kAddRmsNorm:
      return "add_rms_norm";
    case OpKind::kQkvPrepare:
      return "qkv_prepare";
    case OpKind::kLinearGatedMul:
      return silu ? "linear_silu_mul" : "linear_gelu_mul";
    case OpKind::kRouter:
      return "router";
  }
  return "?";
}

int64_t weight_bytes(const WeightSpec& weight, DType dtype) {
  const int64_t count = weight.rows * weight.cols;
  if (weight.format == WeightFormat::kNvfp4) {
    return count / 2 + count / kFp4Block + weight.rows * static_cast<int64_t>(sizeof(float));
  }
  const DType stored = weight.kind == WeightKind::kMatrix ? dtype : DType::kF32;
  return count * static_cast<int64_t>(dtype_size(stored));
}

namespace {

void check_softcap(float softcap, std::string_view op) {
  check(std::isfinite(softcap) && softcap >= 0.0f, op,
        "softcap must be positive, or 0 for none, not ", softcap);
}

}  // namespace

Program::Program(DType dtype) : dtype_(dtype) {
  check(dtype == DType::kF32 || dtype == DType::kBF16, "program",
        "dtype must be float32 or bfloat16, not ", dtype_name(dtype));
}

const Value& Program::value(int32_t id, std::string_view op) const {
  check(id >= 0 && id < static_cast<int32_t>(values_.size()), op, "no value ", id);
  check(!values_[id].fused_away, op, "value ", id, " was fused away: no op writes it");
  return values_[id];
}

const WeightSpec& Program::weight_spec(int32_t id, std::string_view op) const {
  check(id >= 0 && id < static_cast<int32_t>(weights_.size()), op, "no weight ", id);
  return weights_[id];
}

void Program::check_vector(int32_t weight, int64_t size, std::string_view op) const {
  const WeightSpec& spec = weight_spec(weight, op);
  check(spec.kind == WeightKind::kVector && spec.rows == size, op, "weight '", spec.name,
        "' must be a vector of ", size, " elements");
}

void Program::check_matrix(int32_t weight, int64_t cols, std::string_view op) const {
  const WeightSpec& spec = weight_spec(weight, op);
  check(spec.kind == WeightKind::kMatrix && spec.cols == cols, op, "weight '", spec.name, "' has ",
        spec.cols, " columns, x has ", cols);
  check(spec.matrices == 1, op, "weight '", spec.name, "' must be one matrix, not ", spec.matrices);
}

// The kernel adds rows of tokens in the program's dtype.
void Program::check_addend(const Value& value, int64_t cols, std::string_view op) const {
  check(value.space == RowSpace::kTokens, op, "operands must have one row a token");
  check(value.dtype == dtype_, op, "operands must be ", dtype_name(dtype_), ", not ",
        dtype_name(value.dtype));
  check(value.cols == cols, op, "operands differ in shape: ", cols, " and ", value.cols,
        " columns");
}

int32_t Program::weight(WeightSpec spec) {
  check(spec.rows > 0 && spec.cols > 0, "weight", "'", spec.name, "' is empty");
  check(spec.rows <= kMaxExtent && spec.cols <= kMaxExtent &&
            spec.rows <= kMaxTensorBytes / 4 / spec.cols,
        "weight", "'", spec.name, "' is too large: [", spec.rows, ", ", spec.cols,
        "], at most 2^31 rows or columns and 2^48 bytes are allowed");
  check(spec.kind == WeightKind::kMatrix || spec.cols == 1, "weight", "'", spec.name,
        "' is a vector and must have 1 column, not ", spec.cols);
  check(std::isfinite(spec.offset), "weight", "offset of '", spec.name, "' must be finite, not ",
        spec.offset);
  check(spec.kind == WeightKind::kVector || spec.offset == 0.0f, "weight", "'", spec.name,
        "' is a matrix and must have offset 0, not ", spec.offset);
  check(spec.matrices >= 1 && spec.rows % spec.matrices == 0 &&
            (spec.matrices == 1 || spec.kind == WeightKind::kMatrix),
        "weight", "the ", spec.rows, " rows of '", spec.name, "' are not those of ", spec.matrices,
        " equal matrices");
  const bool nvfp4 = spec.format == WeightFormat::kNvfp4;
  check(spec.kind == WeightKind::kMatrix || !nvfp4, "weight", "'", spec.name,
        "' is a vector and cannot be NVFP4");
  check(!nvfp4 || spec.cols % kFp4Block == 0, "weight", "'", spec.name, "' is NVFP4 and has ",
        spec.cols, " columns, must be a multiple of ", kFp4Block);
  int64_t row = 0;
  for (WeightSegment& segment : spec.segments) {
    check(segment.row_start == row && segment.rows > 0 && segment.rows <= spec.rows - row, "weight",
          "segments of '", spec.name, "' must follow each other and fit its ", spec.rows, " rows");
    row += segment.rows;
    TensorSlice& slice = segment.slice;
    if (slice.rows == 0) slice = {.rows = segment.rows, .cols = spec.cols};
    check(slice.first_row >= 0 && slice.first_col >= 0 && slice.rows <= kMaxExtent &&
              slice.cols <= kMaxExtent && segment.rows <= slice.rows - slice.first_row &&
              spec.cols <= slice.cols - slice.first_col,
          "weight", "'", spec.name, "' takes [", segment.rows, ", ", spec.cols, "] from [",
          slice.first_row, ", ", slice.first_col, "] on, which '", segment.tensor, "' of [",
          slice.rows, ", ", slice.cols, "] does not have");
    check(!nvfp4 || (slice.cols % kFp4Block == 0 && slice.first_col % kFp4Block == 0), "weight",
          "'", spec.name, "' is NVFP4 and takes columns from ", slice.first_col, " on of ",
          slice.cols, " of '", segment.tensor, "', both must be multiples of ", kFp4Block);
  }
  check(row == spec.rows, "weight", "segments of '", spec.name, "' cover ", row, " of ", spec.rows,
        " rows");
  weights_.push_back(std::move(spec));
  return static_cast<int32_t>(weights_.size()) - 1;
}

int32_t Program::add_value(std::string name, RowSpace space, int64_t cols, DType dtype) {
  values_.push_back({.name = std::move(name), .space = space, .cols = cols, .dtype = dtype});
  return static_cast<int32_t>(values_.size()) - 1;
}

int32_t Program::emit(Op op, RowSpace space, int64_t cols, DType dtype) {
  op.layer = layer_;
  const int32_t id = add_value("", space, cols, dtype);
  op.outputs = {id};
  ops_.push_back(std::move(op));
  return id;
}

int32_t Program::input(std::string name, int64_t cols, RowSpace space, std::optional<DType> dtype) {
  check(cols > 0 && cols <= kMaxExtent, "input", "cols must be in [1, 2^31], not ", cols);
  const DType type = dtype.value_or(dtype_);
  check(type == dtype_ || type == DType::kF32 || type == DType::kI32, "input",
        "dtype must be float32, int32 or ", dtype_name(dtype_), ", not ", dtype_name(type));
  const int32_t id = add_value(std::move(name), space, cols, type);
  inputs_.push_back(id);
  return id;
}

void Program::output(int32_t id) {
  value(id, "output");
  outputs_.push_back(id);
}

int32_t Program::embedding(int32_t table, float scale, int64_t first_row) {
  const WeightSpec& spec = weight_spec(table, "embedding");
  check(spec.kind == WeightKind::kMatrix, "embedding", "'", spec.name, "' must be a matrix");
  check(spec.format == WeightFormat::kPlain, "embedding", "'", spec.name, "' must not be NVFP4");
  check(std::isfinite(scale), "embedding", "scale must be finite, not ", scale);
  check(first_row >= 0 && first_row <= kMaxExtent, "embedding",
        "first_row must be in [0, 2^31], not ", first_row);
  return emit(
      {.kind = OpKind::kEmbedding, .weights = {table}, .scale = scale, .first_row = first_row},
      RowSpace::kTokens, spec.cols, dtype_);
}

int32_t Program::rms_norm(int32_t x, int32_t weight, float eps) {
  const Value in = value(x, "rms_norm");
  check_vector(weight, in.cols, "rms_norm");
  check(in.dtype == dtype_, "rms_norm", "x must be ", dtype_name(dtype_));
  check(eps >= 0.0f, "rms_norm", "eps must not be negative");
  return emit({.kind = OpKind::kRmsNorm, .inputs = {x}, .weights = {weight}, .eps = eps}, in.space,
              in.cols, dtype_);
}

int32_t Program::add(int32_t a, int32_t b) {
  const int64_t cols = value(a, "add").cols;
  check_addend(value(a, "add"), cols, "add");
  check_addend(value(b, "add"), cols, "add");
  return emit({.kind = OpKind::kAdd, .inputs = {a, b}}, RowSpace::kTokens, cols, dtype_);
}

int32_t Program::linear(int32_t x, int32_t weight, int32_t bias, int32_t residual,
                        bool row_parallel, bool wide) {
  const Value in = value(x, "linear");
  check_matrix(weight, in.cols, "linear");
  check(in.dtype == dtype_, "linear", "x must be ", dtype_name(dtype_));
  const int64_t rows = weights_[weight].rows;
  Op op{.kind = OpKind::kLinear, .inputs = {x}, .weights = {weight}, .row_parallel = row_parallel};
  if (bias >= 0) {
    check_vector(bias, rows, "linear");
    op.weights.push_back(bias);
  }
  if (residual >= 0) {
    check(in.space == RowSpace::kTokens, "linear",
          "x must have one row a token to take a residual");
    check_addend(value(residual, "linear"), rows, "linear");
  }
  check(!wide || residual < 0, "linear", "a result in float32 takes no residual");
  const int32_t out = emit(std::move(op), in.space, rows, wide ? DType::kF32 : dtype_);
  return residual < 0 ? out : add(out, residual);
}

int32_t Program::all_reduce(int32_t x, int32_t bias) {
  const Value in = value(x, "all_reduce");
  Op op{.kind = OpKind::kAllReduce, .inputs = {x}};
  if (bias >= 0) {
    check_vector(bias, in.cols, "all_reduce");
    op.weights.push_back(bias);
  }
  return emit(std::move(op), in.space, in.cols, dtype_);
}

int32_t Program::gated_mul(int32_t x, Activation activation) {
  check(activation != Activation::kNone, "gated_mul", "there is no activation");
  Op op{.kind = OpKind::kGatedMul, .inputs = {x}, .activation = activation};
  const Value in = value(x, op_name(op));
  check(in.cols % 2 == 0, op_name(op), "x needs an even number of columns, has ", in.cols);
  check(in.space == RowSpace::kTokens, op_name(op), "x must have one row a token");
  return emit(std::move(op), in.space, in.cols / 2, dtype_);
}

std::pair<int32_t, int32_t> Program::moe_route(int32_t logits, int32_t bias,
                                               const RouteSpec& spec) {
  constexpr std::string_view kOp = "moe_route";
  const Value in = value(logits, kOp);
  check(in.space == RowSpace::kTokens && in.dtype == DType::kF32, kOp,
        "logits must be float32, one row a token");
  check(in.cols <= kMaxExperts, kOp, "there are ", in.cols, " experts, at most ", kMaxExperts,
        " are allowed");
  check(spec.top_k >= 1 && spec.top_k <= in.cols, kOp, "top_k must be in [1, ", in.cols, "], not ",
        spec.top_k);
  check(std::isfinite(spec.min_sum) && spec.min_sum >= 0.0f, kOp,
        "min_sum must be finite and not negative, not ", spec.min_sum);
  check(std::isfinite(spec.scale), kOp, "scale must be finite, not ", spec.scale);
  Op op{.kind = OpKind::kMoeRoute, .inputs = {logits}, .layer = layer_, .route = spec};
  if (bias >= 0) {
    check_vector(bias, in.cols, kOp);
    op.weights.push_back(bias);
  }
  const int32_t experts = add_value("", in.space, spec.top_k, DType::kI32);
  const int32_t weights = add_value("", in.space, spec.top_k, DType::kF32);
  op.outputs = {experts, weights};
  ops_.push_back(std::move(op));
  return {experts, weights};
}

int32_t Program::moe_experts(int32_t x, int32_t experts, int32_t weights, int32_t gate_up,
                             int32_t down, const ExpertsSpec& spec) {
  check(value(x, "moe_experts").space == RowSpace::kTokens, "moe_experts",
        "x must have one row a token");
  return emit_experts({x, experts, weights}, gate_up, down, spec);
}

int32_t Program::emit_experts(std::vector<int32_t> inputs, int32_t gate_up, int32_t down,
                              const ExpertsSpec& spec) {
  constexpr std::string_view kOp = "moe_experts";
  const Value in = value(inputs[0], kOp);
  const Value ids = value(inputs[1], kOp);
  const Value shares = value(inputs[2], kOp);
  check(in.dtype == dtype_, kOp, "x must be ", dtype_name(dtype_));
  check(ids.dtype == DType::kI32 && shares.dtype == DType::kF32 && ids.cols == shares.cols &&
            ids.space == in.space && shares.space == in.space,
        kOp, "experts must be int32 and weights float32, of as many rows and columns");
  const WeightSpec& first = weight_spec(gate_up, kOp);
  const WeightSpec& second = weight_spec(down, kOp);
  const int64_t count = first.matrices;
  check(first.kind == WeightKind::kMatrix && second.kind == WeightKind::kMatrix &&
            count == second.matrices && count <= kMaxExperts,
        kOp, "'", first.name, "' has ", count, " matrices and '", second.name, "' ",
        second.matrices, ", must be as many, at most ", kMaxExperts);
  check(first.cols == in.cols && first.rows / count == 2 * second.cols &&
            second.rows / count == in.cols,
        kOp, "matrices of '", first.name, "' are [", first.rows / count, ", ", first.cols,
        "] and those of '", second.name, "' [", second.rows / count, ", ", second.cols,
        "]; for x of ", in.cols, " columns they must be [2 n, ", in.cols, "] and [", in.cols,
        ", n]");
  check(spec.activation != Activation::kNone, kOp, "there is no activation");
  const int64_t all = spec.num_experts == 0 ? spec.first_expert + count : spec.num_experts;
  check(all >= count && all <= kMaxExperts, kOp, "num_experts must be in [", count, ", ",
        kMaxExperts, "], not ", all);
  check(spec.first_expert >= 0 && spec.first_expert <= all - count, kOp,
        "first_expert must be in [0, ", all - count, "], not ", spec.first_expert);
  return emit({.kind = OpKind::kMoeExperts,
               .inputs = std::move(inputs),
               .weights = {gate_up, down},
               .activation = spec.activation,
               .row_parallel = spec.row_parallel,
               .first_expert = spec.first_expert,
               .num_experts = static_cast<int32_t>(all)},
              in.space, in.cols, spec.wide ? DType::kF32 : dtype_);
}

int32_t Program::moe_exchange(int32_t x, int32_t experts, int32_t weights, int32_t gate_up,
                              int32_t down, const ExpertsSpec& spec, const ExpertShare& share) {
  constexpr std::string_view kOp = "moe_dispatch";
  const Value in = value(x, kOp);
  const Value ids = value(experts, kOp);
  check(in.space == RowSpace::kTokens && in.dtype == dtype_ && ids.dtype == DType::kI32, kOp,
        "x must be ", dtype_name(dtype_), ", one row a token, and experts int32");
  check(share.ranks >= 2 && share.ranks <= kMaxRanks, kOp, "there are ", share.ranks,
        " ranks; must be 2 to ", kMaxRanks);
  check(share.num_experts >= 1 && share.num_experts <= kMaxExperts, kOp, "there are ",
        share.num_experts, " experts; must be 1 to ", kMaxExperts);
  const size_t num_ops = ops_.size(), num_values = values_.size();
  try {
    Op send{.kind = OpKind::kMoeDispatch,
            .inputs = {x, experts, weights},
            .layer = layer_,
            .share = share};
    const int32_t places = add_value("", RowSpace::kTokens, share.ranks, DType::kI32);
    const int32_t counts = add_value("", RowSpace::kRanks, 1, DType::kI32);
    const int32_t there = add_value("", RowSpace::kReceived, ids.cols, DType::kI32);
    const int32_t shares = add_value("", RowSpace::kReceived, ids.cols, DType::kF32);
    const int32_t tokens = add_value("", RowSpace::kReceived, in.cols, dtype_);
    send.outputs = {places, counts, there, shares, tokens};
    ops_.push_back(std::move(send));
    const int32_t partial = emit_experts({tokens, there, shares, counts}, gate_up, down, spec);
    const DType sum_dtype = values_[partial].dtype;
    Op add_up{.kind = OpKind::kMoeCombine, .inputs = {partial, places}, .layer = layer_};
    const int32_t sums = add_value("", RowSpace::kReceived, in.cols, sum_dtype);
    const int32_t total = add_value("", RowSpace::kTokens, in.cols, dtype_);
    add_up.outputs = {sums, total};
    ops_.push_back(std::move(add_up));
    return total;
  } catch (const Error&) {
    ops_.resize(num_ops);
    values_.resize(num_values);
    throw;
  }
}

int32_t Program::rope_table(RopeSpec spec) {
  check(!spec.inv_freq.empty(), "rope_table", "inv_freq is empty");
  check(spec.inv_freq.size() <= kMaxHeadDim / 2, "rope_table", "inv_freq has ",
        spec.inv_freq.size(), " frequencies, at most ", kMaxHeadDim / 2, " are allowed");
  for (float frequency : spec.inv_freq) {
    check(std::isfinite(frequency), "rope_table", "inv_freq must be finite");
  }
  check(std::isfinite(spec.factor), "rope_table", "factor must be finite");
  ropes_.push_back(std::move(spec));
  return static_cast<int32_t>(ropes_.size()) - 1;
}

int32_t Program::attention(int32_t qkv, const AttentionSpec& spec) {
  const Value in = value(qkv, "attention");
  const HeadShape& heads = spec.heads;
  check(heads.num_heads > 0 && heads.num_kv_heads > 0 && heads.num_heads % heads.num_kv_heads == 0,
        "attention", heads.num_heads, " query heads do not divide into ", heads.num_kv_heads,
        " key/value heads");
  check(heads.num_heads <= kMaxHeads, "attention", "num_heads must be at most ", kMaxHeads,
        ", not ", heads.num_heads);
  check(heads.head_dim > 0 && heads.head_dim % 8 == 0 && heads.head_dim <= kMaxHeadDim, "attention",
        "head_dim must be a multiple of 8 up to ", kMaxHeadDim, ", not ", heads.head_dim);
  check(in.cols == heads.qkv_cols() && in.space == RowSpace::kTokens, "attention", "qkv has ",
        in.cols, " columns, the heads need ", heads.qkv_cols());
  check(spec.window >= 0, "attention", "window must not be negative");
  check(std::isfinite(spec.scale), "attention", "scale must be finite, not ", spec.scale);
  check_softcap(spec.softcap, "attention");
  check((spec.q_norm < 0) == (spec.k_norm < 0), "attention",
        "q_norm and k_norm go together: give both or none");
  check(spec.kv_layer >= 0 && spec.kv_layer < 65536, "attention", "kv layer ", spec.kv_layer,
        " is out of range");
  const bool new_layer = spec.kv_layer >= static_cast<int32_t>(kv_layers_.size());
  check(new_layer || kv_layers_[spec.kv_layer].num_heads == 0, "attention", "kv layer ",
        spec.kv_layer, " is used twice");
  if (spec.q_norm >= 0) {
    check_vector(spec.q_norm, heads.head_dim, "attention");
    check_vector(spec.k_norm, heads.head_dim, "attention");
    check(spec.eps >= 0.0f, "attention", "eps must not be negative");
  }
  if (spec.rope >= 0) {
    check(spec.rope < static_cast<int32_t>(ropes_.size()), "attention", "no rope table ",
          spec.rope);
    check(static_cast<int32_t>(ropes_[spec.rope].inv_freq.size()) * 2 <= heads.head_dim,
          "attention", "rope table ", spec.rope, " has ", ropes_[spec.rope].inv_freq.size(),
          " frequencies, head_dim ", heads.head_dim, " takes at most ", heads.head_dim / 2);
  }

  if (new_layer) {
    kv_layers_.resize(spec.kv_layer + 1);
    kv_windows_.resize(spec.kv_layer + 1);
  }
  kv_layers_[spec.kv_layer] = heads;
  kv_windows_[spec.kv_layer] = spec.window;
  int32_t x = qkv;
  if (spec.q_norm >= 0) {
    x = emit({.kind = OpKind::kQkNorm,
              .inputs = {x},
              .weights = {spec.q_norm, spec.k_norm},
              .eps = spec.eps,
              .heads = heads},
             in.space, in.cols, dtype_);
  }
  if (spec.rope >= 0) {
    x = emit({.kind = OpKind::kRope, .inputs = {x}, .heads = heads, .rope = spec.rope}, in.space,
             in.cols, dtype_);
  }
  ops_.push_back({.kind = OpKind::kCacheWrite,
                  .inputs = {x},
                  .heads = heads,
                  .kv_layer = spec.kv_layer,
                  .layer = layer_});
  return emit({.kind = OpKind::kPagedAttention,
               .inputs = {x},
               .heads = heads,
               .scale = spec.scale,
               .window = spec.window,
               .softcap = spec.softcap,
               .kv_layer = spec.kv_layer},
              in.space, heads.q_cols(), dtype_);
}

int32_t Program::gather_rows(int32_t x) {
  const Value in = value(x, "gather_rows");
  check(in.space == RowSpace::kTokens, "gather_rows", "x must have one row a token");
  return emit({.kind = OpKind::kGatherRows, .inputs = {x}}, RowSpace::kLogits, in.cols, in.dtype);
}

int32_t Program::logits(int32_t x, int32_t weight, float softcap, int32_t ranks) {
  check(logits_ < 0, "logits", "the program has its logits already");
  check(ranks >= 1 && ranks <= kMaxRanks, "logits", "ranks must be in [1, ", kMaxRanks, "], not ",
        ranks);
  check_matrix(weight, value(x, "logits").cols, "logits");
  check_softcap(softcap, "logits");
  const int32_t rows = gather_rows(x);
  logits_ = emit({.kind = OpKind::kLinear, .inputs = {rows}, .weights = {weight}},
                 RowSpace::kLogits, weights_[weight].rows, DType::kF32);
  if (softcap > 0.0f) {
    logits_ = emit({.kind = OpKind::kSoftCap, .inputs = {logits_}, .softcap = softcap},
                   RowSpace::kLogits, weights_[weight].rows, DType::kF32);
  }
  if (ranks > 1) {
    logits_ = emit({.kind = OpKind::kAllGather, .inputs = {logits_}}, RowSpace::kLogits,
                   weights_[weight].rows * ranks, DType::kF32);
  }
  output(logits_);
  hidden_ = x;
  vocab_size_ = static_cast<int32_t>(values_[logits_].cols);
  return logits_;
}

KvLayout Program::kv_layout() const {
  if (stage_layout_) return *stage_layout_;
  KvLayout layout = mrv1::kv_layout(kv_windows_);
  if (layout.groups.size() > 1) {
    const HeadShape& first = kv_layers_.front();
    for (const HeadShape& heads : kv_layers_) {
      check(heads.num_kv_heads == first.num_kv_heads && heads.head_dim == first.head_dim, "program",
            "layers with different windows must have equal key/value heads, not ",
            heads.num_kv_heads, " of ", heads.head_dim, " and ", first.num_kv_heads, " of ",
            first.head_dim);
    }
  }
  return layout;
}

void Program::begin_layer(int32_t layer) {
  check(layer_ < 0, "layer", "layers do not nest");
  check(layer >= 0, "layer", "the index must not be negative");
  layer_ = layer;
}

void Program::end_layer() { layer_ = -1; }

bool Program::is_route_bias(int32_t weight) const {
  return std::any_of(ops_.begin(), ops_.end(), [&](const Op& op) {
    const size_t bias = op.kind == OpKind::kRouter ? 1 : 0;
    return (op.kind == OpKind::kMoeRoute || op.kind == OpKind::kRouter) &&
           op.weights.size() > bias && op.weights[bias] == weight;
  });
}

bool Program::is_expert_weight(int32_t weight) const {
  return std::any_of(ops_.begin(), ops_.end(), [&](const Op& op) {
    return op.kind == OpKind::kMoeExperts &&
           std::find(op.weights.begin(), op.weights.end(), weight) != op.weights.end();
  });
}

int32_t Program::num_layers() const {
  int32_t count = 0;
  for (const Op& op : ops_) count = std::max(count, op.layer + 1);
  return count;
}

std::vector<Cut> Program::cuts() const {
  std::vector<Cut> cuts;
  for (int32_t i = 0; i < static_cast<int32_t>(ops_.size()); ++i) {
    const Op& op = ops_[i];
    if (i > 0 && op.layer >= 0 && op.layer != ops_[i - 1].layer) {
      cuts.push_back({CutKind::kStage, i});
    }
    if (op.kind == OpKind::kPagedAttention) {
      cuts.push_back({CutKind::kAttention, i});
    }
    if (op.row_parallel || op.kind == OpKind::kMoeDispatch || op.kind == OpKind::kMoeCombine) {
      cuts.push_back({CutKind::kCollective, i + 1});
    }
  }
  return cuts;
}

namespace {

std::string describe(const Value& value) {
  constexpr std::string_view kNames[] = {"tokens", "logits", "received", "ranks"};
  return concat(kNames[static_cast<int>(value.space)], " x ", value.cols, " ",
                dtype_name(value.dtype));
}

}  // namespace

std::string Program::dump(std::string_view format) const {
  check(format == "text" || format == "dot", "dump", "format must be text or dot, not '", format,
        "'");
  std::ostringstream out;
  if (format == "dot") {
    out << "digraph program {\n  node [shape=box, fontname=monospace];\n";
    std::vector<std::string> producer(values_.size());
    for (int32_t id : inputs_) {
      producer[id] = concat("in", id);
      out << "  in" << id << " [label=\"" << values_[id].name << "\", shape=ellipse];\n";
    }
    for (size_t i = 0; i < ops_.size(); ++i) {
      out << "  op" << i << " [label=\"" << op_name(ops_[i]);
      for (int32_t id : ops_[i].weights) out << "\\n" << weights_[id].name;
      out << "\"];\n";
      for (int32_t id : ops_[i].inputs) {
        out << "  " << producer[id] << " -> op" << i << " [label=\"" << describe(values_[id])
            << "\"];\n";
      }
      for (int32_t id : ops_[i].outputs) producer[id] = concat("op", i);
    }
    out << "}\n";
    return out.str();
  }
  for (int32_t id : inputs_) {
    out << "%" << id << " = input " << values_[id].name << " : " << describe(values_[id]) << "\n";
  }
  const std::vector<Cut> marks = cuts();
  size_t mark = 0;
  for (size_t i = 0; i < ops_.size(); ++i) {
    for (; mark < marks.size() && marks[mark].op == static_cast<int32_t>(i); ++mark) {
      const CutKind kind = marks[mark].kind;
      out << "--- "
          << (kind == CutKind::kAttention ? "attention"
              : kind == CutKind::kStage   ? "stage"
                                          : "collective")
          << " cut\n";
    }
    const Op& op = ops_[i];
    for (size_t k = 0; k < op.outputs.size(); ++k) out << (k ? ", %" : "%") << op.outputs[k];
    if (!op.outputs.empty()) out << " = ";
    out << op_name(op) << "(";
    bool first = true;
    for (int32_t id : op.inputs) {
      out << (first ? "%" : ", %") << id;
      first = false;
    }
    for (int32_t id : op.weights) {
      out << (first ? "" : ", ") << weights_[id].name;
      first = false;
    }
    if (op.kv_layer >= 0) out << (first ? "" : ", ") << "kv=" << op.kv_layer;
    out << ")";
    if (!op.outputs.empty()) out << " : " << describe(values_[op.outputs.back()]);
    out << "\n";
  }
  return out.str();
}

}  // namespace mrv1
