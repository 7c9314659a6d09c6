// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "cublaslt.h"

#include <dlfcn.h>

#include <algorithm>
#include <memory>
#include <mutex>

#include "core/error.h"
#include "ops/linear_options.h"

namespace mrv1::cuda {
namespace {

constexpr std::string_view kWhere = "cuBLASLt";

std::string version_text(size_t version) {
  return concat(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

template <typename Function>
bool load(void* library, const char* symbol, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, symbol));
  return function != nullptr;
}

// Fills in the library called `name`; returns what is wrong with it, or nothing.
std::string try_open(const std::string& name, CublasLt& lt) {
  void* library = dlopen(name.c_str(), RTLD_LOCAL | RTLD_NOW);
  if (library == nullptr) {
    const char* error = dlerror();
    return error != nullptr ? error : "dlopen failed";
  }
  const bool complete =
      load(library, "cublasLtCreate", lt.create) && load(library, "cublasLtDestroy", lt.destroy) &&
      load(library, "cublasLtGetVersion", lt.get_version) &&
      load(library, "cublasLtGetStatusName", lt.get_status_name) &&
      load(library, "cublasLtMatmul", lt.matmul) &&
      load(library, "cublasLtMatmulDescInit_internal", lt.desc_init) &&
      load(library, "cublasLtMatmulDescSetAttribute", lt.desc_set) &&
      load(library, "cublasLtMatrixLayoutInit_internal", lt.layout_init) &&
      load(library, "cublasLtMatmulPreferenceInit_internal", lt.preference_init) &&
      load(library, "cublasLtMatmulPreferenceSetAttribute", lt.preference_set) &&
      load(library, "cublasLtMatmulAlgoGetHeuristic", lt.get_heuristic) &&
      load(library, "cublasLtMatmulAlgoCheck", lt.algo_check) &&
      load(library, "cublasLtMatmulAlgoInit", lt.algo_init) &&
      load(library, "cublasLtMatmulAlgoConfigGetAttribute", lt.algo_get) &&
      load(library, "cublasLtMatmulAlgoConfigSetAttribute", lt.algo_set);
  std::string problem;
  if (!complete) {
    problem = "it lacks functions of cuBLASLt " + std::to_string(CUBLAS_VER_MAJOR);
  } else if (lt.get_version() / 10000 != CUBLAS_VER_MAJOR) {
    // Structures that are passed by the caller change between major versions.
    problem = concat("it is version ", version_text(lt.get_version()), ", not ", CUBLAS_VER_MAJOR);
  }
  if (!problem.empty()) {
    dlclose(library);
    return problem;
  }
  lt.name = name;
  lt.version = version_text(lt.get_version());
  return "";
}

cudaDataType_t data_type(DType dtype) { return dtype == DType::kF32 ? CUDA_R_32F : CUDA_R_16BF; }

struct Attribute {
  cublasLtMatmulAlgoConfigAttributes_t name;
  size_t bytes;
};
constexpr Attribute kAttributes[CublasLtConfig::kSize] = {
    {CUBLASLT_ALGO_CONFIG_ID, 4},
    {CUBLASLT_ALGO_CONFIG_TILE_ID, 4},
    {CUBLASLT_ALGO_CONFIG_SPLITK_NUM, 4},
    {CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, 4},
    {CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING, 4},
    {CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, 4},
    {CUBLASLT_ALGO_CONFIG_STAGES_ID, 4},
    {CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID, 2},
    {CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, 2},
};

}  // namespace

void CublasLt::check_status(cublasStatus_t status, std::string_view call) const {
  if (status == CUBLAS_STATUS_SUCCESS) [[likely]] {
    return;
  }
  fail(ErrorKind::kDevice, kWhere, call, " failed: ", get_status_name(status));
}

std::string describe_cublaslt(const std::vector<std::string>& libraries) {
  const CublasLt& library = open_cublaslt(libraries);
  return concat(library.version, " (", library.name, ")");
}

const CublasLt& open_cublaslt(const std::vector<std::string>& libraries) {
  // Where the loader looks, if nobody says more.
  const std::vector<std::string> names =
      libraries.empty() ? std::vector<std::string>{"libcublasLt.so.13"} : libraries;
  // Never closed: a library with threads and state of its own cannot be unloaded safely.
  static std::mutex mutex;
  static std::unique_ptr<const CublasLt> opened;
  const std::lock_guard lock(mutex);
  if (opened != nullptr) return *opened;
  std::string tried;
  for (const std::string& name : names) {
    auto library = std::make_unique<CublasLt>();
    const std::string problem = try_open(name, *library);
    if (problem.empty()) {
      opened = std::move(library);
      return *opened;
    }
    tried += concat("\n  ", name, ": ", problem);
  }
  fail(ErrorKind::kDevice, kWhere, "the library was not found; tried:", tried,
       "\nInstall the package nvidia-cublas of CUDA ", CUBLAS_VER_MAJOR,
       ", give the library's path in MRV1_CUBLASLT, or set MRV1_CUBLASLT=none to run without it");
}

// Row-major [r, c] is column-major [c, r]: out^T = weight x^T, where the weight is the transpose of
// what cuBLASLt sees.
CublasLtProduct::CublasLtProduct(const CublasLt& library, int64_t n, int64_t k, int64_t rows,
                                 DType dtype, DType out_dtype, const float* bias,
                                 int64_t out_stride, bool scaled)
    : library_(library), dtype_(data_type(dtype)), out_dtype_(data_type(out_dtype)) {
  // Sums in float32, also those of float32 operands: no TF32.
  library_.check_status(library_.desc_init(&desc_, sizeof(desc_), CUBLAS_COMPUTE_32F, CUDA_R_32F),
                        "cublasLtMatmulDescInit");
  const auto set = [&](cublasLtMatmulDescAttributes_t which, const auto& value) {
    library_.check_status(library_.desc_set(&desc_, which, &value, sizeof(value)),
                          "cublasLtMatmulDescSetAttribute");
  };
  const int32_t transpose = CUBLAS_OP_T;
  set(CUBLASLT_MATMUL_DESC_TRANSA, transpose);
  if (bias != nullptr) {
    const uint32_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
    set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
  }
  if (scaled) {
    const int32_t mode = CUBLASLT_POINTER_MODE_DEVICE;
    set(CUBLASLT_MATMUL_DESC_POINTER_MODE, mode);
  }
  const auto describe = [&](cublasLtMatrixLayoutOpaque_t& layout, cudaDataType_t type,
                            int64_t height, int64_t width, int64_t stride) {
    library_.check_status(
        library_.layout_init(&layout, sizeof(layout), type, static_cast<uint64_t>(height),
                             static_cast<uint64_t>(width), stride),
        "cublasLtMatrixLayoutInit");
  };
  describe(weight_, dtype_, k, n, k);
  describe(x_, dtype_, k, rows, k);
  describe(out_, out_dtype_, n, rows, out_stride);
}

void CublasLtProduct::set_processors(int32_t count) {
  library_.check_status(
      library_.desc_set(&desc_, CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET, &count, sizeof(count)),
      "cublasLtMatmulDescSetAttribute");
}

int CublasLtProduct::heuristics(cublasLtHandle_t handle, size_t workspace_bytes, int64_t alignment,
                                int count, cublasLtMatmulHeuristicResult_t* results) const {
  cublasLtMatmulPreferenceOpaque_t preference;
  library_.check_status(library_.preference_init(&preference, sizeof(preference)),
                        "cublasLtMatmulPreferenceInit");
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t which, const auto& value) {
    library_.check_status(library_.preference_set(&preference, which, &value, sizeof(value)),
                          "cublasLtMatmulPreferenceSetAttribute");
  };
  const uint64_t workspace = workspace_bytes;
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace);
  const uint32_t bytes = static_cast<uint32_t>(alignment);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, bytes);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, bytes);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, bytes);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, bytes);
  int found = 0;
  const cublasStatus_t status =
      library_.get_heuristic(handle, desc(this), layout(weight_), layout(x_), layout(out_),
                             layout(out_), &preference, count, results, &found);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED) return 0;
  library_.check_status(status, "cublasLtMatmulAlgoGetHeuristic");
  const auto refused = [](const cublasLtMatmulHeuristicResult_t& result) {
    return result.state != CUBLAS_STATUS_SUCCESS;
  };
  return static_cast<int>(std::remove_if(results, results + found, refused) - results);
}

bool CublasLtProduct::supports(cublasLtHandle_t handle, const cublasLtMatmulAlgo_t& algo,
                               size_t workspace_bytes) const {
  cublasLtMatmulHeuristicResult_t result;
  const cublasStatus_t status = library_.algo_check(handle, desc(this), layout(weight_), layout(x_),
                                                    layout(out_), layout(out_), &algo, &result);
  return status == CUBLAS_STATUS_SUCCESS && result.workspaceSize <= workspace_bytes;
}

bool CublasLtProduct::algorithm(cublasLtHandle_t handle, const CublasLtConfig& config,
                                cublasLtMatmulAlgo_t* algo) const {
  if (library_.algo_init(handle, CUBLAS_COMPUTE_32F, CUDA_R_32F, dtype_, dtype_, out_dtype_,
                         out_dtype_, config.values[0], algo) != CUBLAS_STATUS_SUCCESS) {
    return false;
  }
  for (int i = 1; i < CublasLtConfig::kSize; ++i) {
    // The narrow ones are the low bytes of an int32.
    if (library_.algo_set(algo, kAttributes[i].name, &config.values[i], kAttributes[i].bytes) !=
        CUBLAS_STATUS_SUCCESS) {
      return false;
    }
  }
  return true;
}

CublasLtConfig CublasLtProduct::config(const cublasLtMatmulAlgo_t& algo) const {
  CublasLtConfig config;
  for (int i = 0; i < CublasLtConfig::kSize; ++i) {
    size_t written = 0;
    library_.check_status(library_.algo_get(&algo, kAttributes[i].name, &config.values[i],
                                            kAttributes[i].bytes, &written),
                          "cublasLtMatmulAlgoConfigGetAttribute");
  }
  return config;
}

cublasStatus_t CublasLtProduct::run(cublasLtHandle_t handle, const cublasLtMatmulAlgo_t& algo,
                                    const void* weight, const void* x, void* out, void* workspace,
                                    size_t workspace_bytes, cudaStream_t stream, const float* scale,
                                    const float* zero) const {
  const float host_one = 1.0f, host_zero = 0.0f;
  return library_.matmul(handle, desc(this), scale != nullptr ? scale : &host_one, weight,
                         layout(weight_), x, layout(x_), zero != nullptr ? zero : &host_zero, out,
                         layout(out_), out, layout(out_), &algo, workspace, workspace_bytes,
                         stream);
}

}  // namespace mrv1::cuda
