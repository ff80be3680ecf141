#!/usr/bin/env bash
# Makes the golden adapters anew with the real PEFT library, in an environment of its own, and compares them with those
# that are checked in. With --write they replace them. Says SKIPPED where no CPU torch can be had.
#   PYTHON      the interpreter (default python3)
#   GOLDEN_VENV a folder to make the environment in, or to find it in (default: a temporary one)
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
venv="${GOLDEN_VENV:-$scratch/venv}"

if [ ! -x "$venv/bin/python" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
fi
if ! "$venv/bin/python" -c 'import torch, peft, transformers' 2>"$scratch/import.log"; then
  if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt" \
      2>"$scratch/pip.log" || ! "$venv/bin/python" -c 'import torch, peft, transformers' 2>>"$scratch/pip.log"; then
    tail -n 3 "$scratch/pip.log" >&2
    echo "goldens: SKIPPED (no CPU torch, peft and transformers can be had here)"
    exit 0
  fi
fi

export HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
if ! "$venv/bin/python" "$here/make.py" "$scratch/adapters" 2>"$scratch/make.log"; then
  cat "$scratch/make.log" >&2
  exit 1
fi
if [ "${1:-}" = "--write" ]; then
  rm -rf "$here/adapters"
  mv "$scratch/adapters" "$here/adapters"
  echo "goldens: written"
  exit 0
fi
"$venv/bin/python" "$here/compare.py" "$scratch/adapters" "$here/adapters"
