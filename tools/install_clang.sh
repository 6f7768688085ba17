#!/usr/bin/env bash
# Installs clang 19 or later, with which the tests run the Metal kernels on the CPU (tests/mslcpu). It installs only as root and with apt-get, where
# nobody must be asked. Without clang those tests are skipped and say why; nothing else needs clang.
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
found || echo "clang 19 or later was not found and could not be installed: the tests of the Metal kernels will be skipped. Install it to run them." >&2
