#!/usr/bin/env bash
# Makes an environment of tools: install.sh FOLDER PYTHON…, with the first of these Pythons that the tools take. Where they take none,
# or torch for the CPU cannot be had, the reason is left in FOLDER/missing, which the tests are skipped with; any other failure is one.
set -euo pipefail
venv="$1"
shift
name="$(basename "$venv")"
requirements="$(cd "$(dirname "$0")" && pwd)/requirements/$name.txt"
oldest="$(sed -n 's/^# Python 3\.\([0-9]*\).*/\1/p' "$requirements")"

missing() {
  mkdir -p "$venv"
  echo "$1" | tee "$venv/missing" >&2
  exit 0
}

rm -rf "$venv"
for python in "$@"; do
  "$python" -c "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, $oldest))" 2>/dev/null && break
  python=""
done
[ -n "$python" ] || missing "$name needs Python 3.$oldest or newer, and here is none: name one with make PYTHON=…"
"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps)
if torch="$(grep -E '^torch==' "$requirements")" && ! "${pip[@]}" "$torch" 2>"$venv/pip.log"; then
  cat "$venv/pip.log" >&2
  grep -q "No matching distribution found for torch" "$venv/pip.log" || exit 1
  missing "$name needs torch, and pip finds no $torch: name a folder or an index that has PyTorch's wheels for the CPU, as in PIP_FIND_LINKS=FOLDER make .venv-tools/$name"
fi
"${pip[@]}" -r "$requirements"
touch "$venv/installed"
