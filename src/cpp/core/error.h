// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

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

// Append a part of a message as a stream prints it by default. Not a stream: every file includes
// this header, and <sstream> takes a compiler longer than most of them.
void append_part(std::string& out, std::string_view text);
void append_part(std::string& out, int64_t value);
void append_part(std::string& out, uint64_t value);
void append_part(std::string& out, double value);

template <typename T>
void append_any(std::string& out, const T& part) {
  if constexpr (std::is_same_v<T, char>) {
    out += part;
  } else if constexpr (std::is_floating_point_v<T>) {
    append_part(out, static_cast<double>(part));
  } else if constexpr (std::is_integral_v<T>) {
    static_assert(sizeof(T) > 1 || std::is_same_v<T, bool>, "is it a number or a character?");
    append_part(out, static_cast<std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>(part));
  } else {
    append_part(out, std::string_view(part));
  }
}

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::string out;
  (append_any(out, parts), ...);
  return out;
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
