"""`python -m sidecar.emulator`: the same as `sidecar emulate`."""

import typer

from sidecar.emulator.command import emulate

if __name__ == "__main__":
    typer.run(emulate)
