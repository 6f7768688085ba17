#!/usr/bin/env bash
# Checks the Containerfile without a container engine: runs its steps as root in a fresh Debian, in a chroot that debootstrap makes, then the commands of its
# first lines. It needs root, debootstrap and the network. The settings of this machine for the network (apt, pip, certificates) are copied.
#
#     tools/check_container.sh [FOLDER]     the chroot, kept for another run with the same folder; default: one in /tmp, which is removed
# DEBIAN_MIRROR names another source of packages.
set -euo pipefail
cd "$(dirname "$0")/.."

root=${1:-$(mktemp -d)}
suite=$(sed -n 's/^FROM debian:\([a-z]*\).*/\1/p' Containerfile)
finish() {
  umount "$root/proc" 2> /dev/null || true
  [ "${1:-}" ] || rm -rf --one-file-system "$root"
}
trap "finish ${1:+kept}" EXIT
[ -x "$root/bin/sh" ] && [ ! -d "$root/debootstrap" ] || debootstrap --variant=minbase "$suite" "$root" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"}

for file in /etc/resolv.conf /etc/pip.conf /etc/apt/apt.conf.d/*proxy*; do
  if [ -e "$file" ]; then
    mkdir -p "$root$(dirname "$file")"
    cp -L "$file" "$root$file"
  fi
done
cp -L /etc/ssl/certs/ca-certificates.crt "$root/certificates.crt" # those of this machine: a proxy may have its own
mount -t proc proc "$root/proc" || echo "/proc can't be mounted; the steps run without it." >&2
rm -rf "$root/src"
mkdir "$root/src"
git archive HEAD | tar -x -C "$root/src"

inside() {
  env -i HOME=/root PATH="$path" METALENS_CACHE=/tmp/cache PIP_CERT=/certificates.crt SSL_CERT_FILE=/certificates.crt chroot "$root" /bin/bash -euc "$1"
}
path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
# Each RUN with the lines that it goes on in, as one line.
sed -e ':a' -e '/\\$/N' -e 's/\\\n//' -e 'ta' Containerfile | sed -n 's/^RUN //p' > "$root/steps"
while read -r step; do
  echo "== $step"
  inside "$step" < /dev/null
done < "$root/steps"

path=/opt/metalens/bin:$path
inside 'metalens --help > /dev/null'
inside 'cp /src/python/metalens/assets/heldout.txt /tmp/text.txt && metalens train demo --data /tmp/text.txt --tokens 3000 --out /tmp/my-lens'
inside 'metalens view demo --text "Click the button" --lens /tmp/my-lens --save /tmp/page.html && test -s /tmp/page.html'
inside 'metalens view demo --port 8000 2> /tmp/log &
  trap "kill $!" EXIT
  for i in $(seq 60); do grep -q "viewer is at" /tmp/log && break; sleep 1; done
  python3 -c "
import re, urllib.request
address = re.search(r\"http\S+\", open(\"/tmp/log\").read())[0]
assert b\"<!doctype html>\" in urllib.request.urlopen(address).read(), address
"'
echo "The Containerfile's steps and commands work in Debian $suite."
