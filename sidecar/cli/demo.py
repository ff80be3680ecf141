"""`sidecar demo`: run engines, adapters and clients on this machine."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from sidecar.cli.show import telling

if TYPE_CHECKING:
    from sidecar.lab.demo.run import Telling


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Keep running, and print commands to try next.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Run a demo on this machine: emulated engines, eight adapters, and clients that know only names."""
    tell: Telling = (lambda what: nullcontext(lambda text: None)) if as_json else telling
    with tell("loading the demo"):
        from sidecar.lab.demo.run import demo as run_demo

    return run_demo(keep, as_json, tell)
