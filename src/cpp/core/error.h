// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace mrv1 {

// What went wrong, in the terms of the caller. The Python layer maps each kind to one exception
// type.
enum class ErrorKind {
  kInvalidArgument,  // a value the caller gave: ValueError
  kRequest,          // a request that cannot be admitted: RequestError (a ValueError)
  kWeights,          // weight files that are damaged or do not fit the model: WeightError
  kOutOfMemory,      // too little memory for a named part: OutOfMemoryError (a MemoryError)
  kDevice,           // no such device, built without CUDA, or a failed launch: DeviceError
  kClosed,           // use after close: ClosedError
  kFork,             // use of a parent's object in a forked child: ForkError
  kInternal,         // a broken invariant of this library: InternalError
};

// The one exception type of the native code. `what()` reads "[where] sentence".
class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <typename... Parts>
[[noreturn]] void fail(ErrorKind kind, std::string_view where, const Parts&... parts) {
  throw Error(kind, concat("[", where, "] ", parts...));
}

// Throws kInvalidArgument unless `ok`. The message is formatted only on failure.
template <typename... Parts>
void check(bool ok, std::string_view where, const Parts&... parts) {
  if (!ok) [[unlikely]] {
    fail(ErrorKind::kInvalidArgument, where, parts...);
  }
}

// Throws kInternal unless `ok`: the caller cannot cause it.
template <typename... Parts>
void check_internal(bool ok, std::string_view where, const Parts&... parts) {
  if (!ok) [[unlikely]] {
    fail(ErrorKind::kInternal, where, parts...);
  }
}

}  // namespace mrv1
