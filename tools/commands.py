"""The command line as an object, for all tools: only this module knows where it is."""

from __future__ import annotations

from typing import Any

import typer
from typer.main import get_command


def root_command() -> Any:
    """Return the root of the command line, a click group."""
    from sidecar.cli import app

    return get_command(app) if isinstance(app, typer.Typer) else app
