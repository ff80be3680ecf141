"""The table of commands. A command's file is imported only when the command runs or prints its help.

So `sidecar queue` imports nothing that only `simulate` needs. Each file imports at its top what all of its commands
need; a slow import that only one of them needs is in that command's function.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from inspect import cleandoc
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

COMMANDS = {
    "serve": (
        "sidecar.cli.serving:serve",
        "Serve adapters in front of engines until SIGTERM, then finish running requests. Exit 70: the sidecar failed; "
        "restart it.",
    ),
    "demo": (
        "sidecar.cli.demo:demo",
        "Run a demo on this machine: emulated engines, eight adapters, and clients that know only names.",
    ),
    "emulate": (
        "sidecar.lab.engine.command:emulate",
        "Run an emulated engine: TensorRT-LLM behind Triton, or vLLM, SGLang or trtllm-serve behind their OpenAI APIs.",
    ),
    "calibrate": (
        "sidecar.cli.calibrating:calibrate",
        "Write a cost file: the step times for emulated and simulated engines, and for schedulers' estimates.",
    ),
    "generate": (
        "sidecar.cli.generating:generate",
        "Send a prompt to an adapter and print the answer as it arrives.",
    ),
    "queue": (
        "sidecar.cli.queue:queue",
        "Show who waits and runs, by adapter, tenant and backend, and why. The first line is the verdict.",
    ),
    "top": (
        "sidecar.cli.top.command:top",
        "Show the pool live: queue, engines and their slots, adapters, tenants, requests; keys cancel, pause, drain.",
    ),
    "usage": (
        "sidecar.cli.usage:usage",
        "Show what tenants have used: requests, tokens, hours of seats and slots, loads, and what it costs.",
    ),
    "replay": (
        "sidecar.cli.incidents:replay",
        "Replay a journal; exit 1 if any step gives other effects than the recorded ones.",
    ),
    "simulate": (
        "sidecar.cli.simulating:simulate",
        "Simulate a pool of engines and the sidecar in front of it in virtual time: throughput, waits and bounds.",
    ),
    "plan": (
        "sidecar.cli.planning:plan",
        "Plan a pool: the engines, adapter slots, cache fractions and bytes with which a load meets its goals.",
    ),
    "adapters promote": (
        "sidecar.cli.versions:promote",
        "Make one of a name's versions current, or give it a share of the requests.",
    ),
    "adapters rollback": (
        "sidecar.cli.versions:rollback",
        "Undo the last promotion: end a canary, or make the previous version current.",
    ),
    "adapters refresh": (
        "sidecar.cli.versions:refresh",
        "Make every engine load a fresh copy of a version, under a new task id.",
    ),
    "adapters watch": (
        "sidecar.cli.versions:watch",
        "Print changes of names as they happen, until interrupted.",
    ),
    "adapters verify": (
        "sidecar.cli.verifying:verify",
        "Verify by the backends' answers that an adapter takes effect; exit 0 if it does.",
    ),
    "adapters register": (
        "sidecar.cli.registering:register",
        "Check an adapter's files and register them under a name. New content becomes a new version.",
    ),
    "adapters list": (
        "sidecar.cli.adapters:list_adapters",
        "List the registered adapters: version, shape, and where each is.",
    ),
    "adapters show": (
        "sidecar.cli.adapters:show",
        "Show one adapter: its facts, its copies in the host store, and its state on each backend with age and source.",
    ),
    "adapters evict": (
        "sidecar.cli.adapters:evict",
        "Drop an adapter's weights now and keep its name; print what became of them where.",
    ),
    "adapters prefetch": (
        "sidecar.cli.adapters:prefetch",
        "Load an adapter into the host store, and onto the given backends.",
    ),
    "adapters unregister": (
        "sidecar.cli.adapters:unregister",
        "Refuse new requests for a name, wait until its running ones end, then forget it.",
    ),
    "adapters pin": (
        "sidecar.cli.adapters:pin",
        "Keep an adapter in the host store until it is unpinned.",
    ),
    "adapters unpin": (
        "sidecar.cli.adapters:unpin",
        "Undo a pin: the eviction policy may evict the adapter again.",
    ),
    "adapters release": (
        "sidecar.cli.adapters:release",
        "Lift a quarantine: the adapter's next load is tried alone in the whole pool.",
    ),
    "adapters pause": (
        "sidecar.cli.adapters:pause",
        "Refuse new requests for a name for a while, or until it is resumed; its running ones end as usual.",
    ),
    "adapters resume": (
        "sidecar.cli.adapters:resume",
        "End a pause: requests for the name are taken again.",
    ),
    "adapters inspect": (
        "sidecar.cli.folders:inspect",
        "Show the contents of a PEFT folder, its loss in each engine dtype, and which backends could serve it.",
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
        "Show one backend: seats, pages, open adapters, what pins them, and its last heals.",
    ),
    "backends check": (
        "sidecar.cli.backends:check",
        "Check a live engine step by step and say what to change; exit 1 if a check fails.",
    ),
    "backends drain": (
        "sidecar.cli.backends:drain",
        "Stop sending requests to a backend. Running ones end there; waiting ones go elsewhere.",
    ),
    "backends undrain": (
        "sidecar.cli.backends:undrain",
        "Return a drained backend to service.",
    ),
    "backends add": (
        "sidecar.cli.backends:add",
        "Add a backend to a running sidecar, until its configuration is read again or it ends: the file wins.",
    ),
    "backends remove": (
        "sidecar.cli.backends:remove",
        "Take a backend out of a running sidecar, until its configuration is read again or it ends: the file wins.",
    ),
    "login": (
        "sidecar.cli.login:login",
        "Keep a credential for the admin listener; later commands send it there, and the audit names you.",
    ),
    "logout": (
        "sidecar.cli.login:logout",
        "Forget the credential that is kept for the admin listener. A key stays good until it is revoked.",
    ),
    "whoami": (
        "sidecar.cli.login:whoami",
        "Show who the sidecar takes you for, and how that is proven.",
    ),
    "audit": (
        "sidecar.cli.audit:audit",
        "Show who changed what and who was denied what, as the asked replica recorded it; the newest come last.",
    ),
    "requests list": (
        "sidecar.cli.queue:list_requests",
        "List the requests that wait and run, the oldest first.",
    ),
    "requests show": (
        "sidecar.cli.queue:show",
        "Tell what a request waits for, or waited for, moment by moment: an open one, or one that ended lately.",
    ),
    "requests cancel": (
        "sidecar.cli.queue:cancel",
        "Cancel a request by its id, or all of an adapter, tenant or backend; clients are told that an operator did.",
    ),
    "replicas list": (
        "sidecar.cli.replicas:list_replicas",
        "List the replicas that this one knows: the backends that each owns, and the leader.",
    ),
    "keys create": (
        "sidecar.cli.access:create",
        "Make an API key and show it, once. The sidecar keeps only its SHA-256.",
    ),
    "keys list": (
        "sidecar.cli.access:list_keys",
        "List the API keys with their last use, ended and revoked ones included; never their secrets.",
    ),
    "keys revoke": (
        "sidecar.cli.access:revoke",
        "Revoke an API key for good, at once and on every replica that answers.",
    ),
    "limits set": (
        "sidecar.cli.limits:set_limit",
        "Set numbers of a limit, at once and on every replica, and print the whole limit that is then in force.",
    ),
    "limits list": (
        "sidecar.cli.limits:list_limits",
        "List the limits in force, and what is taken of each now.",
    ),
    "limits remove": (
        "sidecar.cli.limits:remove",
        "Remove a limit that was set with limits set; one of the configuration for the same counts again.",
    ),
    "access check": (
        "sidecar.cli.access:check",
        "Tell whether somebody may do something: exit 0 if allowed, 1 if denied.",
    ),
    "config check": (
        "sidecar.cli.checking:check_config",
        "Print the effective configuration, defaults and environment included; exit 2 with the fault.",
    ),
    "config show": (
        "sidecar.cli.configuring:show",
        "Print the configuration that a running sidecar has in force, defaults included.",
    ),
    "config reload": (
        "sidecar.cli.configuring:reload",
        "Have a running sidecar read its configuration file again, and print the keys that have changed.",
    ),
    "envoy config": (
        "sidecar.cli.envoy:print_config",
        "Print Envoy's configuration for a sidecar that picks engines for it.",
    ),
    "policies check": (
        "sidecar.cli.checking:check_policy",
        "Check a policy for conformance, purity and a golden trace.",
    ),
    "state migrate": (
        "sidecar.cli.state:migrate",
        "Copy names, API keys, limits and what budgets have taken, from a data directory to a Redis or back.",
    ),
    "state backup": (
        "sidecar.cli.backing_up:backup",
        "Write names, keys, limits and the usage of the data directory into one file. Sidecars may run meanwhile.",
    ),
    "state restore": (
        "sidecar.cli.backing_up:restore",
        "Put a backup into the data directory, or into the configuration's Redis. No sidecar may run on them.",
    ),
    "debug capture": (
        "sidecar.cli.incidents:capture",
        "Write journal, redacted configuration, engines' configs, metrics and versions into one file; never a prompt.",
    ),
}
"""Maps a command's words to its function and its line in the group's help. The line repeats the first paragraph of the
function's docstring (a test compares the two), so that the help needs no import.
"""

GROUPS = {
    "adapters": "Register adapters, see where they are, move and forget them.",
    "backends": "See backends, drain them and take them back, add and remove them.",
    "requests": "See the open requests, tell the story of one, and cancel some.",
    "replicas": "See the replicas of the pool.",
    "keys": "Make, list and revoke API keys.",
    "limits": "Set and see what requests may take.",
    "access": "Ask who may do what.",
    "envoy": "Configure an Envoy that carries the bytes while the sidecar decides.",
    "config": "Check a configuration, and see and reload that of a running sidecar.",
    "policies": "Check a policy.",
    "state": "Where names, keys and limits are kept.",
    "debug": "Keep what is needed to find out what went wrong.",
}


METAVARS = {
    "adapter": "NAME",
    "adapters": "PATH",
    "adapters-dir": "PATH",
    "address": "URL",
    "admin": "HOST:PORT",
    "admin-token-file": "PATH",
    "allow": "TENANT",
    "allowed-prefix": "PATH",
    "as": "TENANT",
    "backend": "BACKEND",
    "class": "CLASS",
    "client-id": "ID",
    "data-directory": "PATH",
    "expires": "TIME",
    "group": "GROUP",
    "host": "HOST",
    "http": "HOST:PORT",
    "issuer": "URL",
    "label": "KEY=VALUE",
    "last": "TIME",
    "listen": "HOST:PORT",
    "metrics": "URL",
    "name": "NAME",
    "path": "PATH",
    "probes": "HOST:PORT",
    "prompt": "PROMPT",
    "request-id": "ID",
    "role": "ROLE",
    "server": "HOST:PORT",
    "set": "KEY=VALUE",
    "since": "TIME",
    "tenant": "TENANT",
    "until": "TIME",
    "version": "NAME@VERSION",
}
BY_TYPE = {int: "N", float: "N", str: "TEXT", Path: "PATH"}
"""What a help calls the value of an option or argument: by its name where that has a word, else by its type. A command
may say it better, as `metavar`.
"""


MEANT = {"adapters push": "sidecar adapters register NAME FOLDER --push"}
"""What to type in place of commands that there are not, and that people look for."""


class Group(TyperGroup):
    """A group of commands that are imported one by one; `words` is the group's path, empty for the root.

    `commands` holds only names and help lines; `get_command` imports and returns a command.
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

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if (meant := MEANT.get(self._below + args[0])) is not None:
            ctx.fail(f'No such command {args[0]!r}. "{meant}" does it')
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._outline().format_help(ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        outline = self._outline()
        return outline.shell_complete(typer.Context(outline, info_name=ctx.info_name, parent=ctx.parent), incomplete)

    def _outline(self) -> TyperGroup:
        """Return this group with placeholder commands that have only names and help lines."""
        outline = TyperGroup()
        vars(outline).update(vars(self))
        return outline


@cache
def imported(words: str) -> Any:
    """Import and return the click command at these words."""
    module, _, name = COMMANDS[words][0].partition(":")
    alone = typer.Typer(add_completion=False)
    alone.command(words.rpartition(" ")[2])(getattr(import_module(module), name))
    command = get_command(alone)
    command.help = _unwrapped(command.help or "")
    for parameter in command.params:
        parameter.metavar = parameter.metavar or _metavar(parameter)
    return command


def _metavar(parameter: Any) -> str | None:
    """Return what the help calls a parameter's value; None for a flag, and for words of which the help lists all."""
    kind = parameter.type_descriptor.annotation
    kind = next(iter(get_args(kind)), kind) if get_origin(kind) is list else kind
    if kind in (str, Path):
        return METAVARS.get(parameter.opts[0].removeprefix("--"), BY_TYPE[kind])
    return BY_TYPE.get(kind)


def _unwrapped(text: str) -> str:
    """Return a help text with each paragraph in one line, for the terminal to wrap; indented lines stay as they are."""
    paragraphs = cleandoc(text).split("\n\n")
    return "\n\n".join(each if "\n " in f"\n{each}" else " ".join(each.split("\n")) for each in paragraphs)
