"""These tests need the programs that `make .venv-helm` installs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.helm.installed import HELMS, HelmInstalled
from tests.e2e.helm.rendering import Renderer
from tests.e2e.installed import needed


@pytest.fixture(scope="session")
def tools() -> HelmInstalled:
    """The environment that holds the programs."""
    return needed(HelmInstalled)


@pytest.fixture(scope="session", params=HELMS)
def helm(request: pytest.FixtureRequest, tools: HelmInstalled, tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    """Each of the two Helms."""
    return Renderer(tools, request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def newest(tools: HelmInstalled, tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    """The newer Helm, for what has been shown not to depend on which."""
    return Renderer(tools, HELMS[-1], tmp_path_factory.mktemp("newest"))


@pytest.fixture(scope="session")
def rendered(newest: Renderer) -> dict[str, list[dict]]:
    """What every example and every case of the matrix comes to, by its name."""
    return newest.everything()


@pytest.fixture(scope="session")
def manifests(rendered: dict[str, list[dict]], newest: Renderer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each of these, without what is the same in several."""
    folder = tmp_path_factory.mktemp("manifests")
    newest.write(rendered, folder)
    return folder
