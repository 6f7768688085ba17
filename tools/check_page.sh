#!/usr/bin/env bash
# Checks the types of the viewer's page: its modules are plain JavaScript with JSDoc types, and TypeScript's compiler reads those. It comes from the npm
# registry, once, into build/typescript. Where there is no npm the check is left out, and says so; with METALENS_REQUIRE_TOOLS=1 it fails.
set -euo pipefail
cd "$(dirname "$0")/.."

VERSION=5.9.3
left_out() {
  echo "$1: the types of the viewer's page are not checked." >&2
  exit "${METALENS_REQUIRE_TOOLS:-0}"
}
compiler=build/typescript/node_modules/.bin/tsc
if [ ! -x "$compiler" ] || [ "$("$compiler" --version)" != "Version $VERSION" ]; then
  if ! command -v npm > /dev/null; then
    left_out "npm was not found"
  fi
  mkdir -p build/typescript
  npm install --silent --no-audit --no-fund --ignore-scripts --prefix build/typescript "typescript@$VERSION" ||
    left_out "TypeScript could not be installed from the npm registry"
fi
"$compiler" --project tools/tsconfig.json
