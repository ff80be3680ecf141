"""Types of strings that are told differently to those who may not know of engines."""

from __future__ import annotations

from typing import Annotated

import msgspec

EngineId = Annotated[str, msgspec.Meta(description="a backend's id, or a pool's")]
Quote = Annotated[str, msgspec.Meta(description="free text")]
"""What an engine, a library, the system or a person said, or an error that was raised outside the core.

The sidecar shows it and reads nothing from it.
"""
