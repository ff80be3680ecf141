"""Which commands there are. The file of a command is imported when that command is run or asked for its help.

So `sidecar queue` imports nothing of what `simulate` needs. Each file here imports at its top what all of its commands
need; what one of them needs alone, and takes long to import, is imported in its function.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

COMMANDS = {
    "serve": (
        "sidecar.cli.serving:serve",
        "Serve adapters in front of engines until SIGTERM; then finish what is in flight and leave. Exit 70 says that "
        "the sidecar failed and must be started anew.",
    ),
    "demo": (
        "sidecar.cli.demo:demo",
        "Show it all on this machine: emulated engines, eight adapters, and clients that know names only.",
    ),
    "emulate": (
        "sidecar.lab.engine.command:emulate",
        "Run an emulated engine: TensorRT-LLM behind Triton's gRPC protocol, or vLLM behind its OpenAI API.",
    ),
    "calibrate": (
        "sidecar.cli.calibrating:calibrate",
        "Write a cost file: what emulated and simulated engines take their time from, and schedulers their estimates.",
    ),
    "generate": (
        "sidecar.cli.generating:generate",
        "Send a prompt to an adapter and print the answer as it comes.",
    ),
    "queue": (
        "sidecar.cli.queue:queue",
        "Say who waits, how long, against which bound, and why. The first line is the verdict.",
    ),
    "replay": (
        "sidecar.cli.incidents:replay",
        "Run a journal again; exit 1 if any step does not give the effects that were recorded.",
    ),
    "simulate": (
        "sidecar.cli.simulating:simulate",
        "Simulate a pool of engines and what stands before them: throughput, waits and bounds, in virtual time.",
    ),
    "plan": (
        "sidecar.cli.planning:plan",
        "Plan a pool: engines, adapter slots, cache fractions and bytes that a load needs for what its users expect.",
    ),
    "adapters promote": (
        "sidecar.cli.versions:promote",
        "Let a name stand for one of its versions, or give that version a share of the requests.",
    ),
    "adapters rollback": (
        "sidecar.cli.versions:rollback",
        "Undo the last promotion: end a share, or go back to the version before.",
    ),
    "adapters refresh": (
        "sidecar.cli.versions:refresh",
        "Have every engine take a fresh copy of a version, under a new task id.",
    ),
    "adapters watch": (
        "sidecar.cli.versions:watch",
        "Print changes of names as they happen, until interrupted.",
    ),
    "adapters verify": (
        "sidecar.cli.verifying:verify",
        "Ask the backends whether an adapter is really in force: exit 0 if it is.",
    ),
    "adapters register": (
        "sidecar.cli.registering:register",
        "Check an adapter's files and let a name stand for them. New content is a new version.",
    ),
    "adapters list": (
        "sidecar.cli.adapters:list_adapters",
        "List the registered adapters: version, shape, and where each is.",
    ),
    "adapters show": (
        "sidecar.cli.adapters:show",
        "Show one adapter: its facts, its copies in the host store, and each backend's belief with age and source.",
    ),
    "adapters evict": (
        "sidecar.cli.adapters:evict",
        "Drop an adapter's weights now. The name stays; the answer says what could not be done where.",
    ),
    "adapters prefetch": (
        "sidecar.cli.adapters:prefetch",
        "Bring an adapter into the host store, and onto the backends that are named.",
    ),
    "adapters unregister": (
        "sidecar.cli.adapters:unregister",
        "Take nothing new for a name, wait until what is under way is answered, then forget it.",
    ),
    "adapters pin": (
        "sidecar.cli.adapters:pin",
        "Keep an adapter in the host store until it is unpinned.",
    ),
    "adapters unpin": (
        "sidecar.cli.adapters:unpin",
        "Let the eviction policy have an adapter again.",
    ),
    "adapters release": (
        "sidecar.cli.adapters:release",
        "Lift a quarantine: the adapter's next load is its first, alone in the whole pool.",
    ),
    "adapters inspect": (
        "sidecar.cli.folders:inspect",
        "Show what a PEFT folder holds, what each engine dtype would make of it, and which backends could serve it.",
    ),
    "adapters convert": (
        "sidecar.cli.folders:convert",
        "Write a PEFT folder as TensorRT-LLM's model.lora_weights.npy [1,N,W] and model.lora_config.npy [1,N,3].",
    ),
    "backends list": (
        "sidecar.cli.backends:list_backends",
        "List the backends: state, seats, open adapters.",
    ),
    "backends show": (
        "sidecar.cli.backends:show",
        "Show one backend: seats, pages, open adapters, what is pinned by what, and its last heals.",
    ),
    "backends check": (
        "sidecar.cli.backends:check",
        "Look at a live engine, check by check, and say what to change; exit 1 when something fails.",
    ),
    "backends drain": (
        "sidecar.cli.backends:drain",
        "Send nothing new to a backend. What runs there ends there; what waits goes elsewhere.",
    ),
    "backends undrain": (
        "sidecar.cli.backends:undrain",
        "Take a drained backend back.",
    ),
    "replicas list": (
        "sidecar.cli.replicas:list_replicas",
        "List the replicas, as the one that is asked knows them: which backends each owns, and who leads.",
    ),
    "config check": (
        "sidecar.cli.checking:check_config",
        "Print the configuration as it would be served, defaults and environment included; exit 2 with what is wrong.",
    ),
    "policies check": (
        "sidecar.cli.checking:check_policy",
        "Run a policy through conformance, purity and a golden trace.",
    ),
    "state migrate": (
        "sidecar.cli.state:migrate",
        "Copy all names, with their versions, pins and log of changes, from a file to a Redis or back.",
    ),
    "debug capture": (
        "sidecar.cli.incidents:capture",
        "Write journal, redacted configuration, engines' configs, metrics and versions into one file; never a prompt.",
    ),
}
"""By its words: the function that is the command, and what the help of its group says of it. That is the first
paragraph of the function's docstring (a test compares the two), which need not be imported for it.
"""

GROUPS = {
    "adapters": "Register adapters, see where they are, move and forget them.",
    "backends": "See backends, drain them and take them back.",
    "replicas": "See the replicas of the pool.",
    "config": "Check a configuration.",
    "policies": "Check a policy.",
    "state": "Where registered names are kept.",
    "debug": "Keep what is needed to find out what went wrong.",
}


class Group(TyperGroup):
    """A group of commands that are imported one by one; `words` are the group's own, the root has none.

    `commands` has no more than their names and help lines. `get_command` returns the command itself.
    """

    def __init__(self, *, words: str = "", **attributes: Any) -> None:
        below = f"{words} ".lstrip()
        commands: dict[str, Any] = {
            each.removeprefix(below): TyperCommand(each.removeprefix(below), help=line)
            for each, (_, line) in COMMANDS.items()
            if each.startswith(below) and " " not in each.removeprefix(below)
        }
        if not words:
            commands |= {
                name: Group(words=name, name=name, help=line, no_args_is_help=True) for name, line in GROUPS.items()
            }
        super().__init__(**{**attributes, "commands": commands})
        self._below = below

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        found = self.commands.get(cmd_name)
        return found if found is None or isinstance(found, Group) else imported(self._below + cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._outline().format_help(ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        outline = self._outline()
        return outline.shell_complete(typer.Context(outline, info_name=ctx.info_name, parent=ctx.parent), incomplete)

    def _outline(self) -> TyperGroup:
        """Return this group with commands that know their names and help lines only."""
        outline = TyperGroup()
        vars(outline).update(vars(self))
        return outline


@cache
def imported(words: str) -> Any:
    """Return the click command of these words."""
    module, _, name = COMMANDS[words][0].partition(":")
    alone = typer.Typer(add_completion=False)
    alone.command(words.rpartition(" ")[2])(getattr(import_module(module), name))
    return get_command(alone)
