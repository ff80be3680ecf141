"""`sidecar demo`: run engines, adapters and clients on this machine."""

from __future__ import annotations

from typing import Annotated

import typer


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Keep running, and print commands to try next.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Run a demo on this machine: emulated engines, eight adapters, and clients that know only names."""
    from sidecar.lab.demo.run import demo as run_demo

    return run_demo(keep, as_json)
