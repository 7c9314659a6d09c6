// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "io/staged_copy.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#include "core/error.h"

namespace mrv1 {
namespace {

constexpr size_t kPage = 4096;
constexpr std::chrono::milliseconds kProgressInterval{50};

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

template <typename From, typename To>
void convert(const void* from, void* to, int64_t count) {
  const From* in = static_cast<const From*>(from);
  To* out = static_cast<To*>(to);
  for (int64_t i = 0; i < count; ++i) out[i] = from_float<To>(to_float(in[i]));
}

struct Piece {
  const StagedTensor* tensor;
  int64_t first, count;  // elements
};

void read_piece(const Piece& piece, char* target) {
  const StagedTensor& tensor = *piece.tensor;
  const auto size = static_cast<int64_t>(dtype_size(tensor.source));
  const auto read = [&](int64_t from, int64_t count) {
    const auto bytes = static_cast<size_t>(count * size);
    tensor.file->read_into(target, tensor.offset + static_cast<size_t>(from * size), bytes);
    target += bytes;
  };
  if (tensor.cols == tensor.stride) return read(piece.first, piece.count);
  const int64_t end = piece.first + piece.count;
  for (int64_t next = piece.first; next < end;) {
    const int64_t col = next % tensor.cols;
    const int64_t count = std::min(tensor.cols - col, end - next);
    read(next / tensor.cols * tensor.stride + col, count);
    next += count;
  }
}

}  // namespace

void convert_elements(const void* from, DType source, void* to, DType stored, int64_t count) {
  if (count == 0) return;
  if (source == stored) {
    std::memcpy(to, from, static_cast<size_t>(count) * dtype_size(stored));
    return;
  }
  dispatch_activation(stored, "weights", [&](auto tag) {
    using To = typename decltype(tag)::type;
    if (source == DType::kF32) {
      convert<float, To>(from, to, count);
    } else if (source == DType::kBF16) {
      convert<BFloat16, To>(from, to, count);
    } else {
      convert<Float16, To>(from, to, count);
    }
  });
}

struct StagedCopy::Worker {
  Buffer slots;
  std::unique_ptr<CopyStream> stream;
  std::vector<uint64_t> tickets;  // by slot
  std::vector<char> unconverted;

  void wait_for_copies() {
    for (uint64_t ticket : tickets) stream->wait(ticket);
  }
};

struct StagedCopy::Shared {
  std::vector<Piece> pieces;
  std::atomic<size_t> next{0};
  std::atomic<size_t> done_bytes{0};
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::condition_variable ended;
  int running = 0;
  std::exception_ptr error;
};

StagedCopy::StagedCopy(Device& device, size_t largest, const StagingSizes& sizes)
    : device_(device), sizes_(sizes) {
  sizes_.threads = std::clamp(sizes.threads, 1, usable_cores());
  sizes_.slot_bytes = (std::min(largest, sizes.slot_bytes) + kPage) / kPage * kPage;
}

StagedCopy::~StagedCopy() = default;

void StagedCopy::run(Worker& worker, Shared& shared) {
  for (int slot = 0; !shared.stop; slot = (slot + 1) % sizes_.slots) {
    const size_t index = shared.next.fetch_add(1);
    if (index >= shared.pieces.size()) break;
    const Piece& piece = shared.pieces[index];
    const StagedTensor& tensor = *piece.tensor;
    const size_t from_size = dtype_size(tensor.source), to_size = dtype_size(tensor.stored);
    const size_t file_bytes = static_cast<size_t>(piece.count) * from_size;
    char* staged = static_cast<char*>(worker.slots.host()) + slot * sizes_.slot_bytes;
    worker.stream->wait(worker.tickets[slot]);
    if (tensor.source == tensor.stored) {
      read_piece(piece, staged);
    } else {
      worker.unconverted.resize(std::max(worker.unconverted.size(), file_bytes));
      read_piece(piece, worker.unconverted.data());
      convert_elements(worker.unconverted.data(), tensor.source, staged, tensor.stored,
                       piece.count);
    }
    worker.stream->copy_in(static_cast<char*>(tensor.target) + piece.first * to_size, staged,
                           static_cast<size_t>(piece.count) * to_size);
    worker.tickets[slot] = worker.stream->record();
    shared.done_bytes += file_bytes;
  }
}

void StagedCopy::copy(std::span<const StagedTensor> tensors,
                      const std::function<void(size_t)>& progress) {
  Shared shared;
  for (const StagedTensor& tensor : tensors) {
    const size_t size = std::max(dtype_size(tensor.source), dtype_size(tensor.stored));
    const auto most = static_cast<int64_t>(sizes_.slot_bytes / size);
    for (int64_t first = 0; first < tensor.count; first += most) {
      shared.pieces.push_back({&tensor, first, std::min(most, tensor.count - first)});
    }
  }
  const size_t wanted = std::min<size_t>(sizes_.threads, shared.pieces.size());
  while (workers_.size() < wanted) {
    auto worker = std::make_unique<Worker>();
    worker->slots = device_.allocate_mapped(sizes_.slots * sizes_.slot_bytes, "staging of weights");
    worker->tickets.resize(sizes_.slots);
    worker->stream = device_.make_copy_stream();
    workers_.push_back(std::move(worker));
  }

  std::vector<std::thread> threads;
  const auto join = [&] {
    for (std::thread& thread : threads) thread.join();
    threads.clear();
  };
  try {
    for (size_t i = 0; i < wanted; ++i) {
      {
        std::lock_guard lock(shared.mutex);
        ++shared.running;
      }
      threads.emplace_back([this, &worker = *workers_[i], &shared] {
        pthread_setname_np(pthread_self(), "mrv1-load");
        std::exception_ptr error;
        const auto guarded = [&](const auto& fn) {
          try {
            fn();
          } catch (...) {
            if (!error) error = std::current_exception();
            shared.stop = true;
          }
        };
        guarded([&] { run(worker, shared); });
        // After an error too: a copy that is left would overwrite what is loaded next.
        guarded([&] { worker.wait_for_copies(); });
        std::lock_guard lock(shared.mutex);
        if (error && !shared.error) shared.error = error;
        --shared.running;
        shared.ended.notify_one();
      });
    }
    size_t told = 0;
    for (bool ended = false; !ended;) {
      {
        std::unique_lock lock(shared.mutex);
        ended = shared.ended.wait_for(lock, kProgressInterval, [&] { return shared.running == 0; });
      }
      const size_t done = shared.done_bytes;
      progress(done - told);
      told = done;
    }
  } catch (const std::system_error& error) {
    shared.stop = true;
    join();
    fail(ErrorKind::kDevice, "weights", "cannot start a thread that loads: ", error.what());
  } catch (...) {
    shared.stop = true;
    join();
    throw;
  }
  join();
  if (shared.error) std::rethrow_exception(shared.error);
}

}  // namespace mrv1
