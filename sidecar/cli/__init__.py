"""The command line, `sidecar`. `commands` lists the commands; each other file implements one or a few of them."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any

import typer
from typer.main import get_command

from sidecar.cli.commands import Group
from sidecar.cli.exits import EXPLAINED, CommandError, Exit, command_error_of, tell
from sidecar.errors import SidecarError

app = typer.Typer(
    name="sidecar",
    cls=Group,
    help="One process in front of stock LLM engines: clients name a LoRA adapter and nothing else.",
    epilog=EXPLAINED,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"lora-sidecar {version('lora-sidecar')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """The options that precede any command."""


HOLD, HOLD_DEFAULT = "--hold", "1h"
COMPLETION_VARIABLE = "_SIDECAR_COMPLETE"
"""Names the shell that asks for completions: complete_bash, complete_zsh and so on."""


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; an expected failure prints one line."""
    as_json = "--json" in arguments
    try:
        with _whole_words():
            code = get_command(app).main(with_times(arguments), prog_name="sidecar", standalone_mode=False)
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


def with_times(arguments: Sequence[str]) -> list[str]:
    """Return the command line with a duration added to a --hold that has none."""
    following = [*arguments[1:], "-"]
    return [
        f"{HOLD}={HOLD_DEFAULT}" if word == HOLD and after.startswith("-") else word
        for word, after in zip(arguments, following, strict=False)
    ]


def _whole_words() -> AbstractContextManager[None]:
    if os.environ.get(COMPLETION_VARIABLE) != "complete_bash":
        return nullcontext()
    from sidecar.cli.bash_words import whole_words

    return whole_words()


def _misused(error: Any, as_json: bool) -> int:
    """Print a usage error; a group that was called without a command prints its help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return Exit.MISUSED
    context = getattr(error, "ctx", None)
    see = f' (see "{context.command_path} --help")' if context is not None else ""
    return tell(CommandError(f"{error.format_message().rstrip('.')}{see}", Exit.MISUSED), as_json)


def _leave_quietly() -> int:
    """Redirect stdout to /dev/null after a broken pipe, so that the interpreter's flush at exit does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return Exit.FAILED


def main() -> None:
    """Run the command in this process's arguments; characters that the terminal cannot show are printed as "?"."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if os.environ.get(COMPLETION_VARIABLE, "").startswith("complete_"):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # whatever gRPC logs would be written into the prompt
    sys.exit(run(sys.argv[1:]))
