// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "io/weight_store.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "core/error.h"
#include "ops/fill_random.h"
#include "ops/kernels.h"

namespace mrv1 {
namespace {

// Source rows are taken in pieces of about this size, so that the file's pages stay few.
constexpr int64_t kPieceBytes = int64_t{32} << 20;

constexpr size_t kAlignment = 256;
// Values that are drawn at a time where they are packed afterwards.
constexpr int64_t kRandomPiece = int64_t{1} << 22;

}  // namespace

std::vector<WeightView> stored_weights(const Program& program, WeightLayout linear_layout) {
  std::vector<WeightView> weights;
  for (const WeightSpec& spec : program.weights()) {
    weights.push_back({.dtype = spec.kind == WeightKind::kVector ? DType::kF32 : program.dtype(),
                       .rows = spec.rows,
                       .cols = spec.cols,
                       .matrices = spec.matrices});
  }
  for (const Op& op : program.ops()) {
    if (op.kind == OpKind::kLinear || op.kind == OpKind::kLinearGatedMul) {
      weights[op.weights[0]].layout = linear_layout;
    } else if (op.kind == OpKind::kMoeExperts) {
      for (const int32_t id : op.weights) weights[id].layout = linear_layout;
    }
  }
  return weights;
}

WeightStore::WeightStore(const Program& program, Device& device)
    : program_(&program),
      device_(&device),
      views_(stored_weights(program, device.kernels().linear_layout)) {
  allocate(program);
  for (size_t i = 0; i < views_.size(); ++i) {
    views_[i].data = data_[i];
    loaded_.emplace_back(program.weights()[i].segments.size(), false);
  }
}

void WeightStore::allocate(const Program& program) {
  if (device_->type() == DeviceType::kCpu) {
    for (size_t i = 0; i < views_.size(); ++i) {
      buffers_.push_back(device_->allocate(static_cast<size_t>(weight_bytes(views_[i])),
                                           concat("weight ", program.weights()[i].name)));
      data_.push_back(static_cast<char*>(buffers_.back().data()));
    }
    return;
  }
  // An allocation of a GPU is rounded up to megabytes and takes its time.
  if (views_.empty()) return;
  std::vector<size_t> offsets;
  size_t total = 0, largest = 0;
  for (size_t i = 0; i < views_.size(); ++i) {
    offsets.push_back(total);
    total +=
        (static_cast<size_t>(weight_bytes(views_[i])) + kAlignment - 1) / kAlignment * kAlignment;
    if (weight_bytes(views_[i]) > weight_bytes(views_[largest])) largest = i;
  }
  buffers_.push_back(device_->allocate(total, concat("weight ", program.weights()[largest].name,
                                                     " with ", views_.size() - 1, " others")));
  for (size_t offset : offsets) {
    data_.push_back(static_cast<char*>(buffers_.back().data()) + offset);
  }
}

void WeightStore::check_segment(int32_t weight, int32_t segment, DType source) const {
  check(weight >= 0 && weight < static_cast<int32_t>(views_.size()), "weights", "no weight ",
        weight);
  const WeightSpec& spec = program_->weights()[weight];
  check(segment >= 0 && segment < static_cast<int32_t>(spec.segments.size()), "weights", "'",
        spec.name, "' has no segment ", segment);
  if (source != DType::kF32 && source != DType::kBF16 && source != DType::kF16) {
    fail(ErrorKind::kWeights, "weights", "'", spec.segments[segment].tensor, "' is ",
         dtype_name(source), "; float32, bfloat16 and float16 can be loaded");
  }
}

char* WeightStore::row_address(int32_t weight, int64_t row) const {
  const WeightView& view = views_[weight];
  return data_[weight] + row * view.cols * static_cast<int64_t>(dtype_size(view.dtype));
}

void WeightStore::store_rows(int32_t weight, int64_t row_start, int64_t rows, const void* source,
                             DType dtype) {
  const WeightView& view = views_[weight];
  if (view.layout == WeightLayout::kPanel16) {
    // The pool is the stream's, on which other runners of the device may be at work.
    run_on_stream(*device_, [&] {
      pack_panels(view, data_[weight], source, dtype, row_start, rows, *device_->pool());
    });
    return;
  }
  const int64_t count = rows * view.cols;
  const size_t bytes = static_cast<size_t>(count) * dtype_size(view.dtype);
  const float offset = program_->weights()[weight].offset;
  if (dtype == view.dtype && offset == 0.0f) {
    device_->copy_in(row_address(weight, row_start), source, bytes);
    return;
  }
  const auto converted = std::make_unique<char[]>(bytes);
  convert_elements(source, dtype, converted.get(), view.dtype, count);
  if (offset != 0.0f) {  // a vector, in float32
    float* values = reinterpret_cast<float*>(converted.get());
    for (int64_t i = 0; i < count; ++i) values[i] += offset;
  }
  device_->copy_in(row_address(weight, row_start), converted.get(), bytes);
}

void WeightStore::load_mapped(const MappedFile& file, const TensorSource& tensor) {
  const WeightView& view = views_[tensor.weight];
  const WeightSegment& rows = program_->weights()[tensor.weight].segments[tensor.segment];
  const auto size = static_cast<int64_t>(dtype_size(tensor.dtype));
  const int64_t row_bytes = view.cols * size;
  const int64_t stride = rows.slice.cols * size;
  const size_t begin = tensor.offset + static_cast<size_t>(rows.slice.first_row * stride +
                                                           rows.slice.first_col * size);
  // Whole panels a piece, so that pieces never share one.
  const int64_t piece =
      std::max<int64_t>(kPanelRows, kPieceBytes / row_bytes / kPanelRows * kPanelRows);
  std::vector<char> aligned;
  for (int64_t row = 0; row < rows.rows; row += piece) {
    const int64_t count = std::min(piece, rows.rows - row);
    const size_t start = begin + static_cast<size_t>(row * stride);
    const auto bytes = static_cast<size_t>((count - 1) * stride + row_bytes);
    const void* mapped = file.read(start, bytes);
    // The format does not promise alignment.
    if (start % static_cast<size_t>(size) != 0 || stride != row_bytes) {
      aligned.resize(static_cast<size_t>(count * row_bytes));
      for (int64_t i = 0; i < count; ++i) {
        std::memcpy(aligned.data() + i * row_bytes, static_cast<const char*>(mapped) + i * stride,
                    static_cast<size_t>(row_bytes));
      }
      mapped = aligned.data();
    }
    store_rows(tensor.weight, rows.row_start + row, count, mapped, tensor.dtype);
    file.drop(start, bytes);
  }
}

void WeightStore::load_staged(const MappedFile& file, std::span<const TensorSource> tensors,
                              const std::function<void(size_t)>& progress) {
  std::vector<StagedTensor> staged;
  for (const TensorSource& tensor : tensors) {
    const WeightView& view = views_[tensor.weight];
    const WeightSegment& rows = program_->weights()[tensor.weight].segments[tensor.segment];
    check_internal(view.layout == WeightLayout::kRowMajor, "weights",
                   "only weights that are stored by rows can be staged");
    const int64_t first = rows.slice.first_row * rows.slice.cols + rows.slice.first_col;
    staged.push_back({&file, tensor.offset + static_cast<size_t>(first) * dtype_size(tensor.dtype),
                      tensor.dtype, row_address(tensor.weight, rows.row_start), view.dtype,
                      rows.rows * view.cols, view.cols, rows.slice.cols});
  }
  if (staged_ == nullptr) {
    int64_t largest = 0;
    for (const WeightView& view : views_) largest = std::max(largest, weight_bytes(view));
    staged_ = std::make_unique<StagedCopy>(*device_, static_cast<size_t>(largest));
  }
  staged_->copy(staged, progress);
}

void WeightStore::load(const MappedFile& file, std::span<const TensorSource> tensors,
                       const std::function<void(size_t)>& progress) {
  for (const TensorSource& tensor : tensors) {
    check_segment(tensor.weight, tensor.segment, tensor.dtype);
  }
  // Copies that are staged do not touch values; those few that an offset is added to go alone.
  std::vector<TensorSource> staged, alone;
  for (const TensorSource& tensor : tensors) {
    const bool plain = program_->weights()[tensor.weight].offset == 0.0f;
    (device_->type() != DeviceType::kCpu && plain ? staged : alone).push_back(tensor);
  }
  if (!staged.empty()) load_staged(file, staged, progress);
  for (const TensorSource& tensor : staged) loaded_[tensor.weight][tensor.segment] = true;
  for (const TensorSource& tensor : alone) {
    load_mapped(file, tensor);
    const int64_t rows = program_->weights()[tensor.weight].segments[tensor.segment].rows;
    progress(static_cast<size_t>(rows * views_[tensor.weight].cols) * dtype_size(tensor.dtype));
    loaded_[tensor.weight][tensor.segment] = true;
  }
}

void WeightStore::load_segment(int32_t weight, int32_t segment, const void* data, DType source) {
  check_segment(weight, segment, source);
  const WeightSegment& rows = program_->weights()[weight].segments[segment];
  store_rows(weight, rows.row_start, rows.rows, data, source);
  loaded_[weight][segment] = true;
}

void WeightStore::fill_random(int32_t weight, uint64_t seed, float range) {
  check(weight >= 0 && weight < static_cast<int32_t>(views_.size()), "weights", "no weight ",
        weight);
  const WeightView& view = views_[weight];
  const bool vector = program_->weights()[weight].kind == WeightKind::kVector;
  FillRandomParams params{};
  params.key = seed ^ (static_cast<uint64_t>(weight) << 40);
  params.center = vector ? 1.0f : 0.0f;
  params.width = vector ? 0.1f : range;
  if (program_->is_route_bias(weight)) params.center = params.width = 0.0f;
  if (view.layout == WeightLayout::kRowMajor) {
    params.data = data_[weight];
    params.dtype = view.dtype;
    params.count = view.rows * view.cols;
    mrv1::fill_random(*device_, params);
  } else {
    const int64_t piece =
        std::max<int64_t>(kPanelRows, kRandomPiece / view.cols / kPanelRows * kPanelRows);
    std::vector<BFloat16> rows(static_cast<size_t>(std::min(piece, view.rows) * view.cols));
    for (int64_t row = 0; row < view.rows; row += piece) {
      params.data = rows.data();
      params.dtype = DType::kBF16;
      params.first = static_cast<uint64_t>(row * view.cols);
      params.count = std::min(piece, view.rows - row) * view.cols;
      mrv1::fill_random(*device_, params);
      store_rows(weight, row, params.count / view.cols, rows.data(), DType::kBF16);
    }
  }
  loaded_[weight].assign(loaded_[weight].size(), true);
}

void WeightStore::check_complete() {
  staged_.reset();
  for (size_t i = 0; i < loaded_.size(); ++i) {
    for (size_t k = 0; k < loaded_[i].size(); ++k) {
      if (!loaded_[i][k]) {
        fail(ErrorKind::kWeights, "weights", "tensor '", program_->weights()[i].segments[k].tensor,
             "' was not loaded");
      }
    }
  }
}

}  // namespace mrv1
