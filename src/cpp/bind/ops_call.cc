// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "bind/ops_call.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <limits>

namespace mrv1 {
namespace {

enum DlDevice { kDlCpu = 1, kDlCuda = 2, kDlCudaHost = 3, kDlCudaManaged = 13 };

std::string device_text(DeviceType type, int ordinal) {
  return type == DeviceType::kCpu ? "the CPU" : concat("GPU ", ordinal);
}

std::string shape_text(std::span<const int64_t> shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += concat(i > 0 ? ", " : "", shape[i]);
  return text + "]";
}

std::string shape_text(const Operand& operand) {
  return shape_text({operand.shape, static_cast<size_t>(operand.ndim)});
}

std::string strides_text(const Operand& operand) {
  return shape_text({operand.strides, static_cast<size_t>(operand.ndim)});
}

std::string type_text(nb::dlpack::dtype dtype) {
  const ElementType* type = find_element_type(dtype);
  if (type != nullptr) return type->name;
  return concat("DLPack type (", int{dtype.code}, ", ", int{dtype.bits}, ", ", int{dtype.lanes},
                ")");
}

const char* class_name(nb::handle object) {
  return reinterpret_cast<const char*>(nb::type_name(object.type()).c_str());
}

// Sizes and address of an array whose memory is kept elsewhere.
void take(Operand& operand, const nb::ndarray<nb::ro>& array) {
  operand.data = const_cast<void*>(array.data());
  operand.dtype = array.dtype();
  operand.ndim = static_cast<int>(array.ndim());
  for (int i = 0; i < std::min(operand.ndim, Operand::kMaxDims); ++i) {
    operand.shape[i] = static_cast<int64_t>(array.shape(i));
    operand.strides[i] = array.stride(i);
  }
}

void set_contiguous(Operand& operand) {
  int64_t stride = 1;
  for (int i = operand.ndim; i-- > 0;) {
    operand.strides[i] = stride;
    stride *= operand.shape[i];
  }
}

bool is_contiguous(const Operand& operand) {
  int64_t stride = 1;
  for (int i = operand.ndim; i-- > 0;) {
    if (operand.shape[i] != 1 && operand.strides[i] != stride) return operand.size() == 0;
    stride *= operand.shape[i];
  }
  return true;
}

// The bytes from the lowest element to past the highest, gaps between them included.
std::pair<const char*, const char*> reach(const Operand& operand) {
  const int64_t size = operand.dtype.bits / 8;
  const char* begin = static_cast<const char*>(operand.data);
  const char* end = begin + size;
  for (int i = 0; i < operand.ndim; ++i) {
    const int64_t bytes = (operand.shape[i] - 1) * operand.strides[i] * size;
    (bytes < 0 ? begin : end) += bytes;
  }
  return {begin, end};
}

// Memory of an output, and the stream it is given back in.
struct OutputMemory {
  OutputMemory(StreamBuffer memory, nb::object stream)
      : buffer(std::move(memory)), owner(std::move(stream)) {}
  ~OutputMemory() {
    buffer = StreamBuffer();  // before the stream goes
    if (!nb::is_alive()) owner.release();
  }
  StreamBuffer buffer;
  nb::object owner;
};

}  // namespace

int64_t Operand::rows() const {
  int64_t rows = 1;
  for (int i = 0; i + 1 < ndim; ++i) rows *= shape[i];
  return rows;
}

// The default stream, as DLPack numbers it; CUDA takes the number for a handle, too.
constexpr intptr_t kDefaultStream = 1;

OpCall::OpCall(OpsContext& context, const char* op, nb::handle stream)
    : context_(context), op_(op), given_stream_(nb::borrow(stream)) {
  ctx_.overlap_launches = false;  // weights may be what the op before this one wrote
  ctx_.sync_launches = context.sync_launches();
  ctx_.rows.num_groups = 1;
}

void OpCall::locate(const char* name, nb::handle array, int type, int ordinal) {
  check(type == kDlCpu || type == kDlCuda || type == kDlCudaHost || type == kDlCudaManaged, op_,
        name, " lies on DLPack device (", type, ", ", ordinal,
        "); must be in memory of the CPU or of a GPU of CUDA");
  const bool on_cpu = type == kDlCpu || type == kDlCudaHost;
  const DeviceType kind = on_cpu ? DeviceType::kCpu : DeviceType::kCuda;
  const int number = on_cpu ? 0 : ordinal;
  if (shared_ != nullptr) {
    if (kind == device().type() && number == device().ordinal()) return;
    fail(ErrorKind::kInvalidArgument, op_, name, " lies on ", device_text(kind, number), " and ",
         first_name_, " on ", device_text(device().type(), device().ordinal()),
         "; all arrays of a call must be on one device");
  }
  shared_ = &context_.device(kind, number);
  first_name_ = name;
  ctx_.device = &device();
  if (on_cpu) {
    check(given_stream_.is_none(), op_, "stream must be None for arrays of the CPU");
    ctx_.pool = device().pool();
    return;
  }
  stream_owner_ = given_stream_;
  const DlpackExchange* exchange = context_.kind(array).exchange;
  if (given_stream_.is_none() && exchange != nullptr) {
    if (exchange->current_stream(kDlCuda, number, &stream_) != 0) throw nb::python_error();
    known_to_library_ = true;
  } else {
    if (given_stream_.is_none()) {
      stream_owner_ = context_.host().attr("current_stream")(array, number);
      known_to_library_ = !stream_owner_.is_none();
    }
    stream_ = stream_owner_.is_none() ? device().stream() : stream_handle(stream_owner_);
  }
  // Handle 0 is the default stream to its library, but the device's own one to us.
  if (stream_ == nullptr) stream_ = reinterpret_cast<void*>(kDefaultStream);
  ctx_.stream = stream_;
  std::deque<OpsDevice::Pending>& pending = shared_->pending;
  while (!pending.empty() && pending.front().fence->passed()) {
    shared_->spare_fences.push_back(std::move(pending.front().fence));
    pending.pop_front();
  }
}

void OpCall::writable(const char* name, nb::handle array) const {
  const ArrayKind& kind = context_.kind(array);
  if (kind.access == ArrayKind::Access::kNumpy) {
    const OpsContext::Names& names = context_.names();
    check(nb::cast<bool>(array.attr(names.flags).attr(names.writeable)), op_, name,
          " is read-only and would be written");
  } else if (!kind.is_mutable) {
    fail(ErrorKind::kInvalidArgument, op_, name, " is an array of type ", class_name(array),
         ", which cannot be written");
  }
}

nb::object OpCall::import_numpy(Operand& operand, nb::handle array, bool written) {
  const OpsContext::Names& names = context_.names();
  locate(operand.name, array, kDlCpu, 0);
  nb::object source = nb::borrow(array);
  const nb::object dtype = array.attr(names.dtype);
  const ElementType* registered = context_.registered_type(dtype, op_, operand.name);
  if (registered != nullptr) {
    source = array.attr(names.view)(registered->bits == 8 ? context_.uint8() : context_.uint16());
  }
  if (written) writable(operand.name, source);
  nb::ndarray<nb::ro> imported;
  if (!nb::try_cast(source, imported, false)) {
    fail(ErrorKind::kInvalidArgument, op_, operand.name, " is an array of dtype ",
         nb::str(dtype).c_str(), " that cannot be read; must be a plain array in native order");
  }
  take(operand, imported);
  if (registered != nullptr) operand.dtype = registered->dlpack();
  return source;
}

// No other library is between, so the streams are ordered here.
nb::object OpCall::import_own(Operand& operand, nb::handle array) {
  const std::shared_ptr<ArrayMemory> memory = nb::cast<const DeviceArray&>(array).share();
  const bool on_cpu = memory->device->type() == DeviceType::kCpu;
  locate(operand.name, array, on_cpu ? kDlCpu : kDlCuda, memory->device->ordinal());
  void* writer = memory->writer != nullptr ? memory->writer : memory->device->stream();
  if (memory->written_in_stream) {
    if (on_cpu) {
      memory->device->synchronize();
    } else if (writer != stream_) {
      memory->device->order_streams(writer, stream_);
    }
  }
  keeps_sources_ |= !memory->released_in_stream || writer != stream_;
  operand.data = memory->data;
  operand.dtype = memory->type->dlpack();
  operand.ndim = static_cast<int>(memory->shape.size());
  if (operand.ndim <= Operand::kMaxDims) {
    std::copy(memory->shape.begin(), memory->shape.end(), operand.shape);
    set_contiguous(operand);
  }
  return nb::borrow(array);
}

bool OpCall::is_current(const DlpackExchange& exchange, int ordinal) const {
  void* current = nullptr;
  if (exchange.current_stream(kDlCuda, ordinal, &current) != 0) {
    PyErr_Clear();
    return false;
  }
  return (current == nullptr ? reinterpret_cast<void*>(kDefaultStream) : current) == stream_;
}

bool OpCall::import_exchange(Operand& operand, nb::handle array, bool written) {
  const ArrayKind& kind = context_.kind(array);
  if (kind.exchange == nullptr) return false;
  if (kind.may_need_grad && nb::cast<bool>(array.attr(context_.names().requires_grad))) {
    return false;
  }
  const std::optional<nb::dlpack::dltensor> lent = lend_tensor(*kind.exchange, array);
  if (!lent || lent->ndim > Operand::kMaxDims) return false;
  locate(operand.name, array, lent->device.device_type, lent->device.device_id);
  // Streams are not ordered this way.
  if (stream_ != nullptr && !is_current(*kind.exchange, lent->device.device_id)) return false;
  if (written) writable(operand.name, array);
  keeps_sources_ |= !known_to_library_;
  operand.data = static_cast<char*>(lent->data) + lent->byte_offset;
  operand.dtype = lent->dtype;
  operand.ndim = lent->ndim;
  std::copy_n(lent->shape, operand.ndim, operand.shape);
  if (lent->strides == nullptr) {
    set_contiguous(operand);
  } else {
    std::copy_n(lent->strides, operand.ndim, operand.strides);
  }
  return true;
}

nb::object OpCall::import_dlpack(Operand& operand, nb::handle array, bool written) {
  const OpsContext::Names& names = context_.names();
  try {
    const auto [type, ordinal] = nb::cast<std::pair<int, int>>(array.attr(names.dlpack_device)());
    locate(operand.name, array, type, ordinal);
    if (written) writable(operand.name, array);
    const nb::object capsule =
        stream_ == nullptr
            ? array.attr(names.dlpack)()
            : array.attr(names.dlpack)(nb::arg("stream") = reinterpret_cast<intptr_t>(stream_));
    nb::ndarray<nb::ro> imported;
    check(nb::try_cast(capsule, imported, false), op_, operand.name,
          " cannot be read: its __dlpack__ gave no tensor");
    take(operand, imported);
    arrays_.push_back(std::move(imported));
    // Another library may give memory back in another order.
    keeps_sources_ |= !known_to_library_ || !array.type().is(first_.type());
  } catch (const nb::python_error& error) {
    // What the library says, such as that a gradient would be lost.
    if (error.matches(PyExc_KeyboardInterrupt)) throw;
    const nb::object mrv1_error = nb::module_::import_("mrv1.errors").attr("Mrv1Error");
    if (error.matches(mrv1_error)) throw;
    const std::string text = nb::str(error.value()).c_str();
    fail(ErrorKind::kInvalidArgument, op_, operand.name, " cannot be exported: ", text);
  }
  return nb::borrow(array);
}

Operand OpCall::import(const char* name, nb::handle array, bool written, int min_dims) {
  Operand operand;
  operand.name = name;
  if (first_.ptr() == nullptr) first_ = nb::borrow(array);
  nb::object source;
  switch (context_.kind(array).access) {
    case ArrayKind::Access::kNumpy:
      source = import_numpy(operand, array, written);
      break;
    case ArrayKind::Access::kOwn:
      source = import_own(operand, array);
      break;
    case ArrayKind::Access::kDlpack:
      source = import_exchange(operand, array, written) ? nb::borrow(array)
                                                        : import_dlpack(operand, array, written);
      break;
    case ArrayKind::Access::kNone:
      fail(ErrorKind::kInvalidArgument, op_, name, " is of type ", class_name(array),
           "; must be an array of NumPy, or one with __dlpack__");
  }
  check(operand.ndim >= min_dims && operand.ndim <= Operand::kMaxDims, op_, name, " has ",
        operand.ndim, " dimensions; must have ", min_dims, " to ", Operand::kMaxDims);
  if (operand.ndim == 0) {
    operand.ndim = 1;
    operand.shape[0] = operand.strides[0] = 1;
  }
  sources_.push_back(std::move(source));
  return operand;
}

Operand OpCall::output(const char* name, nb::handle given, const std::vector<int64_t>& shape,
                       DType dtype) {
  check_internal(shared_ != nullptr, op_, "an output before any input");
  if (!given.is_none()) {
    const Operand operand = in_place(name, given);
    shaped(typed(contiguous(operand), dtype), shape);
    made_.push_back({operand.data, nb::borrow(given), nullptr});
    return operand;
  }
  if (context_.kind(first_).access == ArrayKind::Access::kNumpy) {
    const nb::object array = context_.empty(shape, dtype);
    const Operand operand = input(name, array);
    made_.push_back({operand.data, array, nullptr});
    return operand;
  }
  Operand operand;
  operand.name = name;
  operand.dtype = element_type(dtype).dlpack();
  operand.ndim = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), operand.shape);
  set_contiguous(operand);
  const size_t bytes = static_cast<size_t>(operand.size()) * dtype_size(dtype);
  auto memory = std::make_shared<ArrayMemory>(ArrayMemory{
      shared_->device, nullptr, nullptr, std::vector<size_t>(shape.begin(), shape.end()),
      &element_type(dtype), device().type() == DeviceType::kCuda, stream_,
      /*released_in_stream=*/true});
  auto owner = std::make_shared<OutputMemory>(
      allocate_in_stream(shared_->device, std::max<size_t>(bytes, 1), false, op_, stream_),
      stream_owner_);
  memory->data = owner->buffer.data();
  memory->owner = std::move(owner);
  operand.data = memory->data;
  made_.push_back({operand.data, nb::object(), std::move(memory)});
  return operand;
}

void* OpCall::scratch(int64_t bytes, bool zeroed) {
  scratch_.push_back(allocate_in_stream(
      shared_->device, static_cast<size_t>(std::max<int64_t>(bytes, 1)), zeroed, op_, stream_));
  return scratch_.back().data();
}

nb::object OpCall::result(const Operand& output) {
  for (Made& made : made_) {
    if (made.data != output.data) continue;
    if (made.memory == nullptr) return made.array;
    const ArrayKind& kind = context_.kind(first_);
    if (kind.exchange != nullptr && (stream_ == nullptr || known_to_library_)) {
      return export_array(*kind.exchange, made.memory);
    }
    nb::object array =
        nb::cast(new DeviceArray(made.memory, "array"), nb::rv_policy::take_ownership);
    return kind.importer.is_none() ? array : kind.importer(array);
  }
  fail(ErrorKind::kInternal, op_, "no such output");
}

const Operand& OpCall::contiguous(const Operand& operand) const {
  if (is_contiguous(operand)) return operand;
  fail(ErrorKind::kInvalidArgument, op_, operand.name, " has shape ", shape_text(operand),
       " and strides ", strides_text(operand), "; must be contiguous in C order");
}

const Operand& OpCall::ndim(const Operand& operand, int count, const char* shape) const {
  if (operand.ndim == count) return operand;
  fail(ErrorKind::kInvalidArgument, op_, operand.name, " has shape ", shape_text(operand),
       "; must be ", shape);
}

const Operand& OpCall::typed(const Operand& operand, DType dtype) const {
  if (operand.is(dtype)) return operand;
  fail(ErrorKind::kInvalidArgument, op_, operand.name, " is ", type_text(operand.dtype),
       "; must be ", dtype_name(dtype));
}

const Operand& OpCall::shaped(const Operand& operand, std::span<const int64_t> shape) const {
  if (std::equal(shape.begin(), shape.end(), operand.shape, operand.shape + operand.ndim)) {
    return operand;
  }
  fail(ErrorKind::kInvalidArgument, op_, operand.name, " has shape ", shape_text(operand),
       "; must be ", shape_text(shape));
}

DType OpCall::activation(const Operand& operand) const {
  if (operand.is(DType::kF32)) return DType::kF32;
  if (operand.is(DType::kBF16)) return DType::kBF16;
  fail(ErrorKind::kInvalidArgument, op_, operand.name, " is ", type_text(operand.dtype),
       "; must be float32 or bfloat16");
}

DType OpCall::matrix(const Operand& operand) const {
  const DType dtype = activation(contiguous(operand));
  if (operand.cols() <= 0) {
    fail(ErrorKind::kInvalidArgument, op_, operand.name, " has shape ", shape_text(operand),
         "; must have at least one column");
  }
  check(operand.rows() <= std::numeric_limits<int32_t>::max(), op_, operand.name, " has ",
        operand.rows(), " rows; must have fewer than 2**31");
  return dtype;
}

const Operand& OpCall::ints(const Operand& operand, int64_t count) const {
  typed(contiguous(ndim(operand, 1, "of one dimension")), DType::kI32);
  if (count >= 0) shaped(operand, std::span(&count, 1));
  check(operand.cols() <= std::numeric_limits<int32_t>::max(), op_, operand.name, " has ",
        operand.cols(), " entries; must have fewer than 2**31");
  return operand;
}

const Operand& OpCall::floats(const Operand& operand, int64_t count) const {
  return shaped(typed(contiguous(operand), DType::kF32), std::span(&count, 1));
}

void OpCall::no_partial_overlap(const Operand& out, const Operand& in) const {
  if (out.data == in.data || out.size() == 0 || in.size() == 0) return;
  const auto [out_begin, out_end] = reach(out);
  const auto [in_begin, in_end] = reach(in);
  check(out_end <= in_begin || in_end <= out_begin, op_, out.name, " overlaps ", in.name,
        "; must be the same array or share nothing with it");
}

const void* OpCall::look_at(const Operand& values, size_t size, bool on_gpu) {
  if (device().type() == DeviceType::kCpu) return values.data;
  if (!on_gpu) return nullptr;
  const size_t bytes = static_cast<size_t>(values.size()) * size;
  looked_.push_back(std::make_unique<char[]>(bytes + 1));
  device().order_streams(stream_, nullptr);
  device().copy_out(looked_.back().get(), values.data, bytes);
  return looked_.back().get();
}

void OpCall::in_range(const Operand& operand, int64_t low, int64_t high, const char* what) {
  const std::span<const int32_t> values = look(operand);
  for (size_t i = 0; i < values.size(); ++i) {
    check(values[i] >= low && values[i] < high, op_, operand.name, "[", i, "] is ", values[i], "; ",
          what, " must be in [", low, ", ", high, ")");
  }
}

int OpCall::num_threads() {
  return device().pool() != nullptr ? device().pool()->num_threads() : 1;
}

void OpCall::keep_sources() {
  std::unique_ptr<Fence> fence;
  if (shared_->spare_fences.empty()) {
    fence = device().make_fence();
  } else {
    fence = std::move(shared_->spare_fences.back());
    shared_->spare_fences.pop_back();
  }
  OpsDevice::Pending pending{std::move(fence), std::move(sources_), std::move(arrays_)};
  pending.fence->record(stream_);
  shared_->pending.push_back(std::move(pending));
}

void OpCall::run(int64_t workspace_bytes, void* state, Body body) {
  struct Task {
    OpCall& call;
    void* state;
    Body body;
    std::exception_ptr error;
  } task{*this, state, body, nullptr};
  const bool on_cpu = device().type() == DeviceType::kCpu;
  {
    nb::gil_scoped_release release;
    std::lock_guard lock(shared_->mutex);
    const auto bytes = static_cast<size_t>(std::max<int64_t>(workspace_bytes, 0));
    StreamBuffer made;
    if (on_cpu && shared_->workspace.bytes() < bytes) {
      shared_->workspace = StreamBuffer();
      shared_->workspace = allocate_in_stream(shared_->device, bytes, false, op_, nullptr);
    } else if (!on_cpu) {
      made = allocate_in_stream(shared_->device, bytes, false, op_, stream_);
    }
    ctx_.workspace = on_cpu ? shared_->workspace.data() : made.data();
    ctx_.workspace_bytes = on_cpu ? shared_->workspace.bytes() : made.bytes();
    if (on_cpu) {
      // In the caller's thread: the pool needs one at a time, not a certain one.
      body(state, device().kernels(), ctx_);
    } else {
      device().submit(
          [](void* arg) {
            Task& task = *static_cast<Task*>(arg);
            try {
              task.body(task.state, task.call.device().kernels(), task.call.ctx_);
            } catch (...) {
              task.error = std::current_exception();
            }
          },
          &task);
    }
  }
  if (!on_cpu && keeps_sources_) keep_sources();
  if (task.error) std::rethrow_exception(task.error);
}

}  // namespace mrv1
