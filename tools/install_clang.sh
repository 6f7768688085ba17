#!/usr/bin/env bash
# The tests run the Metal kernels on the CPU through clang 19 or later (tests/mslcpu). Installs it where that needs no question to anybody: as root, with
# apt-get. Elsewhere those tests are skipped and say why; nothing else needs clang.
set -uo pipefail

found() {
  for compiler in "${MSLCPU_CLANG:-}" clang-22 clang-21 clang-20 clang-19 clang; do
    [ -n "$compiler" ] && command -v "$compiler" > /dev/null || continue
    version=$("$compiler" -dumpversion 2> /dev/null) && [ "${version%%.*}" -ge 19 ] && return 0
  done
  return 1
}

found && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq && apt-get install -y -qq --no-install-recommends clang-19 llvm-19 > /dev/null
fi
found || echo "No clang 19 or later here, and none could be installed: the tests of the Metal kernels will be skipped." >&2
