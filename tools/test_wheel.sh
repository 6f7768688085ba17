#!/usr/bin/env bash
# Install a wheel in a fresh environment, away from the sources, and use it: tools/test_wheel.sh WHEEL.
set -euo pipefail
wheel=$(realpath "$1")
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
"${PYTHON:-python3}" -m venv environment
environment/bin/python -m pip install --quiet "$wheel"
environment/bin/metalens doctor
# The extension must be loaded, not left out: without it everything runs too, hundreds of times more slowly.
environment/bin/python -c "
import metalens
from metalens import _extension
found, reason = _extension.find()
assert found is not None, reason
assert metalens.evaluate(metalens.load('demo'), 'The command opens the settings.').tokens > 0
"
environment/bin/metalens train demo --data "$(environment/bin/python -c 'from metalens.models.bundled import TRAINING_TEXT; print(TRAINING_TEXT)')" \
  --out lens --tokens 4096 --max-seq-len 128
environment/bin/metalens lens demo "The command opens the" --lens lens
# The page needs its modules, its style and its template, which are data of the package.
environment/bin/metalens view demo --text "Click the" --lens lens --save page.html
grep -q '"format":"metalens.view"' page.html
! grep -q '{{[A-Z]*}}' page.html
