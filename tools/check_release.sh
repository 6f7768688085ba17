#!/usr/bin/env bash
# Check that all files of a release have its version, and that each platform has a wheel: tools/check_release.sh VERSION FOLDER.
set -euo pipefail
version=$1 folder=$2
failed=0
for file in "$folder"/*; do
  case "$(basename "$file")" in
    "metalens-$version"-*.whl | "metalens-$version.tar.gz") ;;
    *) echo "$(basename "$file") is not a file of version $version." >&2; failed=1 ;;
  esac
done
for platform in manylinux_2_35_x86_64 manylinux_2_35_aarch64 macosx; do
  compgen -G "$folder/metalens-$version-*$platform*.whl" > /dev/null || { echo "No wheel of version $version for $platform." >&2; failed=1; }
done
compgen -G "$folder/metalens-$version.tar.gz" > /dev/null || { echo "No source archive of version $version." >&2; failed=1; }
exit $failed
