"""A release of the working tree, and its bundle installed without a network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.helm.installed import HelmInstalled
from tests.e2e.installed import ROOT, needed
from tools.release import images

NO_DIGEST = f"sha256:{0:064}"
"""Stands in for the digests of images, which nothing here pulls."""
TIMEOUT_S = 900.0
WHO = {f"GIT_{role}_{what}": f"{what}@localhost" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


@dataclass(frozen=True)
class Tagged:
    """A clone whose only commit is a release of the working tree, with its tag."""

    root: Path
    version: str

    @property
    def output(self) -> Path:
        return self.root / "dist" / self.version


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run a program and return what it printed; a failure ends the test with all of it."""
    words = [str(word) for word in command]
    # Of the repository's own environment nothing is inherited but the path: what is installed must do.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | variables
    done = subprocess.run(
        words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def without_network(*command: str | Path) -> Sequence[str | Path]:
    """Return a command that runs another where only the loopback of its own is reached."""
    alone = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]
    alone += ["sh", "-ec", 'ip link set lo up; exec "$@"', "sh"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        assert not os.environ.get("CI"), "unshare --net and ip are needed"
        return command
    return [*alone, *command]


@pytest.fixture(scope="session")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Tagged:
    """Do what docs/releasing.md says before `make release`."""
    root = tmp_path_factory.mktemp("tagged") / "lora-sidecar"
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    changelog = root / "CHANGELOG.md"
    changelog.write_text(re.sub("^## Unreleased$", f"## {version}", changelog.read_text(), flags=re.MULTILINE))
    run("git", "init", "--quiet", cwd=root)
    run("git", "add", "--all", cwd=root)
    run("git", "commit", "--quiet", "--message", version, cwd=root, **WHO)
    run("git", "tag", f"v{version}", cwd=root, **WHO)
    return Tagged(root, version)


@pytest.fixture(scope="session")
def built(tagged: Tagged) -> Path:
    """The folder of a release with its bundle."""
    helm = needed(HelmInstalled)
    given = [word for name in images.needed(tagged.root) for word in ("--image", f"{name}@{NO_DIGEST}")]
    command = (sys.executable, "-m", "tools.release", "--bundle", *given)
    run(*command, cwd=tagged.root, HELM_VENV=str(helm.venv))
    return tagged.output


@pytest.fixture(scope="session")
def unpacked(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle as a site has it."""
    (archive,) = built.glob("lora-sidecar-offline-*.tar.gz")
    folder = tmp_path_factory.mktemp("site")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    (bundle,) = folder.iterdir()
    return bundle


@pytest.fixture(scope="session")
def new(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that the bundle's script made, with no network."""
    folder = tmp_path_factory.mktemp("new")
    command = without_network(unpacked / "install.sh", folder / "venv")
    run(*command, cwd=folder, PYTHON=sys.executable, PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull)
    return folder / "venv" / "bin"
