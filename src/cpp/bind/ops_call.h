// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "bind/bind.h"
#include "bind/device_array.h"
#include "bind/ops_context.h"
#include "ops/kernels.h"

namespace mrv1 {

// An array of a call.
struct Operand {
  static constexpr int kMaxDims = 8;

  const char* name = "";
  void* data = nullptr;
  nb::dlpack::dtype dtype{};
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements

  int64_t cols() const { return shape[ndim - 1]; }
  int64_t rows() const;  // all dimensions but the last
  int64_t size() const { return rows() * cols(); }
  bool is(DType type) const { return dtype == element_type(type).dlpack(); }
  std::vector<int64_t> sizes() const { return {shape, shape + ndim}; }
};

// One call of an op: takes the caller's arrays in, decides device and stream by the first of them,
// makes outputs and launches. Every refusal is kInvalidArgument, names op and argument, and comes
// before the launch.
class OpCall {
 public:
  // `stream` may be None.
  OpCall(OpsContext& context, const char* op, nb::handle stream);
  OpCall(const OpCall&) = delete;
  OpCall& operator=(const OpCall&) = delete;

  // An array that the op reads. Any strides; see contiguous().
  Operand input(const char* name, nb::handle array) { return import(name, array, false); }
  // One that may be a single value without dimensions, which counts as [1].
  Operand scalars(const char* name, nb::handle array) { return import(name, array, false, 0); }
  // One that it writes, too.
  Operand in_place(const char* name, nb::handle array) { return import(name, array, true); }
  // Refuses an array that cannot be written.
  void writable(const char* name, nb::handle array) const;
  // Whether an array can be made of it, whatever its type.
  bool is_array(nb::handle object) const {
    return context_.kind(object).access != ArrayKind::Access::kNone;
  }
  // The result: `given`, which must have shape and dtype, or a new array of the first input's kind.
  Operand output(const char* name, nb::handle given, const std::vector<int64_t>& shape,
                 DType dtype);
  // Memory for the length of the call, or what keep() makes of it.
  void* scratch(int64_t bytes, bool zeroed = false);

  // Checks, each of which returns its argument.
  const Operand& contiguous(const Operand& operand) const;
  const Operand& ndim(const Operand& operand, int count, const char* shape) const;
  const Operand& typed(const Operand& operand, DType dtype) const;
  const Operand& shaped(const Operand& operand, std::span<const int64_t> shape) const;
  // float32 or bfloat16.
  DType activation(const Operand& operand) const;
  // Contiguous [..., cols] of float32 or bfloat16, whose rows a step can count; its dtype.
  DType matrix(const Operand& operand) const;
  // Contiguous int32 of one dimension; `count` < 0 allows any.
  const Operand& ints(const Operand& operand, int64_t count = -1) const;
  // Contiguous float32 [count].
  const Operand& floats(const Operand& operand, int64_t count) const;
  // No element of `out` lies in what `in` covers, unless they are the same array.
  void no_partial_overlap(const Operand& out, const Operand& in) const;
  template <typename... Parts>
  void require(bool ok, const Parts&... parts) const {
    check(ok, op_, parts...);
  }
  // Values of a contiguous array as the host can look at them: on the CPU, and on a GPU with
  // MRV1_SYNC=1. Else empty.
  std::span<const int32_t> look(const Operand& ints) {
    return look<int32_t>(ints, ctx_.sync_launches);
  }
  // What addresses a cache, or scales it: with MRV1_CHECK_SLOTS=1, too.
  template <typename T>
  std::span<const T> look_for_cache(const Operand& values) {
    return look<T>(values, context_.check_slots());
  }
  // Each of look(operand) lies in [low, high).
  void in_range(const Operand& operand, int64_t low, int64_t high, const char* what);

  // Runs fn(kernels, context) in the call's stream, with so much workspace.
  template <typename Fn>
  void launch(int64_t workspace_bytes, Fn&& fn) {
    run(workspace_bytes, &fn, [](void* state, const Kernels& kernels, const StepContext& ctx) {
      (*static_cast<std::remove_reference_t<Fn>*>(state))(kernels, ctx);
    });
  }
  // After the launch: what the caller gets for an output.
  nb::object result(const Operand& output);

  StepContext& context() { return ctx_; }
  OpsDevice& shared() { return *shared_; }
  Device& device() { return *shared_->device; }
  void* stream() const { return stream_; }
  const char* op() const { return op_; }
  int num_threads();
  // What must live as long as something that outlives the call.
  std::vector<StreamBuffer> take_scratch() { return std::move(scratch_); }

 private:
  using Body = void (*)(void* state, const Kernels& kernels, const StepContext& ctx);
  struct Made {
    const void* data;
    nb::object array;  // what was given, or made by NumPy; else null
    std::shared_ptr<ArrayMemory> memory;
  };

  template <typename T>
  std::span<const T> look(const Operand& values, bool on_gpu) {
    return {static_cast<const T*>(look_at(values, sizeof(T), on_gpu)),
            on_gpu || device().type() == DeviceType::kCpu ? static_cast<size_t>(values.size()) : 0};
  }
  const void* look_at(const Operand& values, size_t size, bool on_gpu);
  Operand import(const char* name, nb::handle array, bool written, int min_dims = 1);
  // How an import reads an array: fills the operand, and returns what keeps its memory.
  nb::object import_numpy(Operand& operand, nb::handle array, bool written);
  nb::object import_own(Operand& operand, nb::handle array);
  nb::object import_dlpack(Operand& operand, nb::handle array, bool written);
  // False if the array has to come by import_dlpack().
  bool import_exchange(Operand& operand, nb::handle array, bool written);
  void locate(const char* name, nb::handle array, int type, int ordinal);
  // The stream of the call is the current one of the library.
  bool is_current(const DlpackExchange& exchange, int ordinal) const;
  void run(int64_t workspace_bytes, void* state, Body body);
  void keep_sources();

  OpsContext& context_;
  const char* op_;
  nb::object given_stream_;  // None: the library's current one
  nb::object stream_owner_;
  void* stream_ = nullptr;
  bool known_to_library_ = false;  // the stream is the one the first array's owner uses anyway
  bool keeps_sources_ = false;     // some of them might be given back before the stream is done
  OpsDevice* shared_ = nullptr;
  nb::object first_;  // the first input
  const char* first_name_ = nullptr;
  StepContext ctx_;
  std::vector<nb::object> sources_;
  std::vector<nb::ndarray<nb::ro>> arrays_;
  std::vector<StreamBuffer> scratch_;
  std::vector<Made> made_;
  std::vector<std::unique_ptr<char[]>> looked_;
};

struct OpsHandle : Handle<OpsContext> {
  using Handle::Handle;
};

// Methods of _core.Ops, by topic.
void bind_packed_weights(nb::class_<OpsHandle>& ops, nb::module_& m);
void bind_dense_ops(nb::class_<OpsHandle>& ops);
void bind_moe_ops(nb::class_<OpsHandle>& ops);
void bind_attention_ops(nb::class_<OpsHandle>& ops, nb::module_& m);
void bind_block_ops(nb::class_<OpsHandle>& ops);
void bind_sampling_ops(nb::class_<OpsHandle>& ops);

}  // namespace mrv1
