// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "linear_table.h"

#include <algorithm>
#include <cctype>
#include <fstream>
#include <iterator>
#include <limits>
#include <optional>
#include <sstream>

#include "core/error.h"

namespace mrv1::cuda {
namespace {

constexpr std::string_view kWhere = "tuning table";
// Rows beyond the largest measured number take its entry from here on: a product this large is cut
// into many tiles, and the best cut no longer changes.
constexpr int64_t kManyRows = 4096;
constexpr std::string_view kEngineNames[] = {"mma", "wgmma", "wide"};  // by SkinnyEngine

std::optional<DType> parse_dtype(const std::string& name) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  return std::nullopt;
}

std::string_view kind_name(const LinearShape& shape) {
  // Whatever the activation: the product is what takes the time.
  if (shape.gated) return shape.bias ? "silu_mul+bias" : "silu_mul";
  return shape.bias ? "bias" : "plain";
}

bool parse_kind(const std::string& name, LinearShape& shape) {
  for (const bool gated : {false, true}) {
    for (const bool bias : {false, true}) {
      shape.gated = gated;
      shape.bias = bias;
      if (name == kind_name(shape)) return true;
    }
  }
  return false;
}

// An integer that fits T.
template <typename T>
bool parse(std::istream& in, T& value) {
  int64_t wide = 0;
  if (!(in >> wide) || wide < int64_t{std::numeric_limits<T>::min()} ||
      wide > int64_t{std::numeric_limits<T>::max()}) {
    return false;
  }
  value = static_cast<T>(wide);
  return true;
}

bool parse_skinny(std::istream& in, SkinnyConfig& config) {
  std::string engine;
  in >> engine;
  if (engine == "default") {
    config = {.warps = 0, .stages = 0};  // none that exists: skinny_default() chooses
    return true;
  }
  const auto* named = std::find(std::begin(kEngineNames), std::end(kEngineNames), engine);
  if (named == std::end(kEngineNames)) return false;
  config.engine = static_cast<SkinnyEngine>(named - kEngineNames);
  return parse(in, config.warps) && parse(in, config.split) && parse(in, config.stages) &&
         parse(in, config.tile_rows) &&
         (config.engine != SkinnyEngine::kWide || parse(in, config.share));
}

bool parse_config(std::istream& in, LinearConfig& config) {
  std::string name;
  in >> name;
  if (name == "tiled") {
    config.kind = LinearKind::kTiled;
    return true;
  }
  if (name == "skinny") {
    config.kind = LinearKind::kSkinny;
    return parse_skinny(in, config.skinny);
  }
  config.kind = LinearKind::kCublasLt;
  return name == "cublaslt" &&
         std::all_of(config.cublaslt.values.begin(), config.cublaslt.values.end(),
                     [&](int32_t& value) { return parse(in, value); });
}

bool parse_line(std::istream& in, LinearShape& shape, LinearConfig& config) {
  std::string dtype, out_dtype, kind, arrow, rest;
  if (!(in >> shape.n >> shape.k >> shape.rows >> dtype >> out_dtype >> kind >> arrow)) {
    return false;
  }
  const std::optional<DType> x = parse_dtype(dtype), out = parse_dtype(out_dtype);
  if (shape.n <= 0 || shape.k <= 0 || shape.rows <= 0 || !x || !out || arrow != "->") return false;
  shape.dtype = *x;
  shape.out_dtype = *out;
  return parse_kind(kind, shape) && parse_config(in, config) && !(in >> rest);
}

}  // namespace

std::string LinearTable::file_name(std::string_view card, std::string_view cublaslt_version) {
  std::string name;
  for (const char c : card) {
    const unsigned char letter = static_cast<unsigned char>(c);
    if (std::isalnum(letter)) {
      name += static_cast<char>(std::tolower(letter));
    } else if (!name.empty() && name.back() != '-') {
      name += '-';
    }
  }
  return concat(name, "-cublaslt-", cublaslt_version.empty() ? "none" : cublaslt_version, ".txt");
}

std::string LinearTable::line(const LinearShape& shape, const LinearConfig& config,
                              double microseconds) {
  std::ostringstream out;
  out << shape.n << ' ' << shape.k << ' ' << shape.rows << ' ' << dtype_name(shape.dtype) << ' '
      << dtype_name(shape.out_dtype) << ' ' << kind_name(shape) << " -> ";
  switch (config.kind) {
    case LinearKind::kTiled:
      out << "tiled";
      break;
    case LinearKind::kSkinny:
      out << "skinny " << kEngineNames[static_cast<int>(config.skinny.engine)] << ' '
          << int{config.skinny.warps} << ' ' << int{config.skinny.split} << ' '
          << int{config.skinny.stages} << ' ' << config.skinny.tile_rows;
      if (config.skinny.engine == SkinnyEngine::kWide) out << ' ' << int{config.skinny.share};
      break;
    case LinearKind::kCublasLt:
      out << "cublaslt";
      for (const int32_t value : config.cublaslt.values) out << ' ' << value;
      break;
  }
  out.precision(1);
  out << std::fixed << "  # " << microseconds << " us";
  return out.str();
}

void LinearTable::read(const std::string& path) {
  std::ifstream file(path);
  if (!file) return;
  LinearTable read;
  std::string text;
  for (int number = 1; std::getline(file, text); ++number) {
    std::istringstream in(text.substr(0, text.find('#')));
    if ((in >> std::ws).eof()) continue;
    LinearShape shape{};
    LinearConfig config;
    check(
        parse_line(in, shape, config), kWhere, path, ":", number, ": '", text,
        "' is not 'n k rows dtype out_dtype kind -> config' with a kind of plain, bias, silu_mul "
        "or silu_mul+bias and a config of tiled, skinny or cublaslt; remove the line or the file");
    read.set(shape, config);  // of two lines of one file the later, which was measured later
  }
  for (auto& [weight, rows] : read.entries_) entries_[weight].merge(rows);
}

void LinearTable::set(const LinearShape& shape, const LinearConfig& config) {
  entries_[weight(shape)][shape.rows] = config;
}

const LinearConfig* LinearTable::find(const LinearShape& shape) const {
  const auto found = entries_.find(weight(shape));
  if (found == entries_.end()) return nullptr;
  const std::map<int64_t, LinearConfig>& by_rows = found->second;
  const auto next = by_rows.lower_bound(shape.rows);
  if (next == by_rows.end()) {
    return by_rows.rbegin()->first >= kManyRows ? &by_rows.rbegin()->second : nullptr;
  }
  return next->first <= std::max<int64_t>(2 * shape.rows, 16) ? &next->second : nullptr;
}

const LinearConfig* LinearTable::find_exact(const LinearShape& shape) const {
  const auto found = entries_.find(weight(shape));
  if (found == entries_.end()) return nullptr;
  const auto entry = found->second.find(shape.rows);
  return entry != found->second.end() ? &entry->second : nullptr;
}

}  // namespace mrv1::cuda
