// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "io/weight_store.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "core/error.h"
#include "ops/kernels.h"

namespace mrv1 {
namespace {

// Source rows are taken in pieces of about this size, so that the file's pages stay few.
constexpr int64_t kPieceBytes = int64_t{32} << 20;

float load_element(const void* source, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kF32:
      return static_cast<const float*>(source)[index];
    case DType::kBF16:
      return to_float(static_cast<const BFloat16*>(source)[index]);
    default:
      return to_float(static_cast<const Float16*>(source)[index]);
  }
}

// splitmix64: a counter hash, enough for weights whose values do not matter.
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

std::vector<WeightView> stored_weights(const Program& program, WeightLayout linear_layout) {
  std::vector<WeightView> weights;
  for (const WeightSpec& spec : program.weights()) {
    weights.push_back({.dtype = spec.kind == WeightKind::kVector ? DType::kF32 : program.dtype(),
                       .rows = spec.rows,
                       .cols = spec.cols});
  }
  for (const Op& op : program.ops()) {
    if (op.kind == OpKind::kLinear || op.kind == OpKind::kLinearSiluMul) {
      weights[op.weights[0]].layout = linear_layout;
    }
  }
  return weights;
}

WeightStore::WeightStore(const Program& program, Device& device)
    : program_(&program),
      device_(&device),
      views_(stored_weights(program, device.kernels().linear_layout)) {
  for (size_t i = 0; i < views_.size(); ++i) {
    const WeightSpec& spec = program.weights()[i];
    buffers_.push_back(
        device.allocate(static_cast<size_t>(weight_bytes(views_[i])), "weight " + spec.name));
    views_[i].data = buffers_[i].data();
    loaded_.emplace_back(spec.segments.size(), false);
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

void WeightStore::store_rows(int32_t weight, int64_t row_start, int64_t rows, const void* source,
                             DType dtype) {
  const WeightView& view = views_[weight];
  if (view.layout == WeightLayout::kPanel16) {
    // The pool is the stream's, on which other runners of the device may be at work.
    run_on_stream(*device_, [&] {
      pack_panels(view, buffers_[weight].data(), source, dtype, row_start, rows, *device_->pool());
    });
    return;
  }
  const int64_t count = rows * view.cols;
  char* target = static_cast<char*>(buffers_[weight].data()) +
                 row_start * view.cols * static_cast<int64_t>(dtype_size(view.dtype));
  if (dtype == view.dtype) {
    device_->copy_in(target, source, static_cast<size_t>(count) * dtype_size(dtype));
    return;
  }
  const auto converted = std::make_unique<char[]>(count * dtype_size(view.dtype));
  if (view.dtype == DType::kF32) {
    auto* out = reinterpret_cast<float*>(converted.get());
    for (int64_t i = 0; i < count; ++i) out[i] = load_element(source, dtype, i);
  } else {
    auto* out = reinterpret_cast<BFloat16*>(converted.get());
    for (int64_t i = 0; i < count; ++i) {
      out[i] = from_float<BFloat16>(load_element(source, dtype, i));
    }
  }
  device_->copy_in(target, converted.get(), static_cast<size_t>(count) * dtype_size(view.dtype));
}

void WeightStore::load_segment(int32_t weight, int32_t segment, const MappedFile& file,
                               size_t offset, DType source) {
  check_segment(weight, segment, source);
  const WeightView& view = views_[weight];
  const WeightSegment& rows = program_->weights()[weight].segments[segment];
  const int64_t row_bytes = view.cols * static_cast<int64_t>(dtype_size(source));
  // Whole panels a piece, so that pieces never share one.
  const int64_t piece =
      std::max<int64_t>(kPanelRows, kPieceBytes / row_bytes / kPanelRows * kPanelRows);
  std::vector<char> aligned;
  for (int64_t row = 0; row < rows.rows; row += piece) {
    const int64_t count = std::min(piece, rows.rows - row);
    const size_t start = offset + static_cast<size_t>(row * row_bytes);
    const size_t bytes = static_cast<size_t>(count * row_bytes);
    const void* mapped = file.read(start, bytes);
    if (start % dtype_size(source) != 0) {  // the format does not promise alignment
      aligned.resize(bytes);
      std::memcpy(aligned.data(), mapped, bytes);
      mapped = aligned.data();
    }
    store_rows(weight, rows.row_start + row, count, mapped, source);
    file.drop(start, bytes);
  }
  loaded_[weight][segment] = true;
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
  const int64_t piece =
      std::max<int64_t>(kPanelRows, (int64_t{1} << 22) / view.cols / kPanelRows * kPanelRows);
  std::vector<BFloat16> rows(static_cast<size_t>(std::min(piece, view.rows) * view.cols));
  for (int64_t row = 0; row < view.rows; row += piece) {
    const int64_t count = std::min(piece, view.rows - row) * view.cols;
    const auto fill = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const uint64_t word = mix(seed ^ (static_cast<uint64_t>(weight) << 40) ^
                                  static_cast<uint64_t>(row * view.cols + i));
        const float unit = static_cast<float>(static_cast<int64_t>(word) >> 40) * 0x1p-23f;
        rows[i] = from_float<BFloat16>(vector ? 1.0f + 0.1f * unit : range * unit);
      }
    };
    if (device_->pool() != nullptr) {
      run_on_stream(*device_, [&] {
        device_->pool()->parallel_for(count, 1 << 16,
                                      [&](int64_t begin, int64_t end, int) { fill(begin, end); });
      });
    } else {
      fill(0, count);
    }
    store_rows(weight, row, count / view.cols, rows.data(), DType::kBF16);
  }
  loaded_[weight].assign(loaded_[weight].size(), true);
}

void WeightStore::check_complete() const {
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
