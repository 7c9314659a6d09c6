// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "program/executable.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "core/device.h"
#include "core/error.h"
#include "dist/communicator.h"

namespace mrv1 {
namespace {

// cos and sin of position * inv_freq, [positions, 2 * pairs]: cosines then sines. The angle is a
// float32 product, as the reference implementations compute it; its cosine is exact to float32.
std::vector<float> rope_values(const RopeSpec& spec, int64_t positions) {
  const size_t pairs = spec.inv_freq.size();
  std::vector<float> table(static_cast<size_t>(positions) * pairs * 2);
  for (int64_t position = 0; position < positions; ++position) {
    float* row = table.data() + static_cast<size_t>(position) * pairs * 2;
    for (size_t i = 0; i < pairs; ++i) {
      const double angle = static_cast<float>(position) * spec.inv_freq[i];
      row[i] = static_cast<float>(std::cos(angle)) * spec.factor;
      row[pairs + i] = static_cast<float>(std::sin(angle)) * spec.factor;
    }
  }
  return table;
}

// One plan for each geometry of attention in the program, without memory.
std::vector<AttentionPlan> attention_plans(const Program& program, const PlanLimits& limits) {
  std::vector<AttentionPlan> plans;
  const KvLayout layout = program.kv_layout();
  for (const Op& op : program.ops()) {
    if (op.kind != OpKind::kPagedAttention) continue;
    const auto serves = [&](const AttentionPlan& plan) {
      return plan.serves(op.heads, op.window, op.softcap);
    };
    if (std::any_of(plans.begin(), plans.end(), serves)) continue;
    const auto [first_group, num_groups] = layout.groups_of(op.window);
    plans.push_back({.shape = op.heads,
                     .dtype = program.dtype(),
                     .window = op.window,
                     .softcap = op.softcap,
                     .first_group = first_group,
                     .num_groups = num_groups,
                     .max_requests = static_cast<int32_t>(limits.max_requests),
                     .max_tokens = static_cast<int32_t>(limits.max_tokens)});
  }
  return plans;
}

}  // namespace

int64_t Executable::bytes(const Program& program, const PlanLimits& limits, Device& device,
                          int64_t max_position) {
  int64_t bytes = plan_buffers(program, limits).arena_bytes;
  for (const RopeSpec& rope : program.ropes()) {
    bytes += max_position * static_cast<int64_t>(rope.inv_freq.size() * 2 * sizeof(float));
  }
  for (const AttentionPlan& plan : attention_plans(program, limits)) {
    bytes += device.kernels().attention_plan_bytes(plan, device);
  }
  return bytes;
}

WorkspaceLimits Executable::workspace_limits(const Program& program, const PlanLimits& limits,
                                             Device& device) {
  WorkspaceLimits sizes{};
  // Also where a stage has no logits: what kernels do with more or less room is then the same on
  // all stages as on a device that has the whole model.
  sizes.vocab_size = program.vocab_size();
  for (const HeadShape& heads : program.kv_layers()) {
    sizes.head_dim = std::max<int64_t>(sizes.head_dim, heads.head_dim);
    sizes.float8_kv_heads = std::max<int64_t>(sizes.float8_kv_heads, heads.num_kv_heads);
  }
  for (const Op& op : program.ops()) {
    if (op.kind == OpKind::kLinear || op.kind == OpKind::kLinearGatedMul) {
      const WeightSpec& weight = program.weights()[op.weights[0]];
      if (weight.format == WeightFormat::kNvfp4) {
        sizes.fp4_elements = std::max(sizes.fp4_elements, weight.rows * weight.cols);
      }
    }
    if (op.kind == OpKind::kLinearGatedMul) {
      sizes.gated_rows = std::max(sizes.gated_rows, program.weights()[op.weights[0]].rows);
    } else if (op.kind == OpKind::kMoeExperts) {
      const WeightSpec& down = program.weights()[op.weights[1]];
      const int64_t top_k = program.values()[op.inputs[1]].cols;
      const RowSpace space = program.values()[op.inputs[0]].space;
      sizes.moe_rows = std::max(sizes.moe_rows, space_rows(space, limits) * top_k);
      sizes.moe_hidden = std::max(sizes.moe_hidden, down.rows / down.matrices);
      sizes.moe_intermediate = std::max(sizes.moe_intermediate, down.cols);
      sizes.moe_experts = std::max(sizes.moe_experts, down.matrices);
      sizes.moe_element_bytes = static_cast<int64_t>(dtype_size(program.dtype()));
      if (down.format == WeightFormat::kNvfp4) {
        sizes.moe_fp4_elements = std::max(sizes.moe_fp4_elements, 2 * down.rows * down.cols);
      }
    }
  }
  sizes.float8_keys = limits.float8_keys;
  sizes.max_tokens = limits.max_tokens;
  sizes.max_logits = limits.max_logits;
  sizes.num_threads = device.pool() != nullptr ? device.pool()->num_threads() : 1;
  return sizes;
}

Executable::Executable(const Program& program, const PlanLimits& limits, Device& device,
                       std::span<const WeightView> weights, std::span<const KvCacheLayer> kv,
                       int64_t max_position, const Executable* tables)
    : device_(&device),
      plan_(plan_buffers(program, limits)),
      kv_layout_(program.kv_layout()),
      max_position_(max_position),
      expert_ranks_(static_cast<int32_t>(limits.ranks)) {
  check_internal(weights.size() == program.weights().size(), "executable", "weights missing");
  check_internal(kv.size() >= program.kv_layers().size(), "executable", "kv layers missing");
  arena_ = device.allocate(plan_.arena_bytes, "activations");
  if (tables != nullptr) {
    ropes_ = tables->ropes_;
  } else {
    for (const RopeSpec& spec : program.ropes()) {
      const std::vector<float> table = rope_values(spec, max_position);
      rope_buffers_.push_back(device.allocate(table.size() * sizeof(float), "rope table"));
      device.copy_in(rope_buffers_.back().data(), table.data(), table.size() * sizeof(float));
      ropes_.push_back(static_cast<const float*>(rope_buffers_.back().data()));
    }
  }
  attention_plans_ = attention_plans(program, limits);
  for (AttentionPlan& plan : attention_plans_) {
    const int64_t bytes = device.kernels().attention_plan_bytes(plan, device);
    attention_buffers_.push_back(device.allocate(static_cast<size_t>(bytes), "attention plan"));
    plan.data = attention_buffers_.back().data();
    plan.cache_dtype = kv.front().dtype;  // of all layers, as are the scales
    plan.cache_scales = kv.front().scales.kind;
  }
  find_expert_buffers(program, limits.max_tokens);
  calls_.reserve(program.ops().size());
  for (const Op& op : program.ops()) calls_.push_back(bind(program, op, weights, kv));
}

void* Executable::value(int32_t id) const {
  check(id >= 0 && id < static_cast<int32_t>(plan_.offsets.size()), "executable", "no value ", id);
  const int64_t offset = plan_.offsets[id];
  check(offset >= 0, "executable", "value ", id, " was fused away: no op writes it");
  return static_cast<char*>(arena_.data()) + offset;
}

Executable::Call Executable::bind(const Program& program, const Op& op,
                                  std::span<const WeightView> weights,
                                  std::span<const KvCacheLayer> kv) const {
  const DType dtype = program.dtype();
  const auto in = [&](size_t i) { return value(op.inputs.at(i)); };
  const auto out = [&](size_t i) { return value(op.outputs.at(i)); };
  const auto vector = [&](size_t i) {
    return static_cast<const float*>(weights[op.weights.at(i)].data);
  };
  const Value* result = op.outputs.empty() ? nullptr : &program.values()[op.outputs.back()];
  const bool logits_rows = result != nullptr && result->space == RowSpace::kLogits;
  const auto route = [&](const void* logits, const float* bias, void* experts, void* shares) {
    const int32_t logits_value = op.kind == OpKind::kRouter ? op.outputs[0] : op.inputs[0];
    return MoeRouteParams{.logits = static_cast<const float*>(logits),
                          .bias = bias,
                          .experts = static_cast<int32_t*>(experts),
                          .weights = static_cast<float*>(shares),
                          .num_experts = static_cast<int32_t>(program.values()[logits_value].cols),
                          .top_k = op.route.top_k,
                          .scores = op.route.scores,
                          .renormalize = op.route.renormalize,
                          .min_sum = op.route.min_sum,
                          .scale = op.route.scale};
  };
  switch (op.kind) {
    case OpKind::kEmbedding:
      return EmbeddingParams{weights[op.weights[0]], out(0), dtype, op.scale, op.first_row};
    case OpKind::kRmsNorm:
      return RmsNormParams{in(0),        nullptr, vector(0), out(0),     nullptr,
                           result->cols, op.eps,  dtype,     logits_rows};
    case OpKind::kAddRmsNorm:
      return RmsNormParams{in(0),        in(1),  vector(0), out(1),     out(0),
                           result->cols, op.eps, dtype,     logits_rows};
    case OpKind::kAdd:
      return AddParams{in(0), in(1), out(0), result->cols, dtype};
    case OpKind::kLinear:
    case OpKind::kLinearGatedMul:
      return LinearParams{in(0),
                          weights[op.weights[0]],
                          op.weights.size() > 1 ? vector(1) : nullptr,
                          out(0),
                          dtype,
                          result->dtype,
                          op.activation,
                          logits_rows,
                          op.row_parallel,
                          program.weights()[op.weights[0]].whole_rows};
    case OpKind::kGatedMul:
      return GatedMulParams{in(0), out(0), result->cols, dtype, op.activation};
    case OpKind::kSoftCap:
      return SoftCapParams{static_cast<const float*>(in(0)), static_cast<float*>(out(0)),
                           result->cols, op.softcap};
    case OpKind::kGatherRows:
      return GatherRowsParams{in(0), out(0), result->cols, dtype};
    case OpKind::kMoeRoute:
      return route(in(0), op.weights.empty() ? nullptr : vector(0), out(0), out(1));
    case OpKind::kRouter: {
      const WeightSpec& weight = program.weights()[op.weights[0]];
      LinearParams linear{};
      linear.x = in(0);
      linear.weight = weights[op.weights[0]];
      linear.out = out(0);
      linear.dtype = dtype;
      linear.out_dtype = DType::kF32;
      linear.whole_rows = weight.whole_rows;
      return RouterParams{
          linear, route(out(0), op.weights.size() > 1 ? vector(1) : nullptr, out(1), out(2))};
    }
    case OpKind::kMoeExperts:
      return MoeExpertsParams{.x = in(0),
                              .experts = static_cast<const int32_t*>(in(1)),
                              .weights = static_cast<const float*>(in(2)),
                              .gate_up = weights[op.weights[0]],
                              .down = weights[op.weights[1]],
                              .out = out(0),
                              .dtype = dtype,
                              .out_dtype = result->dtype,
                              .activation = op.activation,
                              .top_k = static_cast<int32_t>(program.values()[op.inputs[1]].cols),
                              .first_expert = op.first_expert,
                              .num_experts = op.num_experts,
                              .regions = op.inputs.size() > 3 ? expert_ranks_ : 0,
                              .region_rows = expert_buffers_.region_rows,
                              .counts = op.inputs.size() > 3 ? expert_buffers_.counts : nullptr};
    case OpKind::kMoeDispatch:
      check(op.share.ranks == expert_ranks_, "executable", "a program for ", op.share.ranks,
            " ranks is planned for ", expert_ranks_);
      return MoeDispatchParams{.x = in(0),
                               .experts = static_cast<const int32_t*>(in(1)),
                               .weights = static_cast<const float*>(in(2)),
                               .places = static_cast<int32_t*>(out(0)),
                               .share = op.share,
                               .received = expert_buffers_};
    case OpKind::kMoeCombine:
      return MoeCombineParams{.partial = in(0),
                              .places = static_cast<const int32_t*>(in(1)),
                              .out = out(1),
                              .received = expert_buffers_};
    case OpKind::kAllReduce:
      return AllReduceParams{in(0),        op.weights.empty() ? nullptr : vector(0), out(0),
                             result->cols, program.values()[op.inputs[0]].dtype,     result->dtype,
                             logits_rows};
    case OpKind::kAllGather: {
      const Value& part = program.values()[op.inputs[0]];
      return AllGatherParams{in(0), out(0), part.cols, part.dtype, logits_rows};
    }
    case OpKind::kStageReceive:
      return StageReceive{};
    case OpKind::kStageRelease:
      return StageRelease{};
    case OpKind::kStageSend: {
      StageSendParams params{};
      for (const int32_t id : op.inputs) {
        const Value& sent = program.values()[id];
        params.values[params.num_values] = value(id);
        params.row_bytes[params.num_values++] =
            sent.cols * static_cast<int64_t>(dtype_size(sent.dtype));
      }
      return params;
    }
    case OpKind::kQkNorm:
    case OpKind::kRope:
    case OpKind::kQkvPrepare: {
      QkvPrepareParams params{};
      params.qkv = in(0);
      params.out = out(0);
      params.shape = op.heads;
      params.dtype = dtype;
      if (!op.weights.empty()) {
        params.q_norm = vector(0);
        params.k_norm = vector(1);
        params.eps = op.eps;
      }
      if (op.rope >= 0) {
        params.rope = ropes_[op.rope];
        params.rope_pairs = static_cast<int32_t>(program.ropes()[op.rope].inv_freq.size());
        params.interleaved = program.ropes()[op.rope].interleaved;
        params.max_position = max_position_;
      }
      if (op.kv_layer >= 0) {
        params.cache = &kv[op.kv_layer];
        params.kv_group = kv_layout_.layers[op.kv_layer].group;
      }
      return params;
    }
    case OpKind::kCacheWrite: {
      const char* heads = static_cast<const char*>(in(0));
      const auto size = static_cast<int64_t>(dtype_size(dtype));
      const int64_t keys = op.heads.q_cols();
      const int64_t values = keys + int64_t{op.heads.num_kv_heads} * op.heads.head_dim;
      return CacheWriteParams{.key = heads + keys * size,
                              .value = heads + values * size,
                              .key_stride = op.heads.qkv_cols(),
                              .value_stride = op.heads.qkv_cols(),
                              .dtype = dtype,
                              .cache = &kv[op.kv_layer],
                              .kv_group = kv_layout_.layers[op.kv_layer].group};
    }
    case OpKind::kPagedAttention:
      return PagedAttentionParams{.qkv = in(0),
                                  .out = out(0),
                                  .shape = op.heads,
                                  .dtype = dtype,
                                  .scale = op.scale,
                                  .window = op.window,
                                  .softcap = op.softcap,
                                  .cache = &kv[op.kv_layer],
                                  .kv_group = kv_layout_.layers[op.kv_layer].group,
                                  .plan = plan_of(op)};
  }
  fail(ErrorKind::kInternal, "executable", "no kernel for ", op_name(op));
}

void Executable::find_expert_buffers(const Program& program, int64_t region_rows) {
  // Those of all layers lie at one place.
  for (const Op& op : program.ops()) {
    if (op.kind == OpKind::kMoeDispatch) {
      const Value& x = program.values()[op.outputs[4]];
      expert_buffers_.region_rows = region_rows;
      expert_buffers_.hidden = x.cols;
      expert_buffers_.top_k = static_cast<int32_t>(program.values()[op.outputs[2]].cols);
      expert_buffers_.dtype = x.dtype;
      expert_buffers_.counts = static_cast<int32_t*>(value(op.outputs[1]));
      expert_buffers_.experts = static_cast<int32_t*>(value(op.outputs[2]));
      expert_buffers_.weights = static_cast<float*>(value(op.outputs[3]));
      expert_buffers_.x = value(op.outputs[4]);
    } else if (op.kind == OpKind::kMoeCombine) {
      expert_buffers_.sum_dtype = program.values()[op.outputs[0]].dtype;
      expert_buffers_.sums = value(op.outputs[0]);
    }
  }
  if (expert_buffers_.counts == nullptr) return;
  // Experts go by them even where the ranks end before any have come.
  const std::vector<int32_t> none(static_cast<size_t>(expert_ranks_));
  device_->copy_in(expert_buffers_.counts, none.data(), none.size() * sizeof(int32_t));
}

const AttentionPlan* Executable::plan_of(const Op& op) const {
  for (const AttentionPlan& plan : attention_plans_) {
    if (plan.serves(op.heads, op.window, op.softcap)) return &plan;
  }
  fail(ErrorKind::kInternal, "executable", "no attention plan for an op");
}

void Executable::run(const StepContext& ctx) const {
  plan_attention(ctx);
  run(ctx, 0, calls_.size());
}

void Executable::plan_attention(const StepContext& ctx) const {
  for (const AttentionPlan& plan : attention_plans_) device_->kernels().plan_attention(plan, ctx);
}

void Executable::run_apart(StepContext ctx, size_t first, size_t last) const {
  if (first == last) return;
  const bool overlaps = std::exchange(ctx.overlap_launches, false);
  run(ctx, first, first + 1);
  ctx.overlap_launches = overlaps;
  run(ctx, first + 1, last);
}

void Executable::run(const StepContext& ctx, size_t first, size_t last) const {
  const Kernels& kernels = device_->kernels();
  struct Visitor {
    const Kernels& kernels;
    const StepContext& ctx;
    bool follows_prepare = false;
    void operator()(const EmbeddingParams& params) const { kernels.embedding(params, ctx); }
    void operator()(const RmsNormParams& params) const { kernels.rms_norm(params, ctx); }
    void operator()(const LinearParams& params) const { kernels.linear(params, ctx); }
    void operator()(const AddParams& params) const { kernels.add(params, ctx); }
    void operator()(const GatedMulParams& params) const { kernels.gated_mul(params, ctx); }
    void operator()(const SoftCapParams& params) const { kernels.soft_cap(params, ctx); }
    void operator()(const GatherRowsParams& params) const { kernels.gather_rows(params, ctx); }
    void operator()(const RouterParams& params) const { kernels.router(params, ctx); }
    void operator()(const MoeRouteParams& params) const { kernels.moe_route(params, ctx); }
    void operator()(const MoeExpertsParams& params) const { kernels.moe_experts(params, ctx); }
    void operator()(const MoeDispatchParams& params) const { kernels.moe_dispatch(params, ctx); }
    void operator()(const MoeCombineParams& params) const { kernels.moe_combine(params, ctx); }
    void operator()(const QkvPrepareParams& params) const { kernels.qkv_prepare(params, ctx); }
    void operator()(const CacheWriteParams& params) const { kernels.cache_write(params, ctx); }
    void operator()(PagedAttentionParams params) const {
      params.follows_prepare = follows_prepare;
      kernels.paged_attention(params, ctx);
    }
    void operator()(const AllReduceParams& params) const { kernels.all_reduce(params, ctx); }
    void operator()(const AllGatherParams& params) const { kernels.all_gather(params, ctx); }
    void operator()(const StageSendParams& params) const { kernels.stage_send(params, ctx); }
    void operator()(StageReceive) const { kernels.stage_receive(ctx); }
    void operator()(StageRelease) const { kernels.stage_release(ctx); }
  };
  Visitor visitor{kernels, ctx};
  for (size_t i = first; i < last; ++i) {
    if (ctx.communicator != nullptr) ctx.communicator->show_life();
    std::visit(visitor, calls_[i]);
    visitor.follows_prepare = std::holds_alternative<QkvPrepareParams>(calls_[i]);
  }
}

}  // namespace mrv1
