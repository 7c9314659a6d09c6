// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "program/probe_timing.h"

#include <chrono>
#include <memory>

#include "core/device.h"
#include "core/probes.h"

namespace mrv1 {
namespace {

// A GPU that did nothing for a while comes back to its clocks in the course of milliseconds.
constexpr double kWarmSeconds = 0.1;

}  // namespace

std::vector<double> time_probe(Device& device, const std::function<void()>& work, int32_t repeats) {
  const bool on_cpu = device.type() == DeviceType::kCpu;
  std::unique_ptr<Graph> graph;
  run_on_stream(device, [&] {
    work();
    if (!on_cpu) graph = device.capture(work);
  });
  const auto run = [&] {
    double spent = 0.0;
    run_on_stream(device, [&] {
      if (on_cpu) {
        const auto start = std::chrono::steady_clock::now();
        work();
        spent = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      } else {
        spent = cuda::time_launches(device, [&] { device.launch(*graph); });
      }
    });
    return spent;
  };
  for (double spent = 0.0; !on_cpu && spent < kWarmSeconds;) spent += run();
  std::vector<double> seconds;
  for (int32_t i = 0; i < repeats; ++i) seconds.push_back(run());
  return seconds;
}

}  // namespace mrv1
