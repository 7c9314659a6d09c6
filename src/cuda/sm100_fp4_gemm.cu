// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// The block-scaled NVFP4 product of CUTLASS for compute capability 10.0.
#include <cutlass/cutlass.h>

#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "fp4_gemm.cuh"
#include "launch.h"

namespace mrv1::cuda {
namespace {

constexpr std::string_view kOp = "linear (NVFP4, native)";

using cute::Int;
using cute::Shape;

using Operand = cutlass::nv_float4_t<cutlass::float_e2m1_t>;
using TileShape = Shape<Int<128>, Int<128>, Int<256>>;
using ClusterShape = Shape<Int<1>, Int<1>, Int<1>>;
constexpr int kOperandAlignment = 32;  // elements
constexpr int kOutAlignment = 4;

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm100, cutlass::arch::OpClassBlockScaledTensorOp, TileShape, ClusterShape,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, cutlass::layout::RowMajor,
    kOutAlignment, float, cutlass::layout::RowMajor, kOutAlignment,
    cutlass::epilogue::collective::EpilogueScheduleAuto,
    cutlass::epilogue::fusion::LinearCombination<float, float, void, float>>::CollectiveOp;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm100, cutlass::arch::OpClassBlockScaledTensorOp, Operand,
    cutlass::layout::RowMajor, kOperandAlignment, Operand, cutlass::layout::ColumnMajor,
    kOperandAlignment, float, TileShape, ClusterShape,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
        sizeof(typename Epilogue::SharedStorage))>,
    cutlass::gemm::collective::KernelScheduleAuto>::CollectiveOp;
using Kernel =
    cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue, void>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

// Of a single matrix whose rows lie so many elements apart.
template <typename Stride>
Stride stride(int64_t row) {
  return cute::make_int_tuple_from<Stride>(row, int64_t{0});
}

void check_cutlass(cutlass::Status status, const char* call) {
  if (status == cutlass::Status::kSuccess) return;
  fail(ErrorKind::kDevice, kOp, call, " failed: ", cutlassGetStatusString(status));
}

}  // namespace

void run_sm100_fp4_gemm(const Fp4Gemm& gemm, void* workspace, const StepContext& ctx) {
  const OpRange range(kOp);
  const int rows = static_cast<int>(gemm.rows);
  const int n = static_cast<int>(gemm.n);
  const int k = static_cast<int>(gemm.k);
  const auto shape = cute::make_shape(rows, n, k, 1);
  using Scales = typename Kernel::CollectiveMainloop::Sm1xxBlkScaledConfig;
  using Codes = typename Operand::DataType;
  using Scale = typename Operand::ScaleFactorType;
  typename Gemm::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      shape,
      {static_cast<const Codes*>(gemm.x), stride<typename Kernel::StrideA>(k),
       static_cast<const Codes*>(gemm.weight), stride<typename Kernel::StrideB>(k),
       static_cast<const Scale*>(gemm.x_scales), Scales::tile_atom_to_shape_SFA(shape),
       static_cast<const Scale*>(gemm.weight_scales), Scales::tile_atom_to_shape_SFB(shape)},
      {{},
       nullptr,
       stride<typename Kernel::StrideC>(gemm.out_stride),
       gemm.out,
       stride<typename Kernel::StrideD>(gemm.out_stride)}};
  arguments.epilogue.thread.alpha_ptr = gemm.scale;
  Gemm product;
  const size_t needed = Gemm::get_workspace_size(arguments);
  check_internal(needed <= kFp4GemmWorkspace, kOp, "needs ", needed, " bytes of scratch, of ",
                 kFp4GemmWorkspace);
  check_cutlass(product.can_implement(arguments), "can_implement");
  check_cutlass(product.initialize(arguments, workspace, stream_of(ctx)), "initialize");
  check_cutlass(product.run(stream_of(ctx)), "run");
  count_launch(ctx);
  check_kernel(kOp, ctx, cudaSuccess, dim3(), dim3(), 0);
}

}  // namespace mrv1::cuda
