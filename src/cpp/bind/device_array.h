// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "bind/bind.h"
#include "bind/handle.h"
#include "core/device.h"
#include "core/dtype.h"

namespace mrv1 {

// An element type by the name that NumPy or ml_dtypes gives it, in the terms of DLPack.
struct ElementType {
  const char* name;
  uint8_t code, bits;
  // Type string of the CUDA array interface; null where it has none.
  const char* typestr;

  nb::dlpack::dtype dlpack() const { return {code, bits, 1}; }
  size_t bytes() const { return bits / 8; }
};

// Null for a type that has no name here.
const ElementType* find_element_type(nb::dlpack::dtype dtype);
// Throws kInvalidArgument with the names there are.
const ElementType& element_type(const std::string& name);
const ElementType& element_type(DType dtype);

// Memory that a device addresses, as other libraries take it: by DLPack or the CUDA array
// interface.
struct ArrayMemory {
  std::shared_ptr<Device> device;  // outlives the owner
  std::shared_ptr<void> owner;
  void* data;
  std::vector<size_t> shape;
  const ElementType* type;
  // Whether work in a stream writes it, which readers in other streams must wait for.
  bool written_in_stream;
  void* writer = nullptr;  // that stream; null: the device's own
  // Whether the owner gives the memory back in the writer's order.
  bool released_in_stream = false;

  size_t nbytes() const;
};

struct DeviceArray : Handle<ArrayMemory> {
  using Handle::Handle;
};

// A copy of device memory, made in stream order, with a life of its own.
std::unique_ptr<DeviceArray> copy_to_array(std::shared_ptr<Device> device, const void* data,
                                           std::vector<size_t> shape, DType dtype);

// DLPack's code of a device's type.
int dlpack_device_type(Device& device);

// An array of another library in memory that `device` addresses; work in the device's stream may
// read it at once. Throws kInvalidArgument, beginning with `where`, if it lies elsewhere or is not
// contiguous.
nb::ndarray<nb::ro> import_array(nb::handle array, Device& device, const char* where);

// The handle of a stream: of an integer, of what has __cuda_stream__, or of a stream of a torch or
// CuPy that has not. None is null, which stands for the device's own stream.
void* stream_handle(nb::handle stream);

}  // namespace mrv1
