// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "core/error.h"

#include <cstdio>

namespace mrv1 {

void append_part(std::string& out, std::string_view text) { out += text; }
void append_part(std::string& out, int64_t value) { out += std::to_string(value); }
void append_part(std::string& out, uint64_t value) { out += std::to_string(value); }

void append_part(std::string& out, double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  out += text;
}

}  // namespace mrv1
