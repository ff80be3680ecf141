"""The command line, `sidecar`: one file per group of commands."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.main import get_command

from sidecar.cli import (
    adapters,
    backends,
    calibrating,
    checking,
    folders,
    generating,
    incidents,
    planning,
    queue,
    replicas,
    serving,
    simulating,
    state,
    versions,
)
from sidecar.cli.exits import EXPLAINED, CommandError, Exit, command_error_of, tell
from sidecar.errors import SidecarError
from sidecar.lab.engine.command import emulate

app = typer.Typer(
    name="sidecar",
    help="One process in front of stock LLM engines: clients name a LoRA adapter and nothing else.",
    epilog=EXPLAINED,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lora-sidecar {version('lora-sidecar')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print which version this is, and exit."
        ),
    ] = False,
) -> None:
    """What goes before any command."""


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Stay up and say what to try next.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Show it all on this machine: emulated engines, eight adapters, and clients that know names only."""
    from sidecar.lab.demo.run import demo as run_demo

    return run_demo(keep, as_json)


app.command("serve")(serving.serve)
app.command("demo")(demo)
app.command("emulate")(emulate)
calibrating.add_to(app)
generating.add_to(app)
queue.add_to(app)
app.add_typer(adapters.app, name="adapters")
app.add_typer(backends.app, name="backends")
app.add_typer(replicas.app, name="replicas")
app.add_typer(checking.config_app, name="config")
app.add_typer(checking.policies_app, name="policies")
app.add_typer(state.app, name="state")
incidents.add_to(app)
simulating.add_to(app)
planning.add_to(app)

__all__ = ["app", "folders", "main", "run"]


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; what is expected to go wrong is told in one line."""
    as_json = "--json" in arguments
    try:
        code = get_command(app).main(versions.with_times(arguments), prog_name="sidecar", standalone_mode=False)
        sys.stdout.flush()
        return int(code or Exit.OK)
    except CommandError as error:
        return tell(error, as_json)
    except BrokenPipeError:
        return _leave_quietly()
    except (SidecarError, OSError) as error:
        return tell(command_error_of(error), as_json)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except typer.TyperException as error:
        return _misused(error, as_json)


def _misused(error: Any, as_json: bool) -> int:
    """Tell a usage error; a group that was called without a command shows its help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return Exit.MISUSED
    context = getattr(error, "ctx", None)
    see = f' (see "{context.command_path} --help")' if context is not None else ""
    return tell(CommandError(f"{error.format_message().rstrip('.')}{see}", Exit.MISUSED), as_json)


def _leave_quietly() -> int:
    """Nobody reads on: let the interpreter's own flush at exit go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return Exit.FAILED


def main() -> None:
    """Run the command of this process's arguments; what a terminal cannot show is shown as "?"."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.exit(run(sys.argv[1:]))
