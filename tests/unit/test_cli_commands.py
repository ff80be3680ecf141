"""The table of commands: its help lines are those of the commands, and only the command that is run is imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer import rich_utils

from sidecar.cli import run
from sidecar.cli.commands import COMMANDS, GROUPS, imported
from sidecar.cli.serving import _ready
from sidecar.config import Config

WITH_MODULES = """
import json, sys
from sidecar.cli import run
code = run(sys.argv[1:])
print(json.dumps({"code": code, "modules": sorted(sys.modules)}), file=sys.stderr)
"""
OF_OTHERS = (
    "numpy",
    "yaml",
    "starlette",
    "uvicorn",
    "httpx",
    "aiohttp",
    "httptools",
    "fsspec",
    "redis",
    "safetensors",
    "jinja2",
)
"""Libraries that no command needs to ask a sidecar."""
CLIENT = {"cli", "errors", "proto"}
"""Rooms that a command needs to ask a sidecar."""


def modules_of(*arguments: str, code: int = 0) -> set[str]:
    """Return the modules that a command has imported by its end, and check its exit code."""
    ended = subprocess.run([sys.executable, "-c", WITH_MODULES, *arguments], capture_output=True, text=True)
    told: dict[str, Any] = json.loads(ended.stderr.splitlines()[-1])
    assert told["code"] == code, ended.stderr
    return set(told["modules"])


SAID_BETTER = {"--backend"}
"""What is not the same thing in every command: `serve` takes engines by their URLs, others by their ids."""


def rooms(modules: set[str]) -> set[str]:
    return {name.split(".")[1] for name in modules if name.startswith("sidecar.")}


def test_the_openai_api_is_named_with_its_path() -> None:
    """A client's base URL ends with /v1: the ready line and the help of `--http` say so."""
    listening = SimpleNamespace(probes=None, endpoint_picker="")
    gateway = SimpleNamespace(state=SimpleNamespace(names={}))
    sidecar = SimpleNamespace(
        data_address="h:9000", admin_address="h:9001", http_address="h:9002", listening=listening, gateway=gateway
    )
    assert "OpenAI's API on h:9002/v1, " in _ready(sidecar, Config(), as_json=False)
    (option,) = [each for each in imported("serve").params if "--http" in each.opts]
    assert "/v1" in option.help


@pytest.mark.parametrize("words", COMMANDS)
def test_no_word_of_a_help_is_cut_at_80_columns(
    words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options, values and explanations: each word is whole in a line, and no line is longer."""
    monkeypatch.setattr(rich_utils, "MAX_WIDTH", 80)
    assert run([*words.split(), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    command = imported(words)
    said = [command.help, *(getattr(option, "help", None) or "" for option in command.params)]
    said += [" ".join((*option.opts, *option.secondary_opts)) for option in command.params if "--" in option.opts[0]]
    cut = [word for word in " ".join(said).split() if not any(word in line for line in lines)]
    assert not cut
    assert not [line for line in lines if re.search(r"\w…", line)]


def test_a_value_is_called_the_same_in_every_help() -> None:
    """In capitals, and by one word wherever an option of a name takes the same type; flags and choices have none."""
    called: dict[tuple[str, str], set[str | None]] = {}
    for words in COMMANDS:
        for each in imported(words).params:
            kind = str(each.type_descriptor.annotation).removeprefix("list[").removesuffix("]")
            called.setdefault((each.opts[0], kind), set()).add(each.metavar)
    metavars = {metavar for found in called.values() for metavar in found if metavar is not None}
    assert {metavar for metavar in metavars if metavar != metavar.upper()} == set()
    assert called[("--admin", str(str))] == {"HOST:PORT"}
    assert called[("name", str(str))] == called[("adapter", str(str))] == called[("--adapter", str(str))] == {"NAME"}
    assert called[("--config", str(Path))] == called[("--token-file", str(Path))] == {"PATH"}
    assert {option[0] for option, found in called.items() if len(found) > 1} == SAID_BETTER


@pytest.mark.parametrize("words", COMMANDS)
def test_the_table_has_the_first_paragraph_of_each_help(words: str) -> None:
    """A help line of a group is what the command's own help begins with."""
    assert " ".join(imported(words).help.split("\n\n")[0].split()) == COMMANDS[words][1]


def test_every_group_has_a_command() -> None:
    """A first word of two is a group with a help line, and each group has commands."""
    assert {words.split()[0] for words in COMMANDS if " " in words} == set(GROUPS)


@pytest.mark.parametrize("arguments", [("--version",), ("--help",), ("adapters", "--help")])
def test_what_needs_no_command_imports_none(arguments: tuple[str, ...]) -> None:
    """The version and the help of groups take the table alone: no command, no gRPC."""
    modules = modules_of(*arguments)
    assert rooms(modules) == {"cli", "errors"}
    assert {name for name in modules if name.startswith("sidecar.cli.")} == {
        "sidecar.cli.commands",
        "sidecar.cli.exits",
    }
    assert not modules & {"grpc", "google.protobuf", *OF_OTHERS}
    if "--version" in arguments:
        assert "rich" not in modules


@pytest.mark.parametrize("arguments", [("queue",), ("adapters", "list"), ("replicas", "list")])
def test_a_question_imports_what_asks_it(arguments: tuple[str, ...]) -> None:
    """A command that asks a sidecar imports gRPC, its messages and tables: nothing that serves, packs or simulates."""
    modules = modules_of(*arguments, "--admin", "127.0.0.1:1", code=4)
    assert rooms(modules) - {"model"} == CLIENT
    assert "grpc" in modules
    assert not modules & set(OF_OTHERS)
    assert not modules & {"policies", "sidecar.cli.serving", "sidecar.cli.simulating"}


@pytest.mark.parametrize("words", ["serve", "demo", "adapters inspect", "config check", "replay", "debug capture"])
def test_the_help_of_what_works_here_imports_its_file_alone(words: str) -> None:
    """What a command does in this process is imported when it does it."""
    assert rooms(modules_of(*words.split(), "--help")) == {"cli", "errors"}
