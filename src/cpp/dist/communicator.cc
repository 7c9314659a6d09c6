// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "dist/communicator.h"

#include <algorithm>
#include <array>

#include "core/device.h"
#include "core/error.h"
#include "dist/expert_link.h"
#include "dist/stage_link.h"

namespace mrv1 {
namespace {

// In the order of CollectiveKernels.
constexpr std::array<std::string_view, 4> kKernelNames = {"auto", "one_shot", "two_shot", "nccl"};

}  // namespace

std::string rank_name(int global_rank, int size, int num_stages) {
  if (num_stages == 1) return concat("rank ", global_rank);
  return concat("rank ", global_rank, " (stage ", global_rank / size, ")");
}

CollectiveKernels collective_kernels_from_name(std::string_view name) {
  const auto found = std::find(kKernelNames.begin(), kKernelNames.end(), name);
  check(found != kKernelNames.end(), "ranks", "kernels = '", name,
        "': must be auto, one_shot, two_shot or nccl");
  return static_cast<CollectiveKernels>(found - kKernelNames.begin());
}

std::string_view collective_kernels_name(CollectiveKernels kernels) {
  return kKernelNames[static_cast<size_t>(kernels)];
}

Communicator::Communicator(int rank, int size, int stage, int num_stages)
    : rank_(rank), size_(size), stage_(stage), num_stages_(num_stages) {}

Communicator::~Communicator() = default;

void Communicator::check_alive() const {
  if (is_aborted()) [[unlikely]]
    fail(ErrorKind::kDevice, "ranks", abort_reason());
}

std::vector<std::unique_ptr<Communicator>> make_group(
    std::span<const std::shared_ptr<Device>> devices, const GroupOptions& options) {
  const int size = static_cast<int>(devices.size());
  check(size >= 1 && size <= kMaxRanks, "ranks", "a group has 1 to ", kMaxRanks, " ranks, not ",
        size);
  check(options.num_stages >= 1 && size % options.num_stages == 0, "ranks", size,
        " ranks do not make ", options.num_stages, " stages of as many each");
  for (const std::shared_ptr<Device>& device : devices) {
    check(device->type() == devices[0]->type(), "ranks",
          "the devices of a group must be of one type");
  }
  if (devices[0]->type() == DeviceType::kCuda) return cuda::make_group(devices, options);
  return make_cpu_group(size, options);
}

int64_t group_bytes(DeviceType type, int size, const GroupOptions& options) {
  return type == DeviceType::kCuda ? cuda::group_bytes(size, options) : 0;
}

}  // namespace mrv1
