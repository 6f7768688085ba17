#!/usr/bin/env bash
# Installs Chromium, in which the tests of the viewer open its page (tests/viewer). It installs only as root and with apt-get, where nobody must be
# asked. Without it those tests are skipped and say why; nothing else needs a browser. With METALENS_REQUIRE_TOOLS=1 it fails instead.
set -uo pipefail

found() {
  for browser in "${METALENS_CHROMIUM:-}" chromium chromium-browser google-chrome; do
    [ -n "$browser" ] && "$browser" --version > /dev/null 2>&1 && return 0
  done
  return 1
}

found && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-noto-cjk > /dev/null
fi
found && exit 0
echo "Chromium was not found and could not be installed: the tests of the viewer in a browser will be skipped. Install it to run them." >&2
exit "${METALENS_REQUIRE_TOOLS:-0}"
