// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "core/device.h"

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "core/error.h"

namespace mrv1 {
namespace {

TEST_CASE("run_on_stream runs on the stream's thread, waits, and throws what the work threw") {
  const auto device = make_cpu_device(2);
  std::thread::id thread;
  run_on_stream(*device, [&] { thread = std::this_thread::get_id(); });
  CHECK(thread != std::thread::id{});
  CHECK(thread != std::this_thread::get_id());
  for (ErrorKind kind : {ErrorKind::kOutOfMemory, ErrorKind::kDevice, ErrorKind::kInternal}) {
    try {
      run_on_stream(*device, [&] { fail(kind, "test", "planned"); });
      FAIL("nothing was thrown");
    } catch (const Error& error) {
      CHECK(error.kind() == kind);
      CHECK(std::string(error.what()) == "[test] planned");
    }
  }
}

// A task that queues itself again before it ends, so that the queue is never empty.
struct Endless {
  Device* device;
  std::atomic<bool> stopping{false}, ended{false};

  static void run(void* arg) {
    auto& self = *static_cast<Endless*>(arg);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    if (self.stopping) {
      self.ended = true;
    } else {
      self.device->submit(run, arg);
    }
  }
};

TEST_CASE("synchronize waits for earlier work only, however much others queue meanwhile") {
  const auto device = make_cpu_device(1);
  Endless endless{device.get()};
  device->submit(Endless::run, &endless);
  std::thread watchdog([&] {
    for (int i = 0; i < 5000 && !endless.stopping; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    endless.stopping = true;
  });
  int ran = 0;
  for (int i = 0; i < 5; ++i) run_on_stream(*device, [&] { ++ran; });
  CHECK(ran == 5);
  CHECK_FALSE(endless.ended.load());
  endless.stopping = true;
  watchdog.join();
  while (!endless.ended) std::this_thread::yield();
}

}  // namespace
}  // namespace mrv1
