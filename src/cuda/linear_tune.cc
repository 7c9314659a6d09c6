// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Measures the ways to compute a linear and keeps the fastest. Each is timed as it runs in a step:
// many of them in one captured graph, on weights that do not fit the L2 cache together.
#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include "launch.h"
#include "linear_context.h"

namespace mrv1::cuda {
namespace {

constexpr std::string_view kOp = "linear tuning";
constexpr int kHeuristics = 16;
// Many times the L2 cache: a step reads all weights of a model, so that nothing of the last one is
// left in caches.
constexpr int64_t kRotatedBytes = int64_t{1} << 30;
constexpr int kMaxCalls = 64;  // of a graph
constexpr int kRuns = 3;
// The best go through a final in turns, so that a clock that falls while it gets warm slows them
// all.
constexpr size_t kFinalists = 4;
constexpr int kRounds = 5;

template <typename T, size_t kSize>
T median(std::array<T, kSize> values) {
  std::nth_element(values.begin(), values.begin() + kSize / 2, values.end());
  return values[kSize / 2];
}

// Owns what a measurement needs besides the operands. Freed by the destructor.
class Scratch {
 public:
  Scratch() {
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), kOp,
               "cudaStreamCreateWithFlags");
    check_cuda(cudaEventCreate(&start), kOp, "cudaEventCreate");
    check_cuda(cudaEventCreate(&end), kOp, "cudaEventCreate");
  }
  ~Scratch() {
    cudaStreamSynchronize(stream);
    if (data != nullptr) cudaFree(data);
    if (start != nullptr) cudaEventDestroy(start);
    if (end != nullptr) cudaEventDestroy(end);
    cudaStreamDestroy(stream);
    cudaGetLastError();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // False if there is not so much memory.
  bool allocate(int64_t bytes) {
    if (cudaMalloc(&data, static_cast<size_t>(bytes)) == cudaSuccess) return true;
    cudaGetLastError();
    data = nullptr;
    return false;
  }

  cudaStream_t stream = nullptr;
  cudaEvent_t start = nullptr, end = nullptr;
  void* data = nullptr;
};

// Fills `to` with the bytes of `from`, over and over.
void fill(char* to, int64_t bytes, const void* from, int64_t from_bytes, cudaStream_t stream) {
  for (int64_t at = 0; at < bytes; at += from_bytes) {
    check_cuda(cudaMemcpyAsync(to + at, from, static_cast<size_t>(std::min(from_bytes, bytes - at)),
                               cudaMemcpyDeviceToDevice, stream),
               kOp, "cudaMemcpyAsync");
  }
}

// `calls` calls call(i), captured from the scratch stream into one graph.
class Repeated {
 public:
  template <typename Call>
  Repeated(const Scratch& scratch, int calls, const Call& call)
      : scratch_(&scratch), calls_(calls) {
    call(0);  // what is loaded on first use is not measured
    check_cuda(cudaStreamSynchronize(scratch.stream), kOp, "cudaStreamSynchronize");
    check_cuda(cudaStreamBeginCapture(scratch.stream, cudaStreamCaptureModeThreadLocal), kOp,
               "cudaStreamBeginCapture");
    cudaGraph_t graph = nullptr;
    try {
      for (int i = 0; i < calls; ++i) call(i);
    } catch (...) {
      cudaStreamEndCapture(scratch.stream, &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      throw;
    }
    check_cuda(cudaStreamEndCapture(scratch.stream, &graph), kOp, "cudaStreamEndCapture");
    cudaGraphExec_t executable = nullptr;
    const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
    cudaGraphDestroy(graph);
    check_cuda(status, kOp, "cudaGraphInstantiate");
    executable_.reset(executable);
  }
  // Microseconds of one call, the first run aside.
  double measure() const {
    std::array<float, kRuns> times{};
    for (int run = -1; run < kRuns; ++run) {
      check_cuda(cudaEventRecord(scratch_->start, scratch_->stream), kOp, "cudaEventRecord");
      check_cuda(cudaGraphLaunch(executable_.get(), scratch_->stream), kOp, "cudaGraphLaunch");
      check_cuda(cudaEventRecord(scratch_->end, scratch_->stream), kOp, "cudaEventRecord");
      check_cuda(cudaEventSynchronize(scratch_->end), kOp, "a measured kernel");
      float milliseconds = 0;
      check_cuda(cudaEventElapsedTime(&milliseconds, scratch_->start, scratch_->end), kOp,
                 "cudaEventElapsedTime");
      if (run >= 0) times[static_cast<size_t>(run)] = milliseconds;
    }
    return 1e3 * median(times) / calls_;
  }

 private:
  struct Destroy {
    void operator()(cudaGraphExec_t executable) const { cudaGraphExecDestroy(executable); }
  };

  const Scratch* scratch_;
  int calls_;
  std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, Destroy> executable_;
};

struct Candidate {
  LinearConfig config;
  LinearPlan plan;
  Repeated calls;
  double time;
};

// One write, so that several processes may add to the same file.
void append_lines(const std::string& path, const std::string& lines) {
  std::error_code error;
  std::filesystem::create_directories(std::filesystem::path(path).parent_path(), error);
  std::ofstream file(path, std::ios::app);
  file << lines << std::flush;
  if (!file) fail(ErrorKind::kInvalidArgument, kOp, "cannot write to ", path);
}

}  // namespace

std::vector<LinearConfig> LinearContext::candidates(const LinearParams& params, int64_t rows,
                                                    const StepContext& ctx) const {
  std::vector<LinearConfig> configs;
  const WeightView& weight = params.weight;
  if (skinny_supports(params, rows)) {
    for (const SkinnyConfig& skinny :
         skinny_configs(rows, weight.rows, weight.cols, params.gated())) {
      configs.push_back({LinearKind::kSkinny, skinny, {}});
    }
  }
  const CublasLtSteps steps = cublaslt_steps(params, rows, ctx);
  if (library_ != nullptr && steps.piece_rows > 0) {
    std::array<cublasLtMatmulHeuristicResult_t, kHeuristics> results;
    const CublasLtProduct product(*library_, weight.rows, weight.cols, rows, params.dtype,
                                  steps.product_dtype, steps.epilogue_bias, weight.rows, false);
    const int found = product.heuristics(handle_, static_cast<size_t>(kCublasLtWorkspace), 16,
                                         kHeuristics, results.data());
    for (int i = 0; i < found; ++i) {
      configs.push_back({LinearKind::kCublasLt, {}, product.config(results[i].algo)});
    }
  }
  // The tiled kernel is hopeless for all but the smallest.
  if (configs.empty() || params.dtype == DType::kF32) configs.emplace_back();
  return configs;
}

bool LinearContext::tune(const LinearParams& params, const LinearShape& shape, int64_t rows,
                         const StepContext& ctx, LinearPlan* plan) {
  const WeightView& weight = params.weight;
  const std::vector<LinearConfig> configs = candidates(params, rows, ctx);
  check_cuda(cudaStreamSynchronize(stream_of(ctx)), kOp, "cudaStreamSynchronize");
  Scratch scratch;
  const int64_t bytes = (weight_bytes(weight) + 255) / 256 * 256;
  const int64_t x_bytes = rows * weight.cols * static_cast<int64_t>(dtype_size(params.dtype));
  int64_t copies = std::min<int64_t>(kRotatedBytes / bytes, kMaxCalls);
  // As many copies as there is memory for.
  while (!scratch.allocate(copies * bytes + x_bytes)) {
    if (copies == 0) return false;
    copies /= 2;
  }
  for (int64_t i = 0; i < copies; ++i) {
    fill(static_cast<char*>(scratch.data) + i * bytes, weight_bytes(weight), weight.data,
         weight_bytes(weight), scratch.stream);
  }
  // Activations of random bits, as weights are: how fast a product runs depends on its operands.
  char* x = static_cast<char*>(scratch.data) + copies * bytes;
  fill(x, x_bytes, weight.data, weight_bytes(weight), scratch.stream);

  StepContext own = ctx;
  own.stream = scratch.stream;
  own.sync_launches = false;
  LinearParams call = params;
  call.x = x;
  const double work = 2.0 * static_cast<double>(rows * weight.rows) * weight.cols;
  const int calls = work > 1e11 ? 3 : static_cast<int>(std::clamp<int64_t>(copies, 4, kMaxCalls));
  std::vector<Candidate> timed;
  for (const LinearConfig& config : configs) {
    LinearPlan candidate;
    if (!make_plan(params, config, rows, ctx, &candidate)) continue;
    Repeated repeated(scratch, calls, [&](int i) {
      if (copies > 0) {
        call.weight.data = static_cast<char*>(scratch.data) + i % copies * bytes;
      }
      run_linear(call, rows, candidate, *this, own);
    });
    const double time = repeated.measure();
    timed.push_back({config, candidate, std::move(repeated), time});
  }
  if (timed.empty()) return false;
  std::string lines;  // every way that was tried, as comments, and then the fastest
  for (const Candidate& candidate : timed) {
    lines += "# " + LinearTable::line(shape, candidate.config, candidate.time) + "\n";
  }
  const auto faster = [](const Candidate& a, const Candidate& b) { return a.time < b.time; };
  std::sort(timed.begin(), timed.end(), faster);
  timed.erase(timed.begin() + static_cast<int64_t>(std::min(kFinalists, timed.size())),
              timed.end());
  std::vector<std::array<double, kRounds>> finals(timed.size());
  for (size_t round = 0; round < kRounds; ++round) {
    for (size_t i = 0; i < timed.size(); ++i) finals[i][round] = timed[i].calls.measure();
  }
  for (size_t i = 0; i < timed.size(); ++i) timed[i].time = median(finals[i]);
  const auto best = std::min_element(timed.begin(), timed.end(), faster);
  *plan = best->plan;
  lines += LinearTable::line(shape, best->config, best->time) + "\n";
  append_lines(tuned_path_, lines);
  tuned_.set(shape, best->config);
  table_.set(shape, best->config);
  return true;
}

}  // namespace mrv1::cuda
