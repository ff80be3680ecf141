"""What a release is built from: one commit whose files agree on the version."""

from __future__ import annotations

import re
import tarfile
import tomllib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import yaml

from tools.docs.pages import prose
from tools.release.commands import Refused, run

_NUMBER = r"(0|[1-9][0-9]*)"
VERSION = re.compile(rf"{_NUMBER}\.{_NUMBER}\.{_NUMBER}(-(alpha|beta|rc)\.?{_NUMBER})?")
"""Versions of Semantic Versioning that PEP 440 reads as the same ones: the chart needs the one, the wheel the other."""
CHART = "deploy/helm/lora-sidecar"


@dataclass(frozen=True)
class Source:
    """A commit to release. `epoch` is its time in seconds since 1970, which all archives carry."""

    root: Path
    version: str
    commit: str
    epoch: int

    def export(self, folder: Path) -> Path:
        """Write the commit's files into a new folder, with the commit's time, and return the folder."""
        archive = folder.with_suffix(".tar")
        run("git", "archive", "--output", archive, self.commit, cwd=self.root)
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
        archive.unlink()
        return folder


def find(root: Path, version: str | None) -> Source:
    """Return what is checked out: the version of the tag on HEAD, or the one that is given. Raises Refused."""
    changed = run("git", "status", "--porcelain", cwd=root).splitlines()
    if changed:
        more = " and more" if changed[1:] else ""
        raise Refused(f"the working tree has changes ({changed[0].strip()}{more}), which no release has: commit them")
    commit = run("git", "rev-parse", "HEAD", cwd=root).strip()
    version = version or _tagged(root, commit)
    if not VERSION.fullmatch(version):
        raise Refused(
            f"{version} is not a version like 0.2.0 or 0.2.0-rc.1; what precedes a release is alpha, beta or rc"
        )
    epoch = int(run("git", "show", "--no-patch", "--format=%ct", commit, cwd=root))
    return Source(root, version, commit, epoch)


def notes(tree: Path, version: str) -> str:
    """Return the changelog's section of a version, without its heading. Raises Refused if there is none."""
    changelog = tree / "CHANGELOG.md"
    lines = changelog.read_text().splitlines()
    starts = [number for number, line in prose(changelog) if line.startswith("## ")]
    for start, end in pairwise([*starts, len(lines) + 1]):
        heading = lines[start - 1].removeprefix("## ").split()
        text = "\n".join(lines[start : end - 1]).strip()
        if text and heading and heading[0].strip("[]") == version:
            return f"{text}\n"
    raise Refused(f"CHANGELOG.md has no section '## {version}' with text; rename 'Unreleased' to it")


def check_versions(tree: Path, version: str) -> None:
    """Check that the package and the chart are of this version. Raises Refused."""
    project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((tree / CHART / "Chart.yaml").read_text())
    found = {
        "pyproject.toml's version": project["version"],
        "the chart's version": chart["version"],
        "the chart's appVersion": chart["appVersion"],
    }
    for what, said in found.items():
        if said != version:
            raise Refused(f"{what} is {said}, the release's {version}: change one of them and commit")


def _tagged(root: Path, commit: str) -> str:
    tags = run("git", "tag", "--points-at", commit, "--list", "v*", cwd=root).split()
    if len(tags) != 1:
        found = ", ".join(tags) or "no tag"
        raise Refused(f"{found} at {commit[:12]}: one tag like v0.2.0 is needed, or VERSION=0.2.0")
    return tags[0].removeprefix("v")
