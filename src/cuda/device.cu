// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// One GPU as a device with one in-order stream, on the CUDA runtime. Launches are asynchronous, so
// submit() runs its function at once; a step's end is seen by the sequence number that its last
// kernel stores in mapped memory. Methods make the GPU current for their own length only, so that
// other users of CUDA in the process keep theirs.
#include <chrono>
#include <cstring>
#include <string>
#include <thread>

#include "check.h"
#include "core/device.h"
#include "core/error.h"
#include "kernels.h"

namespace mrv1 {
namespace {

constexpr std::string_view kWhere = "cuda";

// Its attributes can be read only if the build holds code for the GPU at hand.
__global__ void probe_kernel() {}

// Makes `ordinal` current for a scope.
class CurrentDevice {
 public:
  explicit CurrentDevice(int ordinal) : ordinal_(ordinal) {
    cuda::check_cuda(cudaGetDevice(&previous_), kWhere, "cudaGetDevice");
    // Also where the number is right already: a thread's first call has no context yet, and
    // queries such as cudaPointerGetAttributes do not make one.
    cuda::check_cuda(cudaSetDevice(ordinal_), kWhere, "cudaSetDevice");
  }
  ~CurrentDevice() {
    if (previous_ != ordinal_) cudaSetDevice(previous_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int ordinal_;
  int previous_ = 0;
};

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

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int ordinal) : ordinal_(ordinal) {
    CurrentDevice current(ordinal_);
    cudaDeviceProp properties{};
    cuda::check_cuda(cudaGetDeviceProperties(&properties, ordinal_), kWhere,
                     "cudaGetDeviceProperties");
    name_ = properties.name;
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
    if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) {
      cudaGetLastError();
      fail(ErrorKind::kDevice, kWhere, "this build has no code for GPU ", ordinal_, " (", name_,
           ", compute capability ", properties.major, ".", properties.minor, ")");
    }
    cuda::check_cuda(status, kWhere, "cudaFuncGetAttributes");
    cuda::check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), kWhere,
                     "cudaStreamCreateWithFlags");
  }

  // Errors are left alone here: at the end of a process the driver may be gone already.
  ~CudaDevice() override {
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
    cudaGetLastError();
  }

  DeviceType type() const override { return DeviceType::kCuda; }
  std::string name() const override { return name_; }
  const Kernels& kernels() const override { return cuda_kernels(); }
  void* stream() override { return stream_; }

  MemoryInfo memory() const override {
    CurrentDevice current(ordinal_);
    MemoryInfo info;
    cuda::check_cuda(cudaMemGetInfo(&info.free_bytes, &info.total_bytes), kWhere, "cudaMemGetInfo");
    return info;
  }

  Buffer allocate(size_t bytes, std::string_view what) override {
    if (bytes == 0) return Buffer(this, nullptr, nullptr, 0);
    CurrentDevice current(ordinal_);
    void* data = nullptr;
    check_allocation(cudaMalloc(&data, bytes), "cudaMalloc", bytes, what, "device memory");
    Buffer buffer(this, data, nullptr, bytes);
    cuda::check_cuda(cudaMemsetAsync(data, 0, bytes, stream_), kWhere, "cudaMemsetAsync");
    wait_for_stream();
    return buffer;
  }

  Buffer allocate_mapped(size_t bytes, std::string_view what) override {
    if (bytes == 0) return Buffer(this, nullptr, nullptr, 0);
    CurrentDevice current(ordinal_);
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

  void submit(void (*fn)(void*), void* arg) override {
    CurrentDevice current(ordinal_);
    fn(arg);
  }

  // Spins first, as a step is short, then sleeps between looks. A launch that failed never stores
  // the sequence, so the stream is asked now and then.
  void wait_sequence(const std::atomic<uint64_t>& sequence, uint64_t value) override {
    for (int64_t looks = 1; sequence.load(std::memory_order_acquire) < value; ++looks) {
      if (looks % kLooksPerQuery == 0) {
        const cudaError_t status = cudaStreamQuery(stream_);
        if (status == cudaSuccess) {
          check_internal(sequence.load(std::memory_order_acquire) >= value, kWhere,
                         "the stream is idle but sequence ", value, " was never written");
          return;
        }
        if (status != cudaErrorNotReady) {
          cuda::check_cuda(status, kWhere, "a kernel of the step that was waited for");
        }
        cudaGetLastError();  // "not ready" is remembered, and the next launch must not report it
      }
      if (looks < kSpins) {
        std::this_thread::yield();
      } else {
        std::this_thread::sleep_for(kSleep);
      }
    }
  }

  void settle() noexcept override {
    cudaStreamSynchronize(stream_);  // what it reports is the task's own error, or follows from it
  }

  void synchronize() override {
    CurrentDevice current(ordinal_);
    wait_for_stream();
  }

 private:
  static constexpr int64_t kSpins = 20000;
  static constexpr int64_t kLooksPerQuery = 64;
  static constexpr std::chrono::microseconds kSleep{20};

  void wait_for_stream() {
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
    CurrentDevice current(ordinal_);
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
  cudaStream_t stream_ = nullptr;
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

std::unique_ptr<Device> make_device(int ordinal) {
  const DeviceCount found = count_devices();
  if (ordinal < 0 || ordinal >= found.count) {
    fail(ErrorKind::kDevice, kWhere, "there is no GPU ", ordinal, ": ", describe());
  }
  return std::make_unique<CudaDevice>(ordinal);
}

}  // namespace cuda
}  // namespace mrv1
