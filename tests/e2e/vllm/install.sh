#!/usr/bin/env bash
# Installs the pinned requirements into an environment: install.sh FOLDER. Where torch for the CPU cannot be had, the reason is
# left in FOLDER/missing, which the tests are skipped with; any other failure is one.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
venv="$1"
pip=("$venv/bin/python" -m pip install --disable-pip-version-check --no-deps)
torch="$(grep -E '^torch==' "$here/requirements.txt")"

if ! "${pip[@]}" "$torch" 2>"$venv/pip.log"; then
  cat "$venv/pip.log" >&2
  if grep -q "No matching distribution found for torch" "$venv/pip.log"; then
    echo "pip finds no $torch: name a folder or an index that has PyTorch's wheels for the CPU, as in" \
      "PIP_FIND_LINKS=FOLDER make .venv-vllm" | tee "$venv/missing" >&2
    exit 0
  fi
  exit 1
fi
"${pip[@]}" -r "$here/requirements.txt"
rm -f "$venv/missing"
touch "$venv/installed"
