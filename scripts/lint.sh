#!/usr/bin/env bash
# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#
# Formatters, linters and the type checker over the whole tree.
#
#   scripts/lint.sh          reports
#   scripts/lint.sh --fix    rewrites what can be rewritten, reports the rest
#
# Needs `pip install ".[dev]"`.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
  "") clang_format=(--dry-run --Werror) ruff_check=() ruff_format=(--check) ;;
  --fix) clang_format=(-i) ruff_check=(--fix) ruff_format=() ;;
  *) echo "usage: scripts/lint.sh [--fix]" >&2; exit 2 ;;
esac

failed=()
check() {
  local name=$1
  shift
  echo "-- ${name}"
  "$@" || failed+=("${name}")
}

# Files of the work tree: tracked ones and those that a commit would add.
mapfile -t native < <(git ls-files --cached --others --exclude-standard --deduplicate -- \
  '*.h' '*.cc' '*.cu' '*.cuh' | while read -r file; do [[ -f ${file} ]] && echo "${file}"; done)

check clang-format clang-format "${clang_format[@]}" "${native[@]}"
check "ruff check" ruff check "${ruff_check[@]}" .
check "ruff format" ruff format "${ruff_format[@]}" .
check mypy mypy
check "house rules" python scripts/check_house.py

if ((${#failed[@]})); then
  printf 'lint: failed: %s\n' "${failed[*]}" >&2
  exit 1
fi
echo "lint: clean"
