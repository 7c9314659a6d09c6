// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "bind/bind.h"
#include "bind/device_array.h"

namespace mrv1 {

// DLPack's managed tensor and table of C functions, as versions 1.3 and on of the major version 1
// lay them out. A library puts the table on the type of its arrays, in a capsule named
// "dlpack_exchange_api" at __dlpack_c_exchange_api__. Functions return 0, or -1 with a Python
// exception; none of them orders streams.
struct DlpackVersion {
  uint32_t major = 1, minor = 3;
};

struct DlpackManaged {
  DlpackVersion version;
  void* context;
  void (*deleter)(DlpackManaged*);
  uint64_t flags;
  nb::dlpack::dltensor tensor;
};

struct DlpackExchange {
  DlpackVersion version;
  const DlpackExchange* previous;
  void* allocate;
  void* managed_from_object;
  int (*object_from_managed)(DlpackManaged* tensor, void** object);  // takes the tensor
  // Lends what lives as long as the object is not changed. May be null.
  int (*lend_tensor)(void* object, nb::dlpack::dltensor* tensor);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

// The table of a type, or null if it has none that can be used.
const DlpackExchange* find_exchange(nb::handle type);

// The array's tensor, or nothing: then __dlpack__ says what is wrong.
std::optional<nb::dlpack::dltensor> lend_tensor(const DlpackExchange& exchange, nb::handle array);

// An array of the library over `memory`, which it keeps. Throws what the library throws.
nb::object export_array(const DlpackExchange& exchange, std::shared_ptr<ArrayMemory> memory);

}  // namespace mrv1
