// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "nccl.h"

#include <dlfcn.h>

#include <chrono>
#include <cstdlib>
#include <exception>
#include <thread>
#include <utility>

#include "core/error.h"

namespace mrv1::cuda {
namespace {

constexpr std::string_view kWhere = "NCCL";
constexpr int kMajor = 2;
constexpr int kOpSum = 0;  // ncclSum
constexpr int kBytes = 0;  // ncclInt8
// How long an end waits for a rank that is queuing: it may be inside a call that waits for others.
constexpr std::chrono::seconds kQueuing{1};

std::string version_text(int version) {
  return concat(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

// ncclDataType_t
int data_type(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 7;
    case DType::kBF16:
      return 9;
    default:
      fail(ErrorKind::kInvalidArgument, kWhere, "values are float32 or bfloat16, not ",
           dtype_name(dtype));
  }
}

template <typename Function>
bool load(void* library, const char* symbol, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, symbol));
  return function != nullptr;
}

// Fills in the library called `name`; returns what is wrong with it, or nothing.
std::string try_open(const std::string& name, Nccl& nccl) {
  void* library = dlopen(name.c_str(), RTLD_LOCAL | RTLD_NOW);
  if (library == nullptr) {
    const char* error = dlerror();
    return error != nullptr ? error : "dlopen failed";
  }
  const bool complete = load(library, "ncclGetVersion", nccl.get_version) &&
                        load(library, "ncclGetErrorString", nccl.get_error_string) &&
                        load(library, "ncclCommInitAll", nccl.comm_init_all) &&
                        load(library, "ncclCommDestroy", nccl.comm_destroy) &&
                        load(library, "ncclCommAbort", nccl.comm_abort) &&
                        load(library, "ncclGroupStart", nccl.group_start) &&
                        load(library, "ncclGroupEnd", nccl.group_end) &&
                        load(library, "ncclAllReduce", nccl.all_reduce) &&
                        load(library, "ncclAllGather", nccl.all_gather) &&
                        load(library, "ncclSend", nccl.send) &&
                        load(library, "ncclRecv", nccl.recv);
  int version = 0;
  std::string problem;
  if (!complete) {
    problem = concat("it lacks functions of NCCL ", kMajor, ".7");
  } else if (nccl.get_version(&version) != 0 || version / 10000 != kMajor) {
    problem = concat("it is version ", version_text(version), ", not ", kMajor);
  }
  if (!problem.empty()) {
    dlclose(library);
    return problem;
  }
  nccl.name = name;
  nccl.version = version_text(version);
  return "";
}

}  // namespace

void Nccl::check_status(Status status, std::string_view call) const {
  if (status == 0) [[likely]] {
    return;
  }
  fail(ErrorKind::kDevice, kWhere, call, " failed: ", get_error_string(status));
}

const Nccl& open_nccl(const std::vector<std::string>& libraries) {
  // Never closed: a library with threads and state of its own cannot be unloaded safely.
  static std::mutex mutex;
  static std::unique_ptr<const Nccl> opened;
  const std::lock_guard lock(mutex);
  std::string tried;
  for (const std::string& name : libraries) {
    if (opened != nullptr) {
      if (opened->name == name) return *opened;
      tried += concat("\n  ", name, ": the process has opened ", opened->name, " before");
      continue;
    }
    auto library = std::make_unique<Nccl>();
    const std::string problem = try_open(name, *library);
    if (problem.empty()) {
      opened = std::move(library);
      return *opened;
    }
    tried += concat("\n  ", name, ": ", problem);
  }
  if (libraries.empty()) {
    fail(ErrorKind::kDevice, kWhere, "there is no name to open it by, as with MRV1_NCCL = none");
  }
  fail(ErrorKind::kDevice, kWhere, "the library cannot be had; tried:", tried,
       opened != nullptr ? ""
                         : "\nInstall the package nvidia-nccl-cu13, or give the library's path in "
                           "MRV1_NCCL");
}

NcclGroup::NcclGroup(const Nccl& library, std::span<const int> ordinals) : library_(library) {
  // NVLink multicast may take the switch of a host that others share out of service when a process
  // ends badly. NCCL asks the environment when it makes its first communicator.
  setenv("NCCL_NVLS_ENABLE", "0", /*overwrite=*/0);
  std::vector<Nccl::Comm> comms(ordinals.size());
  library_.check_status(
      library_.comm_init_all(comms.data(), static_cast<int>(ordinals.size()), ordinals.data()),
      "ncclCommInitAll");
  for (const Nccl::Comm comm : comms) {
    ranks_.push_back(std::make_unique<Rank>());
    ranks_.back()->comm = comm;
  }
}

NcclGroup::~NcclGroup() {
  for (const auto& rank : ranks_) {
    if (rank->comm != nullptr) library_.comm_destroy(rank->comm);
  }
}

void NcclGroup::sum(int rank, const void* x, void* out, size_t count, DType dtype,
                    cudaStream_t stream) {
  Rank& own = *ranks_[rank];
  const std::lock_guard lock(own.mutex);
  if (own.comm == nullptr) fail(ErrorKind::kDevice, kWhere, "the group has ended");
  library_.check_status(
      library_.all_reduce(x, out, count, data_type(dtype), kOpSum, own.comm, stream),
      "ncclAllReduce");
}

void NcclGroup::gather(int rank, const void* x, void* out, int64_t rows, int64_t cols, DType dtype,
                       cudaStream_t stream) {
  Rank& own = *ranks_[rank];
  const std::lock_guard lock(own.mutex);
  if (own.comm == nullptr) fail(ErrorKind::kDevice, kWhere, "the group has ended");
  const size_t row_bytes = static_cast<size_t>(cols) * dtype_size(dtype);
  const int type = data_type(dtype);
  queue_together("ncclAllGather", [&] {
    Nccl::Status status = 0;
    // Ranks follow one another within each row.
    for (int64_t row = 0; row < rows && status == 0; ++row) {
      status = library_.all_gather(
          static_cast<const char*>(x) + static_cast<size_t>(row) * row_bytes,
          static_cast<char*>(out) + static_cast<size_t>(row) * row_bytes * ranks_.size(),
          static_cast<size_t>(cols), type, own.comm, stream);
    }
    return status;
  });
}

void NcclGroup::exchange(int rank, std::span<const NcclMessage> messages, cudaStream_t stream) {
  Rank& own = *ranks_[rank];
  const std::lock_guard lock(own.mutex);
  if (own.comm == nullptr) fail(ErrorKind::kDevice, kWhere, "the group has ended");
  // Sends and receives that are not of one launch would wait for each other.
  queue_together("ncclSend or ncclRecv", [&] {
    Nccl::Status status = 0;
    for (const NcclMessage& message : messages) {
      if (status == 0) status = queue(message, own.comm, stream);
    }
    return status;
  });
}

void NcclGroup::connect(std::span<char* const> memory, std::span<const cudaStream_t> streams) {
  if (std::exchange(connected_, true)) return;
  queue_together("ncclSend or ncclRecv", [&] {
    Nccl::Status status = 0;
    const int size = static_cast<int>(ranks_.size());
    for (int rank = 0; rank < size; ++rank) {
      for (int peer = 0; peer < size && status == 0; ++peer) {
        if (peer == rank) continue;
        status = queue({peer, memory[rank] + rank, memory[rank] + peer, 1}, ranks_[rank]->comm,
                       streams[rank]);
      }
    }
    return status;
  });
}

template <typename Fn>
void NcclGroup::queue_together(std::string_view call, const Fn& fn) const {
  library_.check_status(library_.group_start(), "ncclGroupStart");
  const Nccl::Status status = fn();
  const Nccl::Status ended = library_.group_end();
  library_.check_status(status, call);
  library_.check_status(ended, "ncclGroupEnd");
}

Nccl::Status NcclGroup::queue(const NcclMessage& message, Nccl::Comm comm,
                              cudaStream_t stream) const {
  const Nccl::Status status =
      library_.send(message.sent, message.bytes, kBytes, message.peer, comm, stream);
  if (status != 0) return status;
  return library_.recv(message.received, message.bytes, kBytes, message.peer, comm, stream);
}

void NcclGroup::abort(std::span<const std::unique_ptr<NcclGroup>> groups) noexcept {
  // At once: to end a communicator may take until the graphs that use it are gone, and what waits
  // in other ranks' streams, those of other groups included, must end before that.
  std::vector<std::thread> threads;
  for (const auto& group : groups) {
    for (const auto& rank : group->ranks_) {
      Nccl::Comm comm = nullptr;
      {
        const std::unique_lock lock(rank->mutex, kQueuing);
        comm = std::exchange(rank->comm, nullptr);
      }
      if (comm == nullptr) continue;
      const Nccl& library = group->library_;
      try {
        threads.emplace_back([&library, comm] { library.comm_abort(comm); });
      } catch (const std::exception&) {
        library.comm_abort(comm);
      }
    }
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace mrv1::cuda
