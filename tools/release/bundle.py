"""A release for a site without internet: everything to install it, and a script that asks no index."""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path

from tools.release.archives import digest, pack, write_sums
from tools.release.commands import Refused, run
from tools.release.packages import LOCKS, PIP
from tools.release.source import Source

ORIGINS = ("s3", "gs", "az", "hf")
"""Extras whose libraries are locked."""
GLIBC = 28
"""Wheels for glibc 2.28 and older are taken: Debian 10, RHEL 8, Ubuntu 18.10 and all later ones have it."""

INSTALL = """\
#!/bin/sh
# Install lora-sidecar {version} from the wheels beside this script: install.sh FOLDER. No package index is asked.
# PYTHON names the interpreter, which must be {python}.
set -eu
usage="usage: install.sh FOLDER   (PYTHON names the interpreter, a Python {python})"
case "${{1:-}}" in --help | -h) echo "$usage"; exit 0 ;; "" | -*) echo "$usage" >&2; exit 2 ;; esac
test $# = 1 || {{ echo "$usage" >&2; exit 2; }}
python="${{PYTHON:-python{python}}}"
refuse() {{ echo "install.sh: $python $1: set PYTHON to a Python {python}" >&2; exit 2; }}
found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || refuse "does not run"
test "$found" = {python} || refuse "is Python $found, the wheels are for {python}"
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
(cd "$here" && sha256sum --check --quiet SHA256SUMS)
"$python" -m venv "$1"
"$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-index --find-links "$here/wheels" \\
  --require-hashes -r "$here/requirements.txt"
"$1/bin/sidecar" --version
"""
README = """\
# lora-sidecar {version} without internet

For Linux on x86-64 with Python {python}. `sha256sum --check SHA256SUMS` checks the files.

* **Command line and server**: `./install.sh /opt/lora-sidecar`, then `/opt/lora-sidecar/bin/sidecar demo`.
* **Image**: where an index can be reached, unpack `{context}`, run
  `docker build -f deploy/Dockerfile -t REGISTRY/lora-sidecar:{version} .` and bring the image along by `docker save`,
  with the others of `images.txt` by their digests. The Dockerfile names the base's digest, and every package that it
  installs is checked by its hash.
* **Chart**: `helm install NAME lora-sidecar-{version}.tgz`, or copy the OCI layout `chart/` into your registry
  (`oras cp --from-oci-layout chart:{version} REGISTRY/charts/lora-sidecar:{version}`).
* `lora-sidecar-{version}.cdx.json` is the image's bill of materials, `NOTES.md` says what has changed.
"""


def bundle(tree: Path, source: Source, release: Path, extras: list[str], scratch: Path) -> Path:
    """Write the bundle of a built release into its folder; return the archive. Raises Refused."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise Refused(f"a bundle is made on Linux x86_64 for the same; this is {sys.platform} {platform.machine()}")
    unknown = sorted(set(extras) - set(ORIGINS))
    if unknown:
        raise Refused(f"{unknown[0]} is none of the extras that can be bundled: {', '.join(ORIGINS)}")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = scratch / f"lora-sidecar-offline-{source.version}-py{python}-linux-x86_64"
    shutil.copytree(release, folder, ignore=shutil.ignore_patterns("*.whl", "lora-sidecar-offline-*", "SHA256SUMS"))
    wheels = folder / "wheels"
    lock = tree / LOCKS[1 if extras else 0]
    _download(lock, wheels, python)
    (wheel,) = release.glob("lora_sidecar-*.whl")
    shutil.copy(wheel, wheels)
    chosen = f"[{','.join(sorted(extras))}]" if extras else ""
    line = f"lora-sidecar{chosen}=={source.version} --hash=sha256:{digest(wheel)}\n"
    (folder / "requirements.txt").write_text(lock.read_text() + line)
    (context,) = release.glob("lora-sidecar-image-*.tar.gz")
    (folder / "README.md").write_text(README.format(version=source.version, python=python, context=context.name))
    (folder / "install.sh").write_text(INSTALL.format(version=source.version, python=python))
    (folder / "install.sh").chmod(0o755)
    write_sums(folder)
    return pack(folder, release / f"{folder.name}.tar.gz", source.epoch)


def _download(lock: Path, wheels: Path, python: str) -> None:
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC, 4, -1)]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    chosen = [word for name in platforms for word in ("--platform", name)]
    fixed = ("--only-binary=:all:", "--no-deps", "--python-version", python, "--require-hashes")
    run(*PIP, "download", *fixed, *chosen, "-r", lock, "--dest", wheels)
