// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "dist/expert_link.h"
#include "dist/stage_link.h"
#include "ops/activation.h"
#include "ops/kv_cache.h"
#include "ops/moe_route.h"
#include "program/kv_layout.h"

namespace mrv1 {

// What a value has one row of: a token or a logits row of the step, a place for a token that a rank
// may send, or a rank.
enum class RowSpace { kTokens, kLogits, kReceived, kRanks };

// A value of the program: a matrix [rows of the space, cols] that one op writes.
struct Value {
  std::string name;  // of an input, else empty
  RowSpace space = RowSpace::kTokens;
  int64_t cols = 0;
  DType dtype = DType::kF32;
  bool fused_away = false;  // was inside a chain that a fused op replaced: nothing writes it
};

enum class OpKind {
  kEmbedding,
  kRmsNorm,
  kAdd,
  kLinear,
  kGatedMul,
  kQkNorm,
  kRope,
  kCacheWrite,
  kPagedAttention,
  kGatherRows,
  kSoftCap,
  kMoeRoute,    // outputs: experts, weights
  kMoeExperts,  // inputs: x, experts, weights, counts if received; weights: gate_up, down
  // Inputs: x, experts, weights; outputs: places, then what ranks have sent: counts, experts,
  // weights, x.
  kMoeDispatch,
  kMoeCombine,  // inputs: partial, places; outputs: sums that ranks have sent back, the total
  kAllReduce,
  kAllGather,
  // Made by Program::stage() only.
  kStageReceive,  // first; outputs: what the stage before has written
  kStageRelease,  // behind the last op that reads them
  kStageSend,     // behind all that it sends
  // Made by the fusion pass only.
  kAddRmsNorm,  // outputs: sum, normed
  kQkvPrepare,  // QK-norm (optional), RoPE and cache write in one
  kLinearGatedMul,
  kRouter,  // linear and moe_route; weights: the linear's, bias; outputs: logits, experts, weights
};

// How a router chooses: MoeRouteParams.
struct RouteSpec {
  int32_t top_k = 1;
  RouterScores scores = RouterScores::kSoftmax;
  bool renormalize = true;
  float min_sum = 0.0f;
  float scale = 1.0f;
};

// One op: operands by index into the program's values and weights, and its attributes. Attributes
// an op does not use keep their defaults.
struct Op {
  OpKind kind = OpKind::kAdd;
  std::vector<int32_t> inputs = {};
  std::vector<int32_t> outputs = {};
  std::vector<int32_t> weights = {};
  float eps = 0.0f;
  HeadShape heads = {};
  float scale = 0.0f;                         // attention, embedding
  int32_t window = 0;                         // attention; 0 = none
  float softcap = 0.0f;                       // attention, soft_cap; 0 = none
  Activation activation = Activation::kNone;  // gated_mul, linear_gated_mul, moe_experts
  int32_t kv_layer = -1;                      // cache_write, attention
  int32_t rope = -1;                          // index of a rope table
  int32_t layer = -1;                         // decoder layer the op belongs to, -1 outside
  // linear, moe_experts: the output is a partial sum where ranks share the model.
  bool row_parallel = false;
  int64_t first_row = 0;  // embedding: the token id of the table's first row
  RouteSpec route = {};   // moe_route
  // moe_experts: the expert of its first matrices, and how many all ranks have.
  int32_t first_expert = 0, num_experts = 0;
  ExpertShare share = {};  // moe_dispatch
};
// Whether ranks meet in an op: it waits for those of the others.
constexpr bool is_collective(OpKind kind) {
  return kind == OpKind::kAllReduce || kind == OpKind::kAllGather || kind == OpKind::kMoeDispatch ||
         kind == OpKind::kMoeCombine;
}
// The name of its kind, with the activation in it: silu_mul, linear_gelu_mul.
std::string_view op_name(const Op& op);

// Which part of a tensor [rows, cols] a segment takes: as many rows and columns as the segment has,
// from these on. Zeros: all of it.
struct TensorSlice {
  int64_t rows = 0, cols = 0;  // of the whole tensor
  int64_t first_row = 0, first_col = 0;
};

// A segment of a weight: rows that one tensor of the checkpoint supplies.
struct WeightSegment {
  std::string tensor;
  int64_t row_start = 0;
  int64_t rows = 0;
  TensorSlice slice = {};
};

enum class WeightKind { kMatrix, kVector };

// How a matrix is stored: in the program's dtype, or in NVFP4 (core/float4.h), whose block scales,
// global scale and scale of activations are tensors of their own beside each segment's.
enum class WeightFormat { kPlain, kNvfp4 };

// Bounds of what a program may ask for, far above any model, so that products of sizes stay within
// 64 bits.
constexpr int64_t kMaxExtent = int64_t{1} << 31;  // rows or columns of a weight, columns of a value
constexpr int64_t kMaxTensorBytes = int64_t{1} << 48;  // a weight or a value
constexpr int32_t kMaxHeads = 1 << 16;
constexpr int32_t kMaxHeadDim = 256;

// A weight as the program needs it. Several tensors may be stacked by rows (fused projections).
struct WeightSpec {
  std::string name;
  WeightKind kind = WeightKind::kMatrix;
  WeightFormat format = WeightFormat::kPlain;
  int64_t rows = 0;
  int64_t cols = 1;
  std::vector<WeightSegment> segments;
  float offset = 0.0f;     // of a vector: added to its values when they are loaded
  int64_t whole_rows = 0;  // of all ranks together, where they share it out by rows; else 0
  int64_t matrices = 1;    // the rows are those of as many equal matrices (WeightView::matrices)
};

// Bytes of a weight in a program of a dtype, scales included and padding of layouts not.
int64_t weight_bytes(const WeightSpec& weight, DType dtype);

// Rotary angles: position p turns pair i by p * inv_freq[i]; cos and sin are multiplied by factor.
// QkvPrepareParams says which elements of a head are a pair.
struct RopeSpec {
  std::vector<float> inv_freq;  // one a pair, at most head_dim / 2: the rest passes through
  float factor = 1.0f;
  bool interleaved = false;
};

// Where the list can be cut: attention (piecewise graphs), stage (pipeline), collective (tensor and
// expert parallelism, two-batch overlap). The cut stands before op `op`. After fusion the residual
// add that ends a layer is part of the next layer's first op, so that two values are live at a
// stage cut; Program::stage() cuts before it, where one is.
enum class CutKind { kAttention, kStage, kCollective };
struct Cut {
  CutKind kind;
  int32_t op;
};

// Values that cross a boundary between stages: by index, and as both stages know them.
struct CrossingValues {
  std::vector<int32_t> ids;
  std::vector<StageValue> schema;
};

// A model's forward pass as a flat list of native ops. Python wires it once; nothing in it says
// where or how large it runs. Building methods check shapes and dtypes and throw
// kInvalidArgument naming the op; the program is then as it was before.
class Program {
 public:
  explicit Program(DType dtype);

  // --- weights -------------------------------------------------------------------------------
  int32_t weight(WeightSpec spec);

  // --- wiring: values are returned by index ----------------------------------------------------
  // Set by the caller, for tests; of the program's dtype, or float32 or int32.
  int32_t input(std::string name, int64_t cols, RowSpace space, std::optional<DType> dtype = {});
  // `first_row` is the token id of the table's first row: other ids outside of it give zeros.
  int32_t embedding(int32_t table, float scale, int64_t first_row = 0);
  int32_t rms_norm(int32_t x, int32_t weight, float eps);
  int32_t add(int32_t a, int32_t b);
  // With `wide` the result stays in float32, for an all_reduce that rounds it.
  int32_t linear(int32_t x, int32_t weight, int32_t bias, int32_t residual, bool row_parallel,
                 bool wide = false);
  // The sum over the ranks, in the program's dtype; x may be wider.
  int32_t all_reduce(int32_t x, int32_t bias);
  int32_t gated_mul(int32_t x, Activation activation);
  // The experts of each token, int32, and their weights, float32: [tokens, top_k]. `bias` is a
  // vector or -1.
  std::pair<int32_t, int32_t> moe_route(int32_t logits, int32_t bias, const RouteSpec& spec);
  // The weighted sum of what the tokens' experts make of x. gate_up and down have the matrices of
  // experts [first_expert, first_expert + matrices) of num_experts, 0 for just these; others add
  // nothing.
  struct ExpertsSpec {
    Activation activation = Activation::kSilu;
    int32_t first_expert = 0, num_experts = 0;
    bool row_parallel = false;  // a part of the sum, for an all_reduce
    bool wide = false;          // in float32
  };
  int32_t moe_experts(int32_t x, int32_t experts, int32_t weights, int32_t gate_up, int32_t down,
                      const ExpertsSpec& spec);
  // The same over ranks that each have tokens of their own: they are sent to the ranks of `share`
  // that have their experts, go through those of them that this rank has, and what comes of that is
  // sent back and added up.
  int32_t moe_exchange(int32_t x, int32_t experts, int32_t weights, int32_t gate_up, int32_t down,
                       const ExpertsSpec& spec, const ExpertShare& share);
  int32_t rope_table(RopeSpec spec);
  struct AttentionSpec {
    HeadShape heads;
    float scale = 0.0f;
    float softcap = 0.0f;  // 0 = none
    int32_t window = 0;    // 0 = none
    int32_t kv_layer = 0;
    int32_t rope = -1;
    int32_t q_norm = -1, k_norm = -1;  // weights, both or none
    float eps = 0.0f;
  };
  int32_t attention(int32_t qkv, const AttentionSpec& spec);
  int32_t gather_rows(int32_t x);
  // The end of a language model: rows that are sampled, through the head, in float32, and kept
  // within (-softcap, softcap) if it is not 0. The head may be the rows of one of `ranks` ranks,
  // whose logits are gathered then.
  int32_t logits(int32_t x, int32_t weight, float softcap, int32_t ranks = 1);
  void output(int32_t value);  // keeps a value readable after a run

  void begin_layer(int32_t layer);
  void end_layer();

  // --- passes --------------------------------------------------------------------------------
  // Runs each fusion pattern (program/fusion.cc) once over the list, longer patterns before the
  // shorter ones they contain; returns how often each matched.
  std::vector<std::pair<std::string, int>> fuse();
  // The part of a pipeline that holds layers [first, last) (program/stage.cc): their ops, what
  // stands before the first layer of all or after the last, and of weights, rope tables and kv
  // layers those that these use. Values that earlier layers write are received, values that later
  // ones read are sent. Comes before fuse(), as an op that is fused across a boundary cannot be
  // cut. kInvalidArgument naming what cannot be cut.
  Program stage(int32_t first, int32_t last) const;

  // --- reading ---------------------------------------------------------------------------------
  DType dtype() const { return dtype_; }
  const std::vector<Op>& ops() const { return ops_; }
  const std::vector<Value>& values() const { return values_; }
  const std::vector<WeightSpec>& weights() const { return weights_; }
  const std::vector<RopeSpec>& ropes() const { return ropes_; }
  const std::vector<int32_t>& inputs() const { return inputs_; }
  const std::vector<int32_t>& outputs() const { return outputs_; }
  int32_t logits_value() const { return logits_; }
  int32_t hidden_value() const { return hidden_; }  // what logits() was given
  // Of the whole model, so that stages without logits have it too; 0 without logits.
  int32_t vocab_size() const { return vocab_size_; }
  int32_t num_layers() const;
  // Whether the weight corrects the choice of experts. Random models have zeros there: anything
  // else would choose the same experts for all tokens.
  bool is_route_bias(int32_t weight) const;
  // Whether moe_experts multiplies by the weight: it may be one matrix, where there is one expert.
  bool is_expert_weight(int32_t weight) const;
  // Of a stage: what it takes from the one before, at places that nothing else uses, and what it
  // gives to the next.
  const CrossingValues& received() const { return received_; }
  const CrossingValues& sent() const { return sent_; }
  // Cache geometry per kv layer.
  const std::vector<HeadShape>& kv_layers() const { return kv_layers_; }
  // Groups of kv layers and the places of their blocks; of a stage, the groups of the whole model
  // and the places of its own layers. kInvalidArgument if layers of several groups differ in their
  // heads: they could not share blocks.
  KvLayout kv_layout() const;
  std::vector<Cut> cuts() const;
  // One line an op. format "text" or "dot" (Graphviz).
  std::string dump(std::string_view format) const;

 private:
  int32_t add_value(std::string name, RowSpace space, int64_t cols, DType dtype);
  int32_t emit(Op op, RowSpace space, int64_t cols, DType dtype);
  const Value& value(int32_t id, std::string_view op) const;
  const WeightSpec& weight_spec(int32_t id, std::string_view op) const;
  void check_vector(int32_t weight, int64_t size, std::string_view op) const;
  void check_matrix(int32_t weight, int64_t cols, std::string_view op) const;
  int32_t emit_experts(std::vector<int32_t> inputs, int32_t gate_up, int32_t down,
                       const ExpertsSpec& spec);
  void check_addend(const Value& value, int64_t cols, std::string_view op) const;
  CrossingValues crossing(std::span<const int32_t> layers, int32_t boundary) const;
  void place_release();

  DType dtype_;
  std::vector<Op> ops_;
  std::vector<Value> values_;
  std::vector<WeightSpec> weights_;
  std::vector<RopeSpec> ropes_;
  std::vector<int32_t> inputs_, outputs_;
  std::vector<HeadShape> kv_layers_;
  std::vector<int32_t> kv_windows_;  // by kv layer
  int32_t logits_ = -1;
  int32_t hidden_ = -1;
  int32_t vocab_size_ = 0;
  int32_t layer_ = -1;
  CrossingValues received_, sent_;
  std::optional<KvLayout> stage_layout_;
};

}  // namespace mrv1
