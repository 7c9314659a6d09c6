// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// One GPU as a device with one in-order stream, on the CUDA runtime. Launches are asynchronous, so
// submit() runs its function at once; a step's end is seen by the sequence number that its last
// kernel stores in mapped memory. Methods make the GPU current for their own length only, so that
// other users of CUDA in the process keep theirs.
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "check.h"
#include "copy_stream.h"
#include "core/device.h"
#include "core/error.h"
#include "current_device.h"
#include "kernels.h"
#include "linear_context.h"

namespace mrv1 {
namespace {

using cuda::CurrentDevice;

constexpr std::string_view kWhere = "cuda";

// Its attributes can be read only if the build holds code for the GPU at hand.
__global__ void probe_kernel() {}

// Number of GPUs, and why there is none. Leaves no error behind.
struct DeviceCount {
  int count = 0;
  cudaError_t status = cudaSuccess;
};

DeviceCount count_devices() noexcept {
  DeviceCount found;
  found.status = cudaGetDeviceCount(&found.count);
  if (found.status != cudaSuccess) {
    found.count = 0;
    cudaGetLastError();
  }
  return found;
}

std::string version_text(int version) { return concat(version / 1000, ".", version % 1000 / 10); }

// A graph that was captured from the device's stream, ready to launch.
class CudaGraph final : public Graph {
 public:
  CudaGraph(cudaGraph_t graph, cudaStream_t stream) {
    cuda::check_cuda(cudaGraphInstantiate(&exec_, graph, 0), kWhere, "cudaGraphInstantiate");
    // The first launch would do this otherwise, in the middle of a step.
    const cudaError_t status = cudaGraphUpload(exec_, stream);
    if (status != cudaSuccess) cudaGraphExecDestroy(exec_);
    cuda::check_cuda(status, kWhere, "cudaGraphUpload");
  }
  ~CudaGraph() override {
    cudaGraphExecDestroy(exec_);
    cudaGetLastError();
  }
  CudaGraph(const CudaGraph&) = delete;
  CudaGraph& operator=(const CudaGraph&) = delete;

  cudaGraphExec_t exec() const { return exec_; }

 private:
  cudaGraphExec_t exec_ = nullptr;
};

class CudaDevice final : public Device {
 public:
  CudaDevice(int ordinal, cudaStream_t stream)
      : ordinal_(ordinal), owns_stream_(stream == nullptr), stream_(stream) {
    CurrentDevice current(ordinal_, kWhere);
    cudaDeviceProp properties{};
    cuda::check_cuda(cudaGetDeviceProperties(&properties, ordinal_), kWhere,
                     "cudaGetDeviceProperties");
    name_ = properties.name;
    overlaps_launches_ = properties.major >= 9;
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
    if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) {
      cudaGetLastError();
      fail(ErrorKind::kDevice, kWhere, "this build has no code for GPU ", ordinal_, " (", name_,
           ", compute capability ", properties.major, ".", properties.minor, ")");
    }
    cuda::check_cuda(status, kWhere, "cudaFuncGetAttributes");
    if (!owns_stream_) {
      cuda::check_external_stream(ordinal_, stream_);
      return;
    }
    cuda::check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), kWhere,
                     "cudaStreamCreateWithFlags");
  }

  // Errors are left alone here: at the end of a process the driver may be gone already.
  ~CudaDevice() override {
    cudaStreamSynchronize(stream_);
    if (side_stream_ != nullptr) {
      cudaStreamSynchronize(side_stream_);
      cudaStreamDestroy(side_stream_);
    }
    linear_.reset();
    if (pool_ != nullptr) cudaMemPoolDestroy(pool_);
    if (owns_stream_) cudaStreamDestroy(stream_);
    cudaGetLastError();
  }

  DeviceType type() const override { return DeviceType::kCuda; }
  std::string name() const override { return name_; }
  const Kernels& kernels() const override { return cuda_kernels(); }
  void* stream() override { return stream_; }

  cuda::LinearContext* linear_context() override {
    const std::lock_guard lock(linear_mutex_);
    if (linear_ == nullptr) make_linear(LinearOptions{});
    return linear_.get();
  }
  void configure_linear(const LinearOptions& options) override {
    const std::lock_guard lock(linear_mutex_);
    synchronize();
    make_linear(options);
  }

  int ordinal() const override { return ordinal_; }
  std::unique_ptr<CopyStream> make_copy_stream() override {
    return cuda::make_copy_stream(ordinal_);
  }
  std::unique_ptr<Fence> make_fence() override { return cuda::make_fence(ordinal_, stream_); }

  void copy_within(void* device_dst, const void* device_src, size_t bytes) override {
    ++counters().copies;
    cuda::check_cuda(cudaMemcpyAsync(device_dst, device_src, bytes, cudaMemcpyDefault, stream_),
                     kWhere, "cudaMemcpyAsync");
  }

  void copy_in_stream(void* device_dst, const void* src, size_t bytes, void* stream) override {
    if (bytes == 0) return;
    CurrentDevice current(ordinal_, kWhere);
    cuda::check_cuda(cudaMemcpyAsync(device_dst, src, bytes, cudaMemcpyDefault, handle_of(stream)),
                     kWhere, "cudaMemcpyAsync");
  }

  void order_streams(void* before, void* after) override {
    cuda::order_streams(ordinal_, handle_of(before), handle_of(after));
  }

  void* side_stream() override {
    if (side_stream_ == nullptr) {
      CurrentDevice current(ordinal_, kWhere);
      int least = 0, greatest = 0;
      cuda::check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), kWhere,
                       "cudaDeviceGetStreamPriorityRange");
      cuda::check_cuda(cudaStreamCreateWithPriority(&side_stream_, cudaStreamNonBlocking, greatest),
                       kWhere, "cudaStreamCreateWithPriority");
    }
    return side_stream_;
  }
  std::unique_ptr<StreamMark> make_mark() override { return cuda::make_mark(ordinal_, stream_); }

  bool overlaps_launches() const override { return overlaps_launches_; }

  MemoryInfo memory() const override {
    CurrentDevice current(ordinal_, kWhere);
    MemoryInfo info;
    cuda::check_cuda(cudaMemGetInfo(&info.free_bytes, &info.total_bytes), kWhere, "cudaMemGetInfo");
    return info;
  }

  Buffer allocate(size_t bytes, std::string_view what) override {
    if (bytes == 0) return Buffer(this, nullptr, nullptr, 0);
    CurrentDevice current(ordinal_, kWhere);
    ++counters().allocations;
    void* data = nullptr;
    check_allocation(cudaMalloc(&data, bytes), "cudaMalloc", bytes, what, "device memory");
    Buffer buffer(this, data, nullptr, bytes);
    cuda::check_cuda(cudaMemsetAsync(data, 0, bytes, stream_), kWhere, "cudaMemsetAsync");
    wait_for_stream();
    return buffer;
  }

  Buffer allocate_mapped(size_t bytes, std::string_view what) override {
    if (bytes == 0) return Buffer(this, nullptr, nullptr, 0);
    CurrentDevice current(ordinal_, kWhere);
    ++counters().allocations;
    void* host = nullptr;
    check_allocation(cudaHostAlloc(&host, bytes, cudaHostAllocMapped | cudaHostAllocPortable),
                     "cudaHostAlloc", bytes, what, "pinned host memory");
    std::memset(host, 0, bytes);
    void* data = nullptr;
    const cudaError_t status = cudaHostGetDevicePointer(&data, host, 0);
    if (status != cudaSuccess) cudaFreeHost(host);
    cuda::check_cuda(status, kWhere, "cudaHostGetDevicePointer");
    return Buffer(this, data, host, bytes);
  }

  void copy_in(void* device_dst, const void* host_src, size_t bytes) override {
    copy(device_dst, host_src, bytes, cudaMemcpyHostToDevice);
  }

  void copy_out(void* host_dst, const void* device_src, size_t bytes) override {
    copy(host_dst, device_src, bytes, cudaMemcpyDeviceToHost);
  }

  void set_word(uint64_t* device_word, uint64_t value) override {
    copy(device_word, &value, sizeof(value), cudaMemcpyHostToDevice);
  }

  void submit(void (*fn)(void*), void* arg) override {
    CurrentDevice current(ordinal_, kWhere);
    fn(arg);
  }

  // Only this thread's calls are watched, so that other threads may use the GPU meanwhile; not this
  // device, whose stream is being recorded.
  std::unique_ptr<Graph> capture(std::function<void()> fn) override {
    const DeviceCounters before = counters();
    cuda::check_cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), kWhere,
                     "cudaStreamBeginCapture");
    cudaGraph_t graph = nullptr;
    try {
      fn();
    } catch (...) {
      cudaStreamEndCapture(stream_, &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      cudaGetLastError();
      throw;
    }
    counters().kernel_launches = before.kernel_launches;  // recorded, not launched
    cuda::check_cuda(cudaStreamEndCapture(stream_, &graph), kWhere, "cudaStreamEndCapture");
    try {
      auto captured = std::make_unique<CudaGraph>(graph, stream_);
      cudaGraphDestroy(graph);
      return captured;
    } catch (...) {
      cudaGraphDestroy(graph);
      throw;
    }
  }

  void launch(const Graph& graph) override {
    ++counters().graph_launches;
    cuda::check_cuda(cudaGraphLaunch(static_cast<const CudaGraph&>(graph).exec(), stream_), "graph",
                     "cudaGraphLaunch");
  }

  // Spins first, as a step is short, then sleeps between looks. A launch that failed never stores
  // the sequence, so the stream is asked now and then.
  void wait_sequence(const std::atomic<uint64_t>& sequence, uint64_t value) override {
    wait_sequence_until(sequence, value, std::chrono::steady_clock::time_point::max());
  }

  bool wait_sequence_until(const std::atomic<uint64_t>& sequence, uint64_t value,
                           std::chrono::steady_clock::time_point until) override {
    auto next_query = std::chrono::steady_clock::now() + kQueryInterval;
    for (int64_t looks = 1; sequence.load(std::memory_order_acquire) < value; ++looks) {
      if (looks % kLooksPerClock == 0 && std::chrono::steady_clock::now() >= next_query) {
        next_query = std::chrono::steady_clock::now() + kQueryInterval;
        CurrentDevice current(ordinal_, kWhere);
        const cudaError_t status = cudaStreamQuery(stream_);
        if (status == cudaSuccess) {
          check_internal(sequence.load(std::memory_order_acquire) >= value, kWhere,
                         "the stream is idle but sequence ", value, " was never written");
          return true;
        }
        if (status != cudaErrorNotReady) {
          cuda::check_cuda(status, kWhere, "a kernel of the step that was waited for");
        }
        cudaGetLastError();  // "not ready" is remembered, and the next launch must not report it
        if (next_query > until) return false;
      }
      if (looks < kSpins) {
        cpu_pause();
      } else {
        std::this_thread::sleep_for(kSleep);
      }
    }
    return true;
  }

  void settle() noexcept override {
    // What they report is the task's own error, or follows from it.
    cudaStreamSynchronize(stream_);
    if (side_stream_ != nullptr) cudaStreamSynchronize(side_stream_);
  }

  void synchronize() override {
    CurrentDevice current(ordinal_, kWhere);
    wait_for_stream();
  }

 private:
  static constexpr int64_t kSpins = 1000000;  // some 40 ms, the longest decode steps included
  static constexpr int64_t kLooksPerClock = 64;
  static constexpr std::chrono::milliseconds kQueryInterval{5};
  static constexpr std::chrono::microseconds kSleep{20};
  static constexpr uint64_t kPoolBytes = uint64_t{256} << 20;  // kept of what was given back

  static void cpu_pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
  }

  cudaStream_t handle_of(void* stream) const {
    return stream == nullptr ? stream_ : static_cast<cudaStream_t>(stream);
  }

  // Memory of single ops, apart from what others in the process take by cudaMallocAsync.
  cudaMemPool_t pool_of_streams() {
    const std::lock_guard lock(pool_mutex_);
    if (pool_ == nullptr) {
      cudaMemPoolProps properties{};
      properties.allocType = cudaMemAllocationTypePinned;
      properties.location.type = cudaMemLocationTypeDevice;
      properties.location.id = ordinal_;
      cuda::check_cuda(cudaMemPoolCreate(&pool_, &properties), kWhere, "cudaMemPoolCreate");
      uint64_t kept = kPoolBytes;
      cuda::check_cuda(cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReleaseThreshold, &kept),
                       kWhere, "cudaMemPoolSetAttribute");
    }
    return pool_;
  }

  void* stream_allocate(size_t bytes, bool zeroed, std::string_view what, void* stream) override {
    CurrentDevice current(ordinal_, kWhere);
    void* data = nullptr;
    check_allocation(cudaMallocFromPoolAsync(&data, bytes, pool_of_streams(), handle_of(stream)),
                     "cudaMallocFromPoolAsync", bytes, what, "device memory");
    if (!zeroed) return data;
    const cudaError_t status = cudaMemsetAsync(data, 0, bytes, handle_of(stream));
    if (status != cudaSuccess) stream_release(data, stream);
    cuda::check_cuda(status, kWhere, "cudaMemsetAsync");
    return data;
  }

  // Errors are left alone: at the end of a process the driver may be gone already.
  void stream_release(void* data, void* stream) noexcept override {
    int previous = ordinal_;
    cudaGetDevice(&previous);
    if (previous != ordinal_) cudaSetDevice(ordinal_);
    cudaFreeAsync(data, handle_of(stream));
    if (previous != ordinal_) cudaSetDevice(previous);
    cudaGetLastError();
  }

  void make_linear(const LinearOptions& options) {
    CurrentDevice current(ordinal_, kWhere);
    linear_ = std::make_unique<cuda::LinearContext>(options, name_);
  }

  void wait_for_stream() {
    ++counters().waits;
    cuda::check_cuda(cudaStreamSynchronize(stream_), kWhere, "cudaStreamSynchronize");
  }

  void check_allocation(cudaError_t status, std::string_view call, size_t bytes,
                        std::string_view what, std::string_view kind) const {
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      const MemoryInfo info = memory();
      fail(ErrorKind::kOutOfMemory, kWhere, what, " needs ", bytes, " bytes of ", kind,
           ", which could not be allocated (", info.free_bytes, " of ", info.total_bytes,
           " bytes of GPU ", ordinal_, " are free)");
    }
    cuda::check_cuda(status, kWhere, call);
  }

  void copy(void* target, const void* source, size_t bytes, cudaMemcpyKind kind) {
    if (bytes == 0) return;
    CurrentDevice current(ordinal_, kWhere);
    ++counters().copies;
    cuda::check_cuda(cudaMemcpyAsync(target, source, bytes, kind, stream_), kWhere,
                     "cudaMemcpyAsync");
    wait_for_stream();
  }

  // Waits for kernels that may still use the memory; cudaFreeHost does not promise to.
  void release(void* data, void* host, size_t) noexcept override {
    if (data == nullptr && host == nullptr) return;
    cudaStreamSynchronize(stream_);
    if (host != nullptr) {
      cudaFreeHost(host);
    } else {
      cudaFree(data);
    }
    cudaGetLastError();
  }

  const int ordinal_;
  std::string name_;
  std::mutex linear_mutex_;
  std::unique_ptr<cuda::LinearContext> linear_;
  std::mutex pool_mutex_;
  cudaMemPool_t pool_ = nullptr;
  bool overlaps_launches_ = false;
  bool owns_stream_;
  cudaStream_t stream_ = nullptr;
  cudaStream_t side_stream_ = nullptr;
};

}  // namespace

namespace cuda {

bool is_built() { return true; }

bool is_available() { return count_devices().count > 0; }

std::string describe() {
  int runtime = 0;
  int driver = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);  // 0 without a driver
  std::string text = concat("CUDA runtime ", version_text(runtime), ", ",
                            driver == 0 ? "no driver" : "driver for " + version_text(driver));
  const DeviceCount found = count_devices();
  if (found.status != cudaSuccess) {
    return concat(text, ", no GPU: ", cudaGetErrorString(found.status));
  }
  for (int ordinal = 0; ordinal < found.count; ++ordinal) {
    cudaDeviceProp properties{};
    if (cudaGetDeviceProperties(&properties, ordinal) != cudaSuccess) {
      cudaGetLastError();
      continue;
    }
    text +=
        concat("; GPU ", ordinal, ": ", properties.name, ", compute capability ", properties.major,
               ".", properties.minor, ", ", properties.totalGlobalMem >> 20, " MiB");
  }
  return text;
}

std::unique_ptr<Device> make_device(int ordinal, void* stream) {
  const DeviceCount found = count_devices();
  if (ordinal < 0 || ordinal >= found.count) {
    fail(ErrorKind::kDevice, kWhere, "there is no GPU ", ordinal, ": ", describe());
  }
  return std::make_unique<CudaDevice>(ordinal, static_cast<cudaStream_t>(stream));
}

}  // namespace cuda
}  // namespace mrv1
