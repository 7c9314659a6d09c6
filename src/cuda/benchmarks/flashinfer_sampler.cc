// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// FlashInfer's sampling kernels on given logits, for benchmarks/compare_samplers.py, which builds
// this as a library: they need cuRAND's headers, and mrv1 has no other use for them.
#include <cuda_runtime.h>

#include <cstdint>
#include <flashinfer/sampling.cuh>
#include <vector>

namespace {

constexpr size_t kWorkspaceBytes = size_t{16} << 20;
constexpr float kWarmMilliseconds = 100.0f;

struct Buffers {
  float* probs = nullptr;
  int32_t* tokens = nullptr;
  bool* valid = nullptr;
  void* workspace = nullptr;
  ~Buffers() {
    cudaFree(probs);
    cudaFree(tokens);
    cudaFree(valid);
    cudaFree(workspace);
  }
};

}  // namespace

// Times runs over all copies of [batch, vocab] float32 logits, each run one graph, and writes the
// seconds of a call in each of `repeats` runs, and the tokens of the last call. With top_k above 0
// the softmax at the temperature and then top_k and top_p by rejection; without, the draw from
// logits, which are taken as they are. Returns a cudaError_t.
extern "C" int flashinfer_sampler_time(const uint64_t* copies, int num_copies, int batch, int vocab,
                                       float temperature, int top_k, float top_p, int repeats,
                                       double* seconds, int32_t* tokens) {
  namespace sampling = flashinfer::sampling;
#define CHECK(call)                                \
  do {                                             \
    const cudaError_t status = (call);             \
    if (status != cudaSuccess) return (int)status; \
  } while (false)
  Buffers buffers;
  CHECK(cudaMalloc(&buffers.probs, sizeof(float) * batch * vocab));
  CHECK(cudaMalloc(&buffers.tokens, sizeof(int32_t) * batch));
  CHECK(cudaMalloc(&buffers.valid, sizeof(bool) * batch));
  CHECK(cudaMalloc(&buffers.workspace, kWorkspaceBytes));
  cudaStream_t stream;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const auto call = [&](int copy) -> cudaError_t {
    auto* logits = reinterpret_cast<float*>(copies[copy]);
    if (top_k == 0) {
      return sampling::SamplingFromLogits<float, int32_t>(
          logits, buffers.tokens, nullptr, batch, vocab, true, nullptr, 1, nullptr, copy, stream);
    }
    const cudaError_t status =
        sampling::OnlineSoftmax<float>(logits, buffers.probs, batch, vocab, nullptr, temperature,
                                       buffers.workspace, kWorkspaceBytes, true, stream);
    if (status != cudaSuccess) return status;
    return sampling::TopKTopPSamplingFromProb<float, int32_t>(
        buffers.probs, nullptr, nullptr, buffers.tokens, buffers.valid, nullptr, batch, top_k,
        top_p, vocab, true, nullptr, 1, nullptr, copy, stream);
  };
  CHECK(call(0));
  CHECK(cudaStreamSynchronize(stream));
  cudaGraph_t graph;
  cudaGraphExec_t run;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int copy = 0; copy < num_copies; ++copy) CHECK(call(copy));
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&run, graph, 0));
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  float warm = 0.0f;
  for (int done = 0; done < repeats;) {
    CHECK(cudaEventRecord(begin, stream));
    CHECK(cudaGraphLaunch(run, stream));
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    float milliseconds = 0.0f;
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    if (warm < kWarmMilliseconds) {
      warm += milliseconds;
    } else {
      seconds[done++] = 1e-3 * milliseconds / num_copies;
    }
  }
  CHECK(cudaMemcpy(tokens, buffers.tokens, sizeof(int32_t) * batch, cudaMemcpyDeviceToHost));
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(run);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
#undef CHECK
  return 0;
}
