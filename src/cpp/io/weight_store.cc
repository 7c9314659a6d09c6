// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "io/weight_store.h"

#include <algorithm>
#include <cmath>
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

// Values that are drawn at a time where they are packed afterwards.
constexpr int64_t kRandomPiece = int64_t{1} << 22;
// Random block scales of NVFP4, and the root of the mean square of a random code times one of them.
constexpr float kRandomScaleCenter = 0.75f, kRandomScaleWidth = 0.25f;
constexpr float kRandomDeviation = 2.2349f;

constexpr uint8_t part_bit(TensorPart part) {
  return static_cast<uint8_t>(1 << static_cast<int>(part));
}

uint8_t all_parts(const WeightSpec& spec) {
  uint8_t bits = part_bit(TensorPart::kElements);
  if (spec.format == WeightFormat::kNvfp4) {
    bits |= part_bit(TensorPart::kBlockScales) | part_bit(TensorPart::kGlobalScale) |
            part_bit(TensorPart::kInputScale);
  }
  return bits;
}

// The rows of a segment in its tensor, counted in what is stored one behind the other: elements,
// pairs of codes, or block scales.
struct SourceRows {
  int64_t first, cols, stride;
};

int64_t cols_per_unit(const WeightView& view, TensorPart part) {
  if (part == TensorPart::kBlockScales) return kFp4Block;
  return view.dtype == DType::kE2M1 ? 2 : 1;
}

SourceRows source_rows(const WeightView& view, const TensorSlice& slice, TensorPart part) {
  const int64_t unit = cols_per_unit(view, part);
  return {(slice.first_row * slice.cols + slice.first_col) / unit, view.cols / unit,
          slice.cols / unit};
}

// Until all of it is there, if that is not how it is read.
bool lies_by_rows(const WeightView& view) { return view.layout != WeightLayout::kPanel16; }

bool is_scalar(TensorPart part) {
  return part == TensorPart::kGlobalScale || part == TensorPart::kInputScale;
}

}  // namespace

std::vector<WeightView> stored_weights(const Program& program, const Kernels& kernels) {
  std::vector<WeightView> weights;
  for (const WeightSpec& spec : program.weights()) {
    weights.push_back({.dtype = spec.kind == WeightKind::kVector ? DType::kF32 : program.dtype(),
                       .rows = spec.rows,
                       .cols = spec.cols,
                       .matrices = spec.matrices});
    if (spec.format == WeightFormat::kNvfp4) {
      weights.back().dtype = DType::kE2M1;
      weights.back().layout = kernels.fp4_layout;
    }
  }
  const auto is_multiplied = [&](int32_t id) {
    if (weights[id].dtype != DType::kE2M1) weights[id].layout = kernels.linear_layout;
  };
  for (const Op& op : program.ops()) {
    if (op.kind == OpKind::kLinear || op.kind == OpKind::kLinearGatedMul ||
        op.kind == OpKind::kRouter) {
      is_multiplied(op.weights[0]);
    } else if (op.kind == OpKind::kMoeExperts) {
      for (const int32_t id : op.weights) is_multiplied(id);
    }
  }
  return weights;
}

WeightStore::WeightStore(const Program& program, Device& device)
    : program_(&program),
      device_(&device),
      views_(stored_weights(program, device.kernels())),
      input_scales_(views_.size()),
      scale_runs_(views_.size()),
      packed_(views_.size(), false) {
  allocate(program);
  for (size_t i = 0; i < views_.size(); ++i) {
    views_[i] = placed(views_[i], data_[i]);
    if (views_[i].matrices == 1) views_[i].scale_runs = &scale_runs_[i];
    global_scales_.emplace_back(program.weights()[i].segments.size(), 0.0f);
    loaded_.emplace_back(program.weights()[i].segments.size(), uint8_t{0});
  }
}

void WeightStore::allocate(const Program& program) {
  if (device_->type() == DeviceType::kCpu) {
    for (size_t i = 0; i < views_.size(); ++i) {
      buffers_.push_back(device_->allocate(static_cast<size_t>(weight_parts(views_[i]).bytes),
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
    const int64_t bytes = weight_parts(views_[i]).bytes;
    total +=
        static_cast<size_t>((bytes + kWeightAlignment - 1) / kWeightAlignment * kWeightAlignment);
    if (weight_bytes(views_[i]) > weight_bytes(views_[largest])) largest = i;
  }
  buffers_.push_back(device_->allocate(total, concat("weight ", program.weights()[largest].name,
                                                     " with ", views_.size() - 1, " others")));
  for (size_t offset : offsets) {
    data_.push_back(static_cast<char*>(buffers_.back().data()) + offset);
  }
}

void WeightStore::check_segment(const TensorSource& tensor) const {
  check(tensor.weight >= 0 && tensor.weight < static_cast<int32_t>(views_.size()), "weights",
        "no weight ", tensor.weight);
  const WeightSpec& spec = program_->weights()[tensor.weight];
  check(tensor.segment >= 0 && tensor.segment < static_cast<int32_t>(spec.segments.size()),
        "weights", "'", spec.name, "' has no segment ", tensor.segment);
  check((all_parts(spec) & part_bit(tensor.part)) != 0, "weights", "'", spec.name,
        "' is not NVFP4 and has no scales");
  const std::string& name = spec.segments[tensor.segment].tensor;
  const auto expect = [&](DType dtype) {
    if (tensor.dtype == dtype) return;
    fail(ErrorKind::kWeights, "weights", "'", name, "' is ", dtype_name(tensor.dtype), ", must be ",
         dtype_name(dtype), " in NVFP4");
  };
  if (is_scalar(tensor.part)) return expect(DType::kF32);
  if (tensor.part == TensorPart::kBlockScales) return expect(DType::kE4M3);
  if (spec.format == WeightFormat::kNvfp4) return expect(DType::kE2M1);
  if (tensor.dtype != DType::kF32 && tensor.dtype != DType::kBF16 && tensor.dtype != DType::kF16) {
    fail(ErrorKind::kWeights, "weights", "'", name, "' is ", dtype_name(tensor.dtype),
         "; float32, bfloat16 and float16 can be loaded");
  }
}

const WeightSegment& WeightStore::segment(const TensorSource& tensor) const {
  return program_->weights()[tensor.weight].segments[tensor.segment];
}

void WeightStore::mark_loaded(const TensorSource& tensor) {
  loaded_[tensor.weight][tensor.segment] |= part_bit(tensor.part);
}

char* WeightStore::row_address(int32_t weight, TensorPart part, int64_t row) const {
  const WeightView& view = views_[weight];
  const int64_t units = row * (view.cols / cols_per_unit(view, part));
  if (part == TensorPart::kBlockScales) return data_[weight] + weight_parts(view).scales + units;
  return data_[weight] + units * static_cast<int64_t>(dtype_size(view.dtype));
}

void WeightStore::store_scale(const TensorSource& tensor, float scale) {
  const WeightSegment& rows = segment(tensor);
  if (!std::isfinite(scale) || scale < 0.0f) {
    fail(ErrorKind::kWeights, "weights", "the ",
         tensor.part == TensorPart::kGlobalScale ? "global scale" : "scale of activations", " of '",
         rows.tensor, "' is ", scale, ", must be finite and not negative");
  }
  char* const data = data_[tensor.weight];
  const WeightParts parts = weight_parts(views_[tensor.weight]);
  if (tensor.part == TensorPart::kGlobalScale) {
    global_scales_[tensor.weight][tensor.segment] = scale;
    const std::vector<float> scales(static_cast<size_t>(rows.rows), scale);
    device_->copy_in(data + parts.row_scales + rows.row_start * int64_t{sizeof(float)},
                     scales.data(), scales.size() * sizeof(float));
  } else {
    float& largest = input_scales_[tensor.weight];
    largest = std::max(largest, scale);
    device_->copy_in(data + parts.input_scale, &largest, sizeof(float));
  }
}

void WeightStore::store_rows(int32_t weight, int64_t row_start, int64_t rows, const void* source,
                             DType dtype, TensorPart part) {
  const WeightView& view = views_[weight];
  if (view.dtype == DType::kE2M1) {
    const int64_t cols = view.cols / cols_per_unit(view, part);
    if (lies_by_rows(view)) {
      device_->copy_in(row_address(weight, part, row_start), source,
                       static_cast<size_t>(rows * cols));
      return;
    }
    run_on_stream(*device_, [&] {
      pack_byte_panels(row_address(weight, part, 0), cols, view.rows / view.matrices, source,
                       row_start, rows, *device_->pool());
    });
    return;
  }
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
    device_->copy_in(row_address(weight, part, row_start), source, bytes);
    return;
  }
  const auto converted = std::make_unique<char[]>(bytes);
  convert_elements(source, dtype, converted.get(), view.dtype, count);
  if (offset != 0.0f) {  // a vector, in float32
    float* values = reinterpret_cast<float*>(converted.get());
    for (int64_t i = 0; i < count; ++i) values[i] += offset;
  }
  device_->copy_in(row_address(weight, part, row_start), converted.get(), bytes);
}

void WeightStore::load_mapped(const MappedFile& file, const TensorSource& tensor) {
  const auto size = static_cast<int64_t>(dtype_size(tensor.dtype));
  if (is_scalar(tensor.part)) {
    float scale;
    std::memcpy(&scale, file.read(tensor.offset, sizeof(scale)), sizeof(scale));
    return store_scale(tensor, scale);
  }
  const WeightSegment& rows = segment(tensor);
  const SourceRows place = source_rows(views_[tensor.weight], rows.slice, tensor.part);
  const int64_t row_bytes = place.cols * size;
  const int64_t stride = place.stride * size;
  const size_t begin = tensor.offset + static_cast<size_t>(place.first * size);
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
    store_rows(tensor.weight, rows.row_start + row, count, mapped, tensor.dtype, tensor.part);
    file.drop(start, bytes);
  }
}

void WeightStore::load_staged(const MappedFile& file, std::span<const TensorSource> tensors,
                              const std::function<void(size_t)>& progress) {
  std::vector<StagedTensor> staged;
  for (const TensorSource& tensor : tensors) {
    const WeightView& view = views_[tensor.weight];
    const WeightSegment& rows = segment(tensor);
    check_internal(lies_by_rows(view), "weights",
                   "only weights that are stored by rows can be staged");
    const SourceRows place = source_rows(view, rows.slice, tensor.part);
    staged.push_back({&file,
                      tensor.offset + static_cast<size_t>(place.first) * dtype_size(tensor.dtype),
                      tensor.dtype, row_address(tensor.weight, tensor.part, rows.row_start),
                      view.dtype == DType::kE2M1 ? tensor.dtype : view.dtype,
                      rows.rows * place.cols, place.cols, place.stride});
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
    check_segment(tensor);
    begin_loading(tensor.weight);
  }
  // Copies that are staged do not touch values; those few that an offset is added to go alone.
  std::vector<TensorSource> staged, alone;
  for (const TensorSource& tensor : tensors) {
    const bool as_is = program_->weights()[tensor.weight].offset == 0.0f && !is_scalar(tensor.part);
    (device_->type() != DeviceType::kCpu && as_is ? staged : alone).push_back(tensor);
  }
  if (!staged.empty()) load_staged(file, staged, progress);
  for (const TensorSource& tensor : staged) mark_loaded(tensor);
  for (const TensorSource& tensor : alone) {
    load_mapped(file, tensor);
    const WeightView& view = views_[tensor.weight];
    const int64_t count =
        is_scalar(tensor.part)
            ? 1
            : segment(tensor).rows * (view.cols / cols_per_unit(view, tensor.part));
    progress(static_cast<size_t>(count) * dtype_size(tensor.dtype));
    mark_loaded(tensor);
  }
  for (const TensorSource& tensor : tensors) finish_loading(tensor.weight);
}

void WeightStore::load_segment(int32_t weight, int32_t segment, const void* data, DType source,
                               TensorPart part) {
  const TensorSource tensor{weight, segment, 0, source, part};
  check_segment(tensor);
  begin_loading(weight);
  if (is_scalar(part)) {
    store_scale(tensor, *static_cast<const float*>(data));
  } else {
    const WeightSegment& rows = this->segment(tensor);
    store_rows(weight, rows.row_start, rows.rows, data, source, part);
  }
  mark_loaded(tensor);
  finish_loading(weight);
}

void WeightStore::begin_loading(int32_t weight) {
  if (!packed_[weight]) return;
  packed_[weight] = false;
  loaded_[weight].assign(loaded_[weight].size(), uint8_t{0});
}

void WeightStore::finish_loading(int32_t weight) {
  const WeightSpec& spec = program_->weights()[weight];
  const std::vector<uint8_t>& loaded = loaded_[weight];
  const auto all = [&](uint8_t parts) { return parts == all_parts(spec); };
  if (spec.format != WeightFormat::kNvfp4 || packed_[weight] ||
      !std::all_of(loaded.begin(), loaded.end(), all)) {
    return;
  }
  std::vector<int64_t>& runs = scale_runs_[weight];
  runs.clear();
  for (size_t i = 0; i < spec.segments.size(); ++i) {
    if (i > 0 && global_scales_[weight][i] == global_scales_[weight][i - 1]) runs.pop_back();
    runs.push_back(spec.segments[i].row_start + spec.segments[i].rows);
  }
  if (views_[weight].layout != WeightLayout::kTile16) return;
  pack_tiles(weight);
  packed_[weight] = true;
}

// From the last rows to the first: none moves to where others still lie, as tiles take as much room
// as their rows or more.
void WeightStore::pack_tiles(int32_t weight) {
  const WeightView& view = views_[weight];
  const int64_t rows = view.rows / view.matrices;
  const int64_t code_bytes = view.cols / 2, scale_count = view.cols / kFp4Block;
  const int64_t most = (rows + kPanelRows - 1) / kPanelRows * kPanelRows;
  const int64_t piece = std::clamp(
      kPieceBytes / (code_bytes + scale_count) / kPanelRows * kPanelRows, kPanelRows, most);
  const auto needed = static_cast<size_t>(piece * (code_bytes + scale_count));
  if (unpacked_.bytes() < needed) unpacked_ = device_->allocate(needed, "NVFP4 rows to be packed");
  run_on_stream(*device_, [&] {
    StepContext ctx;
    ctx.device = device_;
    ctx.stream = device_->stream();
    auto* codes = static_cast<uint8_t*>(unpacked_.data());
    uint8_t* scales = codes + piece * code_bytes;
    for (int64_t i = view.matrices - 1; i >= 0; --i) {
      const WeightView tiles = matrix(view, i);
      for (int64_t row = (rows - 1) / piece * piece; row >= 0; row -= piece) {
        const int64_t count = std::min(piece, rows - row);
        device_->copy_within(codes, row_address(weight, TensorPart::kElements, i * rows + row),
                             static_cast<size_t>(count * code_bytes));
        device_->copy_within(scales, row_address(weight, TensorPart::kBlockScales, i * rows + row),
                             static_cast<size_t>(count * scale_count));
        device_->kernels().fp4_tiles({.codes = codes,
                                      .scales = scales,
                                      .tile_codes = const_cast<void*>(tiles.data),
                                      .tile_scales = const_cast<uint8_t*>(tiles.scales),
                                      .first_row = row,
                                      .rows = count,
                                      .cols = view.cols},
                                     ctx);
      }
    }
  });
}

void WeightStore::fill_random(int32_t weight, uint64_t seed, float range) {
  check(weight >= 0 && weight < static_cast<int32_t>(views_.size()), "weights", "no weight ",
        weight);
  const WeightView& view = views_[weight];
  loaded_[weight].assign(loaded_[weight].size(), all_parts(program_->weights()[weight]));
  if (view.dtype == DType::kE2M1) {
    packed_[weight] = false;
    fill_random_codes(weight, seed ^ (static_cast<uint64_t>(weight) << 40), range);
    return finish_loading(weight);
  }
  const bool vector = program_->weights()[weight].kind == WeightKind::kVector;
  FillRandomParams params{};
  params.key = seed ^ (static_cast<uint64_t>(weight) << 40);
  params.center = vector ? 1.0f : 0.0f;
  params.width = vector ? 0.1f : range;
  if (program_->is_route_bias(weight)) params.center = params.width = 0.0f;
  if (lies_by_rows(view)) {
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
      store_rows(weight, row, params.count / view.cols, rows.data(), DType::kBF16,
                 TensorPart::kElements);
    }
  }
}

void WeightStore::fill_random_codes(int32_t weight, uint64_t key, float range) {
  const WeightView& view = views_[weight];
  for (const TensorPart part : {TensorPart::kElements, TensorPart::kBlockScales}) {
    const bool codes = part == TensorPart::kElements;
    FillRandomParams params{};
    params.key = codes ? key : ~key;
    params.dtype = codes ? DType::kE2M1 : DType::kE4M3;
    params.center = kRandomScaleCenter;
    params.width = kRandomScaleWidth;
    const int64_t cols = view.cols / cols_per_unit(view, part);
    if (lies_by_rows(view)) {
      params.data = row_address(weight, part, 0);
      params.count = view.rows * cols;
      mrv1::fill_random(*device_, params);
      continue;
    }
    const int64_t piece = std::max<int64_t>(kPanelRows, kRandomPiece / cols);
    std::vector<uint8_t> rows(static_cast<size_t>(std::min(piece, view.rows) * cols));
    for (int64_t row = 0; row < view.rows; row += piece) {
      params.data = rows.data();
      params.first = static_cast<uint64_t>(row * cols);
      params.count = std::min(piece, view.rows - row) * cols;
      mrv1::fill_random(*device_, params);
      store_rows(weight, row, params.count / cols, rows.data(), params.dtype, part);
    }
  }
  // As uniform values have.
  const float scale = range / std::sqrt(3.0f) / kRandomDeviation;
  for (size_t i = 0; i < program_->weights()[weight].segments.size(); ++i) {
    TensorSource tensor{weight, static_cast<int32_t>(i), 0, DType::kF32, TensorPart::kGlobalScale};
    store_scale(tensor, scale);
    tensor.part = TensorPart::kInputScale;
    store_scale(tensor, 1.0f);
  }
}

void WeightStore::check_complete() {
  staged_.reset();
  unpacked_ = Buffer();
  for (size_t i = 0; i < loaded_.size(); ++i) {
    for (size_t k = 0; k < loaded_[i].size(); ++k) {
      if (loaded_[i][k] != all_parts(program_->weights()[i])) {
        fail(ErrorKind::kWeights, "weights", "tensor '", program_->weights()[i].segments[k].tensor,
             "', or a scale of it, was not loaded");
      }
    }
  }
}

}  // namespace mrv1
