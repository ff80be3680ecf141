"""These tests need a real Envoy."""

from __future__ import annotations

import pytest

from tests.e2e.envoy.server import EnvoyInstalled
from tests.e2e.installed import needed


@pytest.fixture(autouse=True, scope="session")
def _envoy() -> EnvoyInstalled:
    return needed(EnvoyInstalled)
