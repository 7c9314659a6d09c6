// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bind/bind.h"
#include "bind/device_array.h"
#include "bind/dlpack_exchange.h"
#include "core/device.h"

namespace mrv1 {

// What the calls on one device share.
struct OpsDevice {
  // What a call reads in a stream that its owner does not know of, until the stream has passed.
  struct Pending {
    std::unique_ptr<Fence> fence;
    std::vector<nb::object> sources;
    std::vector<nb::ndarray<nb::ro>> arrays;
  };

  std::shared_ptr<Device> device;
  std::mutex mutex;        // one launch at a time
  StreamBuffer workspace;  // of the CPU's kernels, as large as any call needed
  // Both guarded by the interpreter's lock.
  std::deque<Pending> pending;
  std::vector<std::unique_ptr<Fence>> spare_fences;
};

// What is known of a type of arrays.
struct ArrayKind {
  enum class Access {
    kNone,
    kNumpy,
    kOwn,     // DeviceArray
    kDlpack,  // __dlpack__, and `exchange` if there is one
  };
  nb::object type;
  Access access = Access::kNone;
  bool is_mutable = false;
  bool may_need_grad = false;  // arrays have requires_grad, which the exchange does not look at
  const DlpackExchange* exchange = nullptr;
  nb::object importer;  // makes an array of the library of one of ours; None for our own
};

// The devices that single ops run on, each opened when an array of it is first seen, and what a
// call asks of Python (mrv1/ops/_host.py), most of it once.
class OpsContext {
 public:
  OpsContext(nb::object host, bool sync_launches, bool check_slots);

  OpsDevice& device(DeviceType type, int ordinal);
  const nb::object& host() const { return host_; }
  bool sync_launches() const { return sync_launches_; }
  // Whether what addresses a cache is looked at on a GPU, too.
  bool check_slots() const { return check_slots_ || sync_launches_; }

  const ArrayKind& kind(nb::handle array);
  // Of a NumPy array's dtype: the type, if it is one that NumPy exports by no protocol, else null.
  // kInvalidArgument, as of `op` and `name`, if there is no such type here.
  const ElementType* registered_type(nb::handle dtype, const char* op, const char* name);
  // An array of NumPy, as new.
  nb::object empty(std::span<const int64_t> shape, DType dtype);

  // Interned names of attributes.
  struct Names {
    nb::str dtype{"dtype"}, view{"view"}, flags{"flags"}, writeable{"writeable"};
    nb::str dlpack{"__dlpack__"}, dlpack_device{"__dlpack_device__"};
    nb::str requires_grad{"requires_grad"};
  };
  const Names& names() const { return names_; }
  const nb::object& uint8() const { return uint8_; }
  const nb::object& uint16() const { return uint16_; }

 private:
  nb::object host_;
  nb::object ndarray_, empty_, uint8_, uint16_;
  Names names_;
  bool sync_launches_, check_slots_;
  std::map<std::pair<DeviceType, int>, std::unique_ptr<OpsDevice>> devices_;
  std::unordered_map<PyObject*, ArrayKind> kinds_;                 // by type, which the value keeps
  std::vector<std::pair<nb::object, const ElementType*>> dtypes_;  // those seen first
  std::map<DType, nb::object> made_dtypes_;
};

}  // namespace mrv1
