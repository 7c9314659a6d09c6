// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/dtype.h"

namespace mrv1::cuda {

// NCCL's functions, found when the library is opened: it is optional, and neither the build nor the
// module needs it. Types and constants are those of its binary interface, version 2.
struct Nccl {
  using Comm = struct ncclComm*;
  using Status = int;  // ncclResult_t; 0 is success

  std::string name;     // what it was opened as
  std::string version;  // "2.28.9"

  Status (*get_version)(int*) = nullptr;
  const char* (*get_error_string)(Status) = nullptr;
  Status (*comm_init_all)(Comm*, int, const int*) = nullptr;
  Status (*comm_destroy)(Comm) = nullptr;
  Status (*comm_abort)(Comm) = nullptr;
  Status (*group_start)() = nullptr;
  Status (*group_end)() = nullptr;
  Status (*all_reduce)(const void*, void*, size_t, int, int, Comm, cudaStream_t) = nullptr;
  Status (*all_gather)(const void*, void*, size_t, int, Comm, cudaStream_t) = nullptr;
  Status (*send)(const void*, size_t, int, int, Comm, cudaStream_t) = nullptr;
  Status (*recv)(void*, size_t, int, int, Comm, cudaStream_t) = nullptr;

  // Throws kDevice naming the call unless it succeeded.
  void check_status(Status status, std::string_view call) const;
};

// Opens the first of `libraries` that is there and fits, once for the process: later calls return
// what is open, if it is one of theirs. Throws kDevice with every name tried and what was wrong
// with it.
const Nccl& open_nccl(const std::vector<std::string>& libraries);

// What a rank sends to another one and takes from it, as many bytes.
struct NcclMessage {
  int peer;
  const void* sent;
  void* received;
  size_t bytes;
};

// A communicator of NCCL for each of some GPUs, all in this process. A collective is queued by each
// rank's own thread, in the same order.
class NcclGroup {
 public:
  NcclGroup(const Nccl& library, std::span<const int> ordinals);
  ~NcclGroup();
  NcclGroup(const NcclGroup&) = delete;
  NcclGroup& operator=(const NcclGroup&) = delete;

  const Nccl& library() const { return library_; }

  // out = sum over the ranks of `count` values of x.
  void sum(int rank, const void* x, void* out, size_t count, DType dtype, cudaStream_t stream);
  // out[row, r * cols + c] = x of rank r [row, c].
  void gather(int rank, const void* x, void* out, int64_t rows, int64_t cols, DType dtype,
              cudaStream_t stream);
  // Messages to and from other ranks, all at once. Every rank of a pair has as many of the same
  // sizes in the same order.
  void exchange(int rank, std::span<const NcclMessage> messages, cudaStream_t stream);
  // Makes the connections of exchange(), which its first call would make in a step. By one thread
  // for all ranks; of each, memory of a byte a rank that may be overwritten, and a stream. Once.
  void connect(std::span<char* const> memory, std::span<const cudaStream_t> streams);
  // Ends what waits in the streams of all ranks; nothing can be queued any more. Any thread.
  static void abort(std::span<const std::unique_ptr<NcclGroup>> groups) noexcept;

 private:
  struct Rank {
    std::timed_mutex mutex;  // whoever queues or ends
    Nccl::Comm comm = nullptr;
  };

  // Of fn(), which returns the status of its calls, one launch.
  template <typename Fn>
  void queue_together(std::string_view call, const Fn& fn) const;
  Nccl::Status queue(const NcclMessage& message, Nccl::Comm comm, cudaStream_t stream) const;

  const Nccl& library_;
  std::vector<std::unique_ptr<Rank>> ranks_;
  bool connected_ = false;
};

}  // namespace mrv1::cuda
