// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "peer_group.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <new>
#include <set>

#include "check.h"
#include "core/device.h"
#include "core/error.h"
#include "current_device.h"

namespace mrv1::cuda {
namespace {

constexpr std::string_view kWhere = "ranks";

// What a rank receives of large messages at a time, at most and at least; longer ones take several
// launches.
constexpr int64_t kMostBulkBytes = int64_t{32} << 20, kLeastBulkBytes = int64_t{8} << 20;
// How often the watcher looks whether a device has given up.
constexpr std::chrono::milliseconds kWatchInterval{20};

// The largest messages that travel in packets. They cost twice the bytes to every peer, and save a
// trip and its fences.
int64_t packet_bytes(int size) {
  if (size <= 2) return int64_t{1} << 20;
  if (size <= 4) return int64_t{192} << 10;
  return int64_t{64} << 10;
}

struct AreaLayout {
  int64_t packet_pieces, bulk_pieces, bulk_offset, bytes;
};

AreaLayout area_layout(int size, int64_t max_bytes, bool has_values) {
  AreaLayout layout{};
  layout.bytes = sizeof(PeerHeader);
  if (!has_values) return layout;
  layout.packet_pieces = packet_bytes(size) / kPieceBytes;
  layout.bulk_pieces = std::clamp(max_bytes, kLeastBulkBytes, kMostBulkBytes) / kPieceBytes;
  layout.bulk_offset = layout.bytes + 2 * size * layout.packet_pieces * 2 * kPieceBytes;
  layout.bytes = layout.bulk_offset + 4 * layout.bulk_pieces * kPieceBytes;
  return layout;
}

std::string_view wait_text(PeerWait wait) {
  switch (wait) {
    case PeerWait::kPartialSums:
      return "the partial sums of all_reduce";
    case PeerWait::kSums:
      return "the sums of all_reduce";
    case PeerWait::kColumns:
      return "the columns of all_gather";
    case PeerWait::kStart:
      return "the start of a collective";
  }
  return "?";
}

}  // namespace

PeerGroup::PeerGroup(std::span<const std::shared_ptr<Device>> devices, const GroupOptions& options)
    : devices_(devices.begin(), devices.end()), kernels_(options.kernels) {
  std::set<int> ordinals;
  for (const std::shared_ptr<Device>& device : devices_) {
    check(ordinals.insert(device->ordinal()).second, kWhere, "GPU ", device->ordinal(),
          " is there twice; every rank needs one of its own");
  }
  check(options.timeout.count() > 0, kWhere, "timeout is ", options.timeout.count(),
        " ms; it must be positive");
  enable_peers();
  allocate_areas(options);
  if (kernels_ == CollectiveKernels::kNccl) open_nccl_group(options.nccl);
  for (const std::shared_ptr<Device>& device : devices_) {
    const CurrentDevice current(device->ordinal(), kWhere);
    load_all_reduce(size());
    load_all_gather();
    load_meeting();
  }
  try_out();
  if (nccl_ != nullptr) watcher_ = std::thread([this] { watch(); });
}

PeerGroup::~PeerGroup() {
  if (watcher_.joinable()) {
    {
      const std::lock_guard lock(mutex_);
      closing_ = true;
    }
    changed_.notify_all();
    watcher_.join();
  }
  // Nothing that still runs may write to an area that is gone.
  for (int rank = 0; rank < size(); ++rank) {
    std::atomic_ref(report(rank)->stop).store(1, std::memory_order_release);
  }
  for (const std::shared_ptr<Device>& device : devices_) device->settle();
  nccl_.reset();
}

void PeerGroup::enable_peers() {
  if (kernels_ == CollectiveKernels::kNccl) {
    reach_each_other_ = false;
    return;
  }
  for (const std::shared_ptr<Device>& device : devices_) {
    const CurrentDevice current(device->ordinal(), kWhere);
    for (const std::shared_ptr<Device>& peer : devices_) {
      if (peer == device) continue;
      int can = 0;
      check_cuda(cudaDeviceCanAccessPeer(&can, device->ordinal(), peer->ordinal()), kWhere,
                 "cudaDeviceCanAccessPeer");
      if (can == 0) {
        fail(ErrorKind::kDevice, kWhere, "GPU ", device->ordinal(),
             " cannot reach the memory of GPU ", peer->ordinal(),
             "; choose GPUs that can (`nvidia-smi topo -p2p rw`)");
      }
      const cudaError_t status = cudaDeviceEnablePeerAccess(peer->ordinal(), 0);
      if (status == cudaErrorPeerAccessAlreadyEnabled) {
        cudaGetLastError();
        continue;
      }
      check_cuda(status, kWhere, "cudaDeviceEnablePeerAccess");
    }
  }
}

void PeerGroup::allocate_areas(const GroupOptions& options) {
  const AreaLayout layout = area_layout(size(), options.max_bytes, reach_each_other_);
  for (const std::shared_ptr<Device>& device : devices_) {
    states_.push_back(device->allocate(sizeof(PeerState), "ranks"));
    reports_.push_back(device->allocate_mapped(sizeof(PeerReport), "ranks"));
    const auto bytes = static_cast<size_t>(layout.bytes);
    areas_.push_back(reach_each_other_ ? device->allocate(bytes, "ranks")
                                       : device->allocate_mapped(bytes, "ranks"));
  }
  for (int rank = 0; rank < size(); ++rank) {
    PeerView view{};
    view.rank = rank;
    view.size = size();
    view.state = static_cast<PeerState*>(states_[rank].data());
    view.report = static_cast<PeerReport*>(reports_[rank].data());
    for (int peer = 0; peer < size(); ++peer) {
      view.areas[peer] = static_cast<char*>(areas_[peer].data());
    }
    view.packet_pieces = layout.packet_pieces;
    view.bulk_pieces = layout.bulk_pieces;
    view.bulk_offset = layout.bulk_offset;
    view.timeout = static_cast<uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(options.timeout).count());
    views_.push_back(view);
  }
}

void PeerGroup::open_nccl_group(const std::vector<std::string>& libraries) {
  std::vector<int> ordinals;
  for (const std::shared_ptr<Device>& device : devices_) ordinals.push_back(device->ordinal());
  nccl_ = std::make_unique<NcclGroup>(open_nccl(libraries), ordinals);
}

void PeerGroup::try_out() {
  for (int rank = 0; rank < size(); ++rank) {
    Device& device = *devices_[rank];
    const CurrentDevice current(device.ordinal(), kWhere);
    StepContext ctx;
    ctx.device = &device;
    ctx.stream = device.stream();
    launch_meeting(views_[rank], ctx);
  }
  for (const std::shared_ptr<Device>& device : devices_) device->synchronize();
  if (is_aborted()) {
    fail(ErrorKind::kDevice, kWhere, "GPUs that should reach each other do not: ", abort_reason());
  }
}

// NCCL's kernels do not see that the group has ended; somebody has to tell it.
void PeerGroup::watch() {
  std::unique_lock lock(mutex_);
  while (!closing_) {
    if (is_aborted()) {
      lock.unlock();
      nccl_->abort();
      return;
    }
    changed_.wait_for(lock, kWatchInterval);
  }
}

void PeerGroup::abort(std::string_view reason) noexcept {
  {
    const std::lock_guard lock(mutex_);
    if (aborted_.load(std::memory_order_relaxed)) return;
    try {
      reason_ = reason;
    } catch (const std::bad_alloc&) {
      reason_.clear();  // the end matters more
    }
    aborted_.store(true, std::memory_order_release);
  }
  for (int rank = 0; rank < size(); ++rank) {
    std::atomic_ref(report(rank)->stop).store(1, std::memory_order_release);
  }
  changed_.notify_all();
}

bool PeerGroup::is_aborted() const noexcept {
  if (aborted_.load(std::memory_order_acquire)) return true;
  for (int rank = 0; rank < size(); ++rank) {
    if (std::atomic_ref(report(rank)->written).load(std::memory_order_acquire) != 0) return true;
  }
  return false;
}

std::string PeerGroup::abort_reason() const {
  // A rank that is told to stop, as another has failed, may still find its time limit over.
  if (aborted_.load(std::memory_order_acquire)) {
    const std::lock_guard lock(mutex_);
    return reason_;
  }
  for (int rank = 0; rank < size(); ++rank) {
    PeerReport& found = *report(rank);
    if (std::atomic_ref(found.written).load(std::memory_order_acquire) == 0) continue;
    return concat("rank ", found.missing, " did not come within ", views_[rank].timeout / 1000000,
                  " ms: rank ", rank, " waited for ", wait_text(found.wait), ", collective ",
                  found.call);
  }
  return "";
}

CudaCommunicator::CudaCommunicator(int rank, std::shared_ptr<PeerGroup> group)
    : Communicator(rank, group->size()), group_(std::move(group)) {}

CollectiveKernels CudaCommunicator::choose_sum(int64_t bytes, bool nccl_can) const {
  if (!group_->reach_each_other()) {
    if (!nccl_can) {
      fail(ErrorKind::kDevice, kWhere,
           "NCCL adds no bias, keeps the dtype and has an order of its own; this sum needs GPUs "
           "that reach each other's memory");
    }
    return CollectiveKernels::kNccl;
  }
  if (group_->kernels() != CollectiveKernels::kAuto) return group_->kernels();
  return bytes <= packet_bytes(size()) ? CollectiveKernels::kOneShot : CollectiveKernels::kTwoShot;
}

CollectiveKernels CudaCommunicator::choose_gather(int64_t bytes, int64_t rows) const {
  if (!group_->reach_each_other()) return CollectiveKernels::kNccl;
  const bool fits = bytes / rows <= packet_bytes(size());
  if (group_->kernels() == CollectiveKernels::kAuto) {
    return bytes <= packet_bytes(size()) ? CollectiveKernels::kOneShot
                                         : CollectiveKernels::kTwoShot;
  }
  return fits ? group_->kernels() : CollectiveKernels::kTwoShot;
}

void CudaCommunicator::sum_by_nccl(const void* x, void* out, int64_t count, DType dtype,
                                   const StepContext& ctx) {
  launch_meeting(view(), ctx);
  group_->nccl()->sum(rank(), x, out, static_cast<size_t>(count), dtype, stream_of(ctx));
}

void CudaCommunicator::gather_by_nccl(const void* x, void* out, int64_t rows, int64_t cols,
                                      DType dtype, const StepContext& ctx) {
  launch_meeting(view(), ctx);
  group_->nccl()->gather(rank(), x, out, rows, cols, dtype, stream_of(ctx));
}

std::vector<std::unique_ptr<Communicator>> make_group(
    std::span<const std::shared_ptr<Device>> devices, const GroupOptions& options) {
  const auto group = std::make_shared<PeerGroup>(devices, options);
  std::vector<std::unique_ptr<Communicator>> ranks;
  for (int rank = 0; rank < group->size(); ++rank) {
    ranks.push_back(std::make_unique<CudaCommunicator>(rank, group));
  }
  return ranks;
}

int64_t group_bytes(int size, const GroupOptions& options) {
  const bool has_values = options.kernels != CollectiveKernels::kNccl;
  return area_layout(size, options.max_bytes, has_values).bytes;
}

}  // namespace mrv1::cuda
