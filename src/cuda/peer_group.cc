// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "peer_group.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <new>
#include <set>

#include "check.h"
#include "core/device.h"
#include "core/error.h"
#include "current_device.h"
#include "stage_view.h"

namespace mrv1::cuda {
namespace {

constexpr std::string_view kWhere = "ranks";
constexpr std::string_view kChooseOthers = "; choose GPUs that can (`nvidia-smi topo -p2p rw`)";

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
  if (!has_values || size == 1) return layout;
  layout.packet_pieces = packet_bytes(size) / kPieceBytes;
  layout.bulk_pieces = std::clamp(max_bytes, kLeastBulkBytes, kMostBulkBytes) / kPieceBytes;
  layout.bulk_offset = layout.bytes + 2 * size * layout.packet_pieces * 2 * kPieceBytes;
  layout.bytes = layout.bulk_offset + 4 * layout.bulk_pieces * kPieceBytes;
  return layout;
}

// Of what a rank sends to experts beside tokens, if it cannot write it to others: weights and
// experts [ranks, choices], counts [ranks].
int64_t staged_bytes(int size, int64_t choices) {
  return size * (choices * int64_t{sizeof(float) + sizeof(int32_t)} + int64_t{sizeof(int32_t)});
}

// Region `index` of an array of them, of `bytes` each.
const char* region_of(const void* base, int index, size_t bytes) {
  return static_cast<const char*>(base) + index * static_cast<ptrdiff_t>(bytes);
}
char* region_of(void* base, int index, size_t bytes) {
  return static_cast<char*>(base) + index * static_cast<ptrdiff_t>(bytes);
}

size_t region_bytes(const ExpertBuffers& own, DType dtype) {
  return static_cast<size_t>(own.region_rows * own.hidden) * dtype_size(dtype);
}

// What a rank of a pipeline keeps for the stages.
struct StageMemory {
  StagePort port;
  StageCounters counters;
};

bool is_between_stages(PeerWait wait) { return wait >= PeerWait::kValues; }

// What a rank waited for, or what the other one has not done.
std::string_view wait_text(PeerWait wait) {
  switch (wait) {
    case PeerWait::kPartialSums:
      return "the partial sums of all_reduce";
    case PeerWait::kSums:
      return "the sums of all_reduce";
    case PeerWait::kColumns:
      return "the columns of all_gather";
    case PeerWait::kTokens:
      return "the tokens of moe_dispatch";
    case PeerWait::kExpertSums:
      return "the sums of moe_combine";
    case PeerWait::kStart:
      return "the start of a collective";
    case PeerWait::kTrial:
      return "its first word";
    case PeerWait::kValues:
      return "send the values of";
    case PeerWait::kValuesTaken:
      return "let go of the values before";
    case PeerWait::kOutputs:
      return "publish the outputs of";
    case PeerWait::kOutputsAdopted:
      return "adopt the outputs of";
  }
  return "?";
}

}  // namespace

PeerGroup::PeerGroup(std::span<const std::shared_ptr<Device>> devices, const GroupOptions& options)
    : devices_(devices.begin(), devices.end()),
      num_stages_(options.num_stages),
      kernels_(options.kernels),
      reach_each_other_(kernels_ != CollectiveKernels::kNccl) {
  std::set<int> ordinals;
  for (const std::shared_ptr<Device>& device : devices_) {
    check(ordinals.insert(device->ordinal()).second, kWhere, "GPU ", device->ordinal(),
          " is there twice; every rank needs one of its own");
  }
  check(options.timeout.count() > 0, kWhere, "timeout is ", options.timeout.count(),
        " ms; it must be positive");
  check(options.expert_blocks >= 1 && options.expert_blocks <= kPeerBlocks, kWhere,
        "expert_blocks is ", options.expert_blocks, "; must be in [1, ", kPeerBlocks, "]");
  if (kernels_ == CollectiveKernels::kAuto) find_unreached();
  enable_peers();
  allocate_areas(options);
  if (size() > 1 && !reach_each_other_) open_nccl_groups(options.nccl);
  for (const std::shared_ptr<Device>& device : devices_) {
    const CurrentDevice current(device->ordinal(), kWhere);
    load_meeting();
    if (size() > 1) {
      load_all_reduce(size());
      load_all_gather();
      load_moe_dispatch();
      load_moe_combine(size());
    }
    if (num_stages_ > 1) {
      load_stage_send();
      load_stage_receive();
      load_adopt();
      load_advance();
    }
  }
  try_out();
  if (!nccl_.empty()) watcher_ = std::thread([this] { watch(); });
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
  for (int rank = 0; rank < num_ranks(); ++rank) {
    std::atomic_ref(report(rank).stop).store(1, std::memory_order_release);
  }
  for (const std::shared_ptr<Device>& device : devices_) device->settle();
  nccl_.clear();
}

StagePort* PeerGroup::stage_port(int rank) const {
  return stages_.empty() ? nullptr : &static_cast<StageMemory*>(stages_[rank].data())->port;
}

StageCounters* PeerGroup::stage_counters(int rank) const {
  return stages_.empty() ? nullptr : &static_cast<StageMemory*>(stages_[rank].data())->counters;
}

// All ranks of a stage, and those of one place in their stages: neighbours, and the last stage and
// all others.
bool PeerGroup::writes_to(int rank, int peer) const {
  const int stage = rank / size(), other = peer / size();
  if (stage == other) return rank != peer && reach_each_other_;
  const int last = num_stages_ - 1;
  return rank % size() == peer % size() &&
         (std::abs(stage - other) == 1 || stage == last || other == last);
}

bool PeerGroup::can_reach(int rank, int peer) const {
  int can = 0;
  check_cuda(cudaDeviceCanAccessPeer(&can, devices_[rank]->ordinal(), devices_[peer]->ordinal()),
             kWhere, "cudaDeviceCanAccessPeer");
  return can != 0;
}

std::string PeerGroup::unreached_text(int rank, int peer) const {
  return concat("GPU ", devices_[rank]->ordinal(), " of ", name_of(rank),
                " cannot reach the memory of GPU ", devices_[peer]->ordinal(), " of ",
                name_of(peer));
}

void PeerGroup::find_unreached() {
  for (int rank = 0; rank < num_ranks(); ++rank) {
    for (int other = 0; other < num_ranks(); ++other) {
      if (rank == other || rank / size() != other / size() || can_reach(rank, other)) continue;
      unreached_ = unreached_text(rank, other);
      reach_each_other_ = false;
      return;
    }
  }
}

std::string PeerGroup::note() const {
  if (nccl_.empty()) return "";
  const Nccl& library = nccl_[0]->library();
  return concat(unreached_, unreached_.empty() ? "" : ", so ", "NCCL ", library.version, " (",
                library.name, ") carries what ranks exchange");
}

void PeerGroup::enable_peers() {
  for (int rank = 0; rank < num_ranks(); ++rank) {
    const int ordinal = devices_[rank]->ordinal();
    const CurrentDevice current(ordinal, kWhere);
    for (int other = 0; other < num_ranks(); ++other) {
      if (!writes_to(rank, other)) continue;
      const int peer = devices_[other]->ordinal();
      if (!can_reach(rank, other)) {
        fail(ErrorKind::kDevice, kWhere, unreached_text(rank, other), kChooseOthers);
      }
      const cudaError_t status = cudaDeviceEnablePeerAccess(peer, 0);
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
  reports_ =
      devices_[0]->allocate_mapped(static_cast<size_t>(num_ranks()) * sizeof(PeerReport), "ranks");
  for (const std::shared_ptr<Device>& device : devices_) {
    states_.push_back(device->allocate(sizeof(PeerState), "ranks"));
    const auto bytes = static_cast<size_t>(layout.bytes);
    areas_.push_back(reach_each_other_ ? device->allocate(bytes, "ranks")
                                       : device->allocate_mapped(bytes, "ranks"));
    if (num_stages_ > 1) stages_.push_back(device->allocate(sizeof(StageMemory), "ranks"));
  }
  for (int rank = 0; rank < num_ranks(); ++rank) {
    PeerView view{};
    view.rank = rank % size();
    view.size = size();
    view.watch.rank = rank;
    view.watch.num_ranks = num_ranks();
    view.watch.state = static_cast<PeerState*>(states_[rank].data());
    view.watch.reports = static_cast<PeerReport*>(reports_.data());
    view.watch.timeout = static_cast<uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(options.timeout).count());
    const int first = rank - view.rank;
    for (int peer = 0; peer < size(); ++peer) {
      view.areas[peer] = static_cast<char*>(areas_[first + peer].data());
    }
    view.packet_pieces = layout.packet_pieces;
    view.bulk_pieces = layout.bulk_pieces;
    view.bulk_offset = layout.bulk_offset;
    view.expert_blocks = options.expert_blocks;
    views_.push_back(view);
  }
}

void PeerGroup::open_nccl_groups(const std::vector<std::string>& libraries) {
  try {
    const Nccl& library = open_nccl(libraries);
    for (int stage = 0; stage < num_stages_; ++stage) {
      std::vector<int> ordinals;
      for (int rank = 0; rank < size(); ++rank) {
        ordinals.push_back(devices_[stage * size() + rank]->ordinal());
      }
      nccl_.push_back(std::make_unique<NcclGroup>(library, ordinals));
    }
  } catch (const Error& error) {
    if (unreached_.empty()) throw;
    fail(error.kind(), kWhere, unreached_, kChooseOthers,
         ". NCCL could carry what ranks exchange instead, but: ", error.what());
  }
}

void PeerGroup::try_out() {
  for (int rank = 0; rank < num_ranks(); ++rank) {
    Device& device = *devices_[rank];
    const CurrentDevice current(device.ordinal(), kWhere);
    StepContext ctx;
    ctx.device = &device;
    ctx.stream = device.stream();
    PeerStates peers{};
    for (int peer = 0; peer < num_ranks(); ++peer) {
      if (writes_to(rank, peer)) peers.states[peer] = static_cast<PeerState*>(states_[peer].data());
    }
    launch_trial(views_[rank].watch, peers, ctx);
  }
  for (const std::shared_ptr<Device>& device : devices_) device->synchronize();
  if (is_aborted()) {
    fail(ErrorKind::kDevice, kWhere, "GPUs that should reach each other do not: ", abort_reason());
  }
}

// Tokens are staged where sums come back to: a rank has read these before it dispatches again, and
// has sent its tokens before others' sums can come.
void PeerGroup::stage_experts(int stage, std::span<ExpertLink> links) {
  if (reach_each_other_ || size() == 1) return;
  std::vector<char*> memory;
  std::vector<cudaStream_t> streams;
  for (int rank = 0; rank < size(); ++rank) {
    Device& device = *devices_[stage * size() + rank];
    ExpertLink& link = links[rank];
    const ExpertBuffers own = link.ranks[rank];
    check_internal(dtype_size(own.dtype) <= dtype_size(own.sum_dtype), kWhere,
                   "tokens take more room than sums");
    const int64_t choices = own.region_rows * own.top_k;
    staged_.push_back(
        device.allocate(static_cast<size_t>(staged_bytes(size(), choices)), "experts"));
    auto* weights = static_cast<float*>(staged_.back().data());
    auto* experts = reinterpret_cast<int32_t*>(weights + size() * choices);
    int32_t* counts = experts + size() * choices;
    for (int peer = 0; peer < size(); ++peer) {
      if (peer == rank) continue;
      // The region of this rank over there is that of the peer here.
      const int shift = peer - rank;
      ExpertBuffers& there = link.ranks[peer];
      there.x = region_of(own.sums, shift, region_bytes(own, own.dtype));
      there.weights = weights + shift * choices;
      there.experts = experts + shift * choices;
      there.counts = counts + shift;
      there.sums = nullptr;
    }
    memory.push_back(static_cast<char*>(own.sums));
    streams.push_back(static_cast<cudaStream_t>(device.stream()));
  }
  nccl_[stage]->connect(memory, streams);
  for (int rank = 0; rank < size(); ++rank) devices_[stage * size() + rank]->synchronize();
}

// NCCL's kernels do not see that the group has ended; somebody has to tell it.
void PeerGroup::watch() {
  std::unique_lock lock(mutex_);
  while (!closing_) {
    if (is_aborted()) {
      lock.unlock();
      NcclGroup::abort(nccl_);
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
  for (int rank = 0; rank < num_ranks(); ++rank) {
    std::atomic_ref(report(rank).stop).store(1, std::memory_order_release);
  }
  changed_.notify_all();
}

PeerEnd PeerGroup::end_of(int rank) const noexcept {
  return std::atomic_ref(report(rank).end).load(std::memory_order_acquire);
}

bool PeerGroup::is_aborted() const noexcept {
  if (aborted_.load(std::memory_order_acquire)) return true;
  for (int rank = 0; rank < num_ranks(); ++rank) {
    if (end_of(rank) == PeerEnd::kOutOfTime) return true;
  }
  return false;
}

std::string PeerGroup::abort_reason() const {
  // A rank that is told to stop, as another has failed, may still find its time limit over.
  if (aborted_.load(std::memory_order_acquire)) {
    const std::lock_guard lock(mutex_);
    return reason_;
  }
  int waiter = 0;
  while (waiter < num_ranks() && end_of(waiter) != PeerEnd::kOutOfTime) ++waiter;
  if (waiter == num_ranks()) return "";
  // Whoever was missed may itself have waited for another one. Ranks that wait for each other end
  // the search, too.
  for (int i = 1; i < num_ranks(); ++i) {
    const int next = report(waiter).missing;
    if (end_of(next) == PeerEnd::kNone) break;
    waiter = next;
  }
  const PeerReport& found = report(waiter);
  const std::string missing = name_of(found.missing);
  const std::string limit = concat(" within ", views_[waiter].watch.timeout / 1000000, " ms: ");
  if (is_between_stages(found.wait)) {
    return concat(missing, " did not ", wait_text(found.wait), " step ", found.call, limit,
                  name_of(waiter), " waited for it");
  }
  const std::string which = found.call == 0 ? "" : concat(", collective ", found.call);
  return concat(missing, " did not come", limit, name_of(waiter), " waited for ",
                wait_text(found.wait), which);
}

CudaCommunicator::CudaCommunicator(int global_rank, std::shared_ptr<PeerGroup> group)
    : Communicator(global_rank % group->size(), group->size(), global_rank / group->size(),
                   group->num_stages()),
      group_(std::move(group)) {}

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
  group_->nccl(stage())->sum(rank(), x, out, static_cast<size_t>(count), dtype, stream_of(ctx));
}

void CudaCommunicator::gather_by_nccl(const void* x, void* out, int64_t rows, int64_t cols,
                                      DType dtype, const StepContext& ctx) {
  launch_meeting(view(), ctx);
  group_->nccl(stage())->gather(rank(), x, out, rows, cols, dtype, stream_of(ctx));
}

void CudaCommunicator::dispatch_by_nccl(const ExpertLink& link, const StepContext& ctx) {
  const ExpertBuffers& own = link.ranks[rank()];
  const auto choices = static_cast<size_t>(own.region_rows * own.top_k);
  std::array<NcclMessage, size_t{4} * kMaxRanks> messages;
  size_t count = 0;
  for (int peer = 0; peer < size(); ++peer) {
    if (peer == rank()) continue;
    const ExpertBuffers& there = link.ranks[peer];
    const auto add = [&](const void* sent, void* received, size_t bytes) {
      messages[count++] = {peer, region_of(sent, rank(), bytes), region_of(received, peer, bytes),
                           bytes};
    };
    add(there.x, own.x, region_bytes(own, own.dtype));
    add(there.experts, own.experts, choices * sizeof(int32_t));
    add(there.weights, own.weights, choices * sizeof(float));
    add(there.counts, own.counts, sizeof(int32_t));
  }
  exchange({messages.data(), count}, ctx);
}

void CudaCommunicator::combine_by_nccl(const void* partial, const ExpertBuffers& own,
                                       const StepContext& ctx) {
  const size_t bytes = region_bytes(own, own.sum_dtype);
  std::array<NcclMessage, kMaxRanks> messages;
  size_t count = 0;
  for (int peer = 0; peer < size(); ++peer) {
    if (peer == rank()) continue;
    messages[count++] = {peer, region_of(partial, peer, bytes), region_of(own.sums, peer, bytes),
                         bytes};
  }
  exchange({messages.data(), count}, ctx);
}

void CudaCommunicator::exchange(std::span<const NcclMessage> messages, const StepContext& ctx) {
  launch_meeting(view(), ctx);
  group_->nccl(stage())->exchange(rank(), messages, stream_of(ctx));
}

StageView stage_view(std::string_view op, const StepContext& ctx) {
  check_internal(ctx.communicator != nullptr && ctx.communicator->stage_link() != nullptr, op,
                 "the rank is not linked with other stages");
  const auto& rank = static_cast<const CudaCommunicator&>(*ctx.communicator);
  rank.check_alive();
  return {*rank.stage_link(), rank.view().watch, rank.size(), ctx.rings.step};
}

std::vector<std::unique_ptr<Communicator>> make_group(
    std::span<const std::shared_ptr<Device>> devices, const GroupOptions& options) {
  const auto group = std::make_shared<PeerGroup>(devices, options);
  std::vector<std::unique_ptr<Communicator>> ranks;
  for (int rank = 0; rank < group->num_ranks(); ++rank) {
    ranks.push_back(std::make_unique<CudaCommunicator>(rank, group));
  }
  return ranks;
}

// Either memory for peers, or what NCCL is to send.
int64_t group_bytes(int size, const GroupOptions& options) {
  const bool has_values = options.kernels != CollectiveKernels::kNccl;
  const int64_t stages = options.num_stages > 1 ? int64_t{sizeof(StageMemory)} : 0;
  const int ranks = size / options.num_stages;
  const int64_t staged = options.choices > 0 ? staged_bytes(ranks, options.choices) : 0;
  return std::max(area_layout(ranks, options.max_bytes, has_values).bytes, staged) + stages;
}

}  // namespace mrv1::cuda
