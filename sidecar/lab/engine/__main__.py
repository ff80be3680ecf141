"""`python -m sidecar.lab.engine`: the same as `sidecar emulate`."""

import typer

from sidecar.lab.engine.command import emulate

if __name__ == "__main__":
    typer.run(emulate)
