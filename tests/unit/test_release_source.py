"""What `make release` refuses, and that package and chart are of one version."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.version import Version

from tools.release import images, source
from tools.release.commands import Refused

ROOT = Path(__file__).parents[2]
CHART = Path(source.CHART) / "Chart.yaml"
WHO = {f"GIT_{role}_{what}": "somebody" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", *words], cwd=folder, env=os.environ | WHO, capture_output=True, check=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A committed release 1.2.0 without its tag."""
    files = {
        "pyproject.toml": '[project]\nversion = "1.2.0"\n',
        "CHANGELOG.md": "# Changelog\n\n## Unreleased\n\n## 1.2.0 (today)\n\n- More.\n\n## 1.1.0\n\n",
        str(CHART): "version: 1.2.0\nappVersion: 1.2.0\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "1.2.0")
    return tmp_path


def check(folder: Path, version: str | None = None) -> tuple[source.Source, str]:
    """Do what a release does before anything is built."""
    found = source.find(folder, version)
    source.check_versions(folder, found.version)
    return found, source.notes(folder, found.version)


def test_a_tag_or_a_version(repository: Path) -> None:
    """Either says which release it is; the notes are its section alone."""
    found, notes = check(repository, "1.2.0")
    assert notes == "- More.\n"
    git(repository, "tag", "v1.2.0")
    assert check(repository) == (found, notes)


@pytest.mark.parametrize(
    ("version", "accepted"),
    [
        ("1.2.0-rc.1", True),
        ("1.2.0-rc10", True),
        ("1.2.0-alpha.0", True),
        ("1.2.0-beta2", True),
        ("1.2.0-..", False),
        ("1.2.0-01", False),
        ("1.2.0-foo", False),
        ("1.2.0-rc", False),
        ("1.2.0-rc.01", False),
        ("1.2.0+local", False),
        ("1.2", False),
    ],
)
def test_versions_that_packages_and_charts_can_have(repository: Path, version: str, accepted: bool) -> None:
    """What both Semantic Versioning and PEP 440 know, and nothing else."""
    if accepted:
        assert source.find(repository, version).version == version
        Version(version)
    else:
        with pytest.raises(Refused, match=r"is not a version like 0\.2\.0 or 0\.2\.0-rc\.1"):
            source.find(repository, version)


def test_notes_begin_at_a_heading(tmp_path: Path) -> None:
    """A heading in a code block begins no section, and neither does one without text."""
    shown = "```text\n## 1.2.0\nin a block\n```\n"
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{shown}\n## \n\n## 1.2.0\n\n{shown}- More.\n\n## 1.1.0\n")
    assert source.notes(tmp_path, "1.2.0") == f"{shown}- More.\n"


def dirty(folder: Path) -> None:
    (folder / "left").write_text("")


def tagged_otherwise(folder: Path) -> None:
    git(folder, "tag", "v1.3.0")


def tagged_twice(folder: Path) -> None:
    git(folder, "tag", "v1.2.0")
    git(folder, "tag", "v1.2.1")


def tagged_in_words(folder: Path) -> None:
    git(folder, "tag", "vnext")


def chart_behind(folder: Path) -> None:
    (folder / CHART).write_text("version: 1.2.0\nappVersion: 1.1.0\n")
    git(folder, "commit", "--quiet", "--all", "--message", "chart")
    git(folder, "tag", "v1.2.0")


def not_in_the_changelog(folder: Path) -> None:
    (folder / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n- 1.2.0 does more.\n\n## 1.2.0\n\n## 1.1.0\n")
    git(folder, "commit", "--quiet", "--all", "--message", "changelog")
    git(folder, "tag", "v1.2.0")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dirty, r"the working tree has changes \(\?\? left\)"),
        (lambda folder: None, r"no tag at [0-9a-f]{12}: one tag like v0\.2\.0 is needed, or VERSION=0\.2\.0"),
        (tagged_otherwise, r"pyproject\.toml's version is 1\.2\.0, the release's 1\.3\.0"),
        (tagged_twice, r"v1\.2\.0, v1\.2\.1 at"),
        (tagged_in_words, r"next is not a version like"),
        (chart_behind, r"the chart's appVersion is 1\.1\.0, the release's 1\.2\.0"),
        (not_in_the_changelog, r"CHANGELOG\.md has no section '## 1\.2\.0' with text"),
    ],
    ids=["dirty", "no tag", "another tag", "two tags", "no version", "chart", "changelog"],
)
def test_refused(repository: Path, change: Callable[[Path], None], told: str) -> None:
    change(repository)
    with pytest.raises(Refused, match=told):
        check(repository)


def test_images_by_digest() -> None:
    """Each image that is needed must be named with its digest, and no other."""
    digest = f"sha256:{7:064}"
    given = [f"{name}@{digest}" for name in images.needed(ROOT)]
    assert set(images.pinned(ROOT, given).values()) == {digest}
    with pytest.raises(Refused, match=r"no digest of .*docker buildx imagetools inspect"):
        images.pinned(ROOT, given[1:])
    with pytest.raises(Refused, match="is none of the images"):
        images.pinned(ROOT, [*given, f"nginx:1@{digest}"])
    with pytest.raises(Refused, match="has two digests"):
        images.pinned(ROOT, [*given, given[0].replace(digest, f"sha256:{8:064}")])
    with pytest.raises(Refused, match="is not NAME:TAG@sha256:DIGEST"):
        images.pinned(ROOT, ["nginx:1"])


def test_no_image_of_the_chart_is_forgotten() -> None:
    values = (ROOT / "deploy/helm/lora-sidecar/values.yaml").read_text()
    named = set(re.findall(r'^ +image: ([^\s"]+)$', values, re.MULTILINE))
    assert len(named) == 2
    assert named < images.needed(ROOT).keys()


def test_package_and_chart_are_of_one_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    source.check_versions(ROOT, version)
