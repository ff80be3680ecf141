"""The service `lorasidecar.v1.Configuration`: show the configuration in force, and read its file again."""

from __future__ import annotations

import json
from typing import Any, Protocol

from sidecar.errors import Misused, Reason
from sidecar.fronts.status import answers_errors
from sidecar.proto import admin_pb2, admin_pb2_grpc


class Changes(Protocol):
    """Changes the configuration of this process. A change that is refused has changed nothing."""

    def effective(self) -> dict[str, Any]:
        """Return the configuration in force, with all defaults."""

    async def reload(self) -> list[str]:
        """Read the file again, and return the keys that have changed. Raises Misused."""

    async def add_backend(self, name: str, url: str, like: str = "") -> None:
        """Add a backend, with the other settings of the one that `like` names. Raises Misused."""

    async def remove_backend(self, name: str) -> None:
        """Take a backend out. Raises Misused."""


def checked(changes: Changes | None) -> Changes:
    """Return what changes the configuration. Raises Misused where nothing does."""
    if changes is None:
        raise Misused(Reason.CONFIG_INVALID, "the configuration of this process does not change; restart it")
    return changes


class ConfigurationService(admin_pb2_grpc.ConfigurationServicer):
    """Show and reload the configuration."""

    def __init__(self, changes: Changes | None) -> None:
        self._changes = changes

    @answers_errors
    async def Reload(self, request: Any, context: Any) -> Any:  # noqa: N802
        return admin_pb2.ReloadResponse(changed=await checked(self._changes).reload())

    @answers_errors
    async def Get(self, request: Any, context: Any) -> Any:  # noqa: N802
        return admin_pb2.EffectiveConfiguration(json=json.dumps(checked(self._changes).effective()))
