"""What version 0.1.0 wrote, before the house was reordered, is read as it was then; `before/README.md` says what it is.

The product is reached by its command line only, and its files are read as plain files: nothing here knows which module
something is in. A name of a class, a field or an enum's value that journals have must not change.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import typer.main
from redis.asyncio import Redis

from sidecar.cli import app
from tests.kit.cli_runs import Ended, runner
from tests.kit.forked import python
from tests.kit.redis_servers import running as running_redis

BEFORE = Path(__file__).parent / "before"
EXAMPLES = Path(__file__).parents[2] / "examples"
EXPECTED = json.loads((BEFORE / "expected.json").read_text())
JOURNALS = tuple(EXPECTED["journals"])
NAMED_FILES = ("tls.crt", "tls.key", "ca.crt", "token", "chat.jinja")
READ_FILES = ("engine.json", "model.json")
FREE = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--http", "127.0.0.1:0")
PATIENCE_S = 30.0
PROSE = ("text", "message", "notes")
SINCE = ("late_ns",)
"""What explanations tell since these were recorded."""
MOMENTS_SINCE = ("taken_over",)
RENAMED = {"expires_after_ns": "bound_ns"}
"""What they call by another name since then."""

Command = Callable[..., Ended]


@pytest.fixture
def sidecar(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command of the product here, where the plug-in policies of the journals can be imported."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "custom-policy"))
    monkeypatch.syspath_prepend(str(BEFORE))
    return runner(capfd)


# Journals.


def replayed(sidecar: Command, path: Path) -> tuple[dict[str, Any], list[str]]:
    """Replay a journal; return its exit code and verdict, and the lines that its effects are printed as.

    Its plug-in policies are in no installed package, so they are allowed by name.
    """
    allowed = [f"--policy={name}" for name in ("patient:Patient", "largest_first:LargestFirst")]
    ended = sidecar("replay", str(path), "--effects", "--json", *allowed)
    verdict = json.loads(ended.err.splitlines()[-1])
    assert "error" not in verdict, verdict
    del verdict["notes"]  # by which version it was written, for one
    return {"code": ended.code, **verdict}, ended.out.splitlines()


def written(path: Path, effect_lines: Sequence[str]) -> dict[str, list[str]]:
    """Return the names that a journal has: its events, effects and policies, and each enum's values."""
    events, effects, policies, enums = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for line in segment_lines(path):
        record = json.loads(line)
        events.update([record["event"]["!"]] if record.get("event") else [])
        policies.update(f"{kind} {name}" for kind, name in record.get("policies", {}).items())
        enums.update(enums_in(record))
    for line in effect_lines:
        made = json.loads(line)["effects"]
        effects.update(effect["!"] for effect in made)
        enums.update(enums_in(made))
    return {"events": sorted(events), "effects": sorted(effects), "policies": sorted(policies), "enums": sorted(enums)}


def segment_lines(path: Path) -> Iterator[bytes]:
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None and "/journal/segment-" in member.name:
                yield from (line for line in file if line.endswith(b"\n"))


def enums_in(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for each in value:
            yield from enums_in(each)
    elif isinstance(value, dict):
        if isinstance(value.get("="), str):
            yield f"{value['!']}.{value['=']}"
        else:
            for each in value.values():
                yield from enums_in(each)


@pytest.mark.parametrize("name", JOURNALS)
def test_journals_give_the_effects_that_were_recorded(name: str, sidecar: Command) -> None:
    """Every step of each, and where the core raised it raises the same; and they hold what the coverage says."""
    verdict, lines = replayed(sidecar, BEFORE / name)
    assert verdict == EXPECTED["journals"][name]
    assert written(BEFORE / name, lines) == EXPECTED["written"][name]


def test_the_journals_hold_every_event_and_effect() -> None:
    """All of the core's as they were named then, together; what they lack of the enums is listed."""
    for kind in ("events", "effects"):
        held = {name for journal in JOURNALS for name in EXPECTED["written"][journal][kind]}
        assert held == set(EXPECTED["all"][kind])
    held = {name for journal in JOURNALS for name in EXPECTED["written"][journal]["enums"]}
    assert set(EXPECTED["all"]["enums"]) - held == set(EXPECTED["not covered"])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b'"!":"Received"', b'"!":"Arrived"', "an event that this version does not know ('Arrived')"),
        (b'"!":"RunEnded","request"', b'"!":"RunEnded","number"', "an event that this version does not know"),
        (b'"effects":"', b'"effects":"0', "differs: effects expected 0"),
    ],
)
def test_another_name_is_noticed(old: bytes, new: bytes, words: str, sidecar: Command, tmp_path: Path) -> None:
    """A class or a field that is called otherwise, or other effects, end the replay."""
    segment = tmp_path / "segment-000000001.jsonl"
    segment.write_bytes(b"".join(line.replace(old, new) for line in segment_lines(BEFORE / "crashed.tgz")))
    ended = sidecar("replay", str(segment))
    assert ended.code == 1
    assert words in ended.out + ended.err


# Explanations.


def explained(sidecar: Command, path: Path, request: str) -> dict[str, Any]:
    """Return why a request waited, without the sentences for people and what is told since then."""
    told = sidecar("replay", str(path), "--explain", request, "--json").json()
    told["timeline"] = [
        {key: each[key] for key in each if key not in PROSE}
        for each in told["timeline"]
        if each["what"] not in MOMENTS_SINCE
    ]
    return {RENAMED.get(key, key): told[key] for key in told if key not in (*PROSE, *SINCE)}


def unpacked(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("request_id", EXPECTED["explained"]["capture.tgz"])
def test_a_capture_explains_its_requests(request_id: str, sidecar: Command) -> None:
    """By the ids that their clients gave them."""
    told = explained(sidecar, BEFORE / "capture.tgz", request_id)
    assert told == EXPECTED["explained"]["capture.tgz"][request_id]


def test_every_reason_to_wait_is_explained(sidecar: Command, tmp_path: Path) -> None:
    """One world for one or more reasons; together they have each."""
    folder = unpacked(BEFORE / "waits.tgz", tmp_path) / "waits" / "journal"
    reasons: set[str] = set()
    for segment, requests in EXPECTED["explained"]["waits.tgz"].items():
        for request, expected in requests.items():
            assert explained(sidecar, folder / segment, request) == expected
            reasons |= set(expected["reasons_ns"])
    assert sorted(reasons) == EXPECTED["all"]["reasons to wait"]


# Configuration and commands.


def checked(sidecar: Command, folder: Path) -> Any:
    """Return the configuration that has every key, as it would be served, with its files in a folder."""
    for name in NAMED_FILES:
        (folder / name).touch()
    for name in READ_FILES:
        shutil.copy(BEFORE / name, folder)
    file = folder / "config.yaml"
    file.write_text((BEFORE / "config.yaml").read_text().replace("FOLDER", str(folder)))
    ended = sidecar("config", "check", str(file), "--json")
    return json.loads(ended.out.replace(str(folder), "FOLDER")) if ended.code == 0 else ended.err


def keys_of(record: Any, at: str = "") -> Iterator[str]:
    if isinstance(record, dict) and record:
        for key, value in record.items():
            yield from keys_of(value, f"{at}.{key}" if at else key)
    elif isinstance(record, list) and record and isinstance(record[0], dict):
        for number, value in enumerate(record):
            yield from keys_of(value, f"{at}.{number}")
    else:
        yield f"{at} = {json.dumps(record)}"


TRITONS_OWN = ("model", "text_model", "models", "metrics", "weights_transport")
VLLMS_OWN = ("api_key_file", "old_versions")


def test_every_key_of_the_configuration_is_read_as_it_was(sidecar: Command, tmp_path: Path) -> None:
    """Later versions may know more keys, and none less. A backend shows the keys of its own kind only, from 0.2 on."""
    now = checked(sidecar, tmp_path)
    assert isinstance(now, dict), now
    before = json.loads(json.dumps(EXPECTED["config"]))
    for backend in before["backends"]:
        is_vllm = (backend["kind"] or backend["url"]).startswith("vllm")
        for key in TRITONS_OWN if is_vllm else VLLMS_OWN:
            del backend[key]
    assert set(keys_of(before)) <= set(keys_of(now))


CONFIGURATIONS = sorted(file for file in EXAMPLES.rglob("*.yaml") if "\nkind: " not in f"\n{file.read_text()}")
"""The examples' files that are not objects of Kubernetes."""


@pytest.mark.parametrize("file", CONFIGURATIONS, ids=lambda file: file.parent.name)
def test_the_examples_configurations_are_accepted(file: Path, sidecar: Command) -> None:
    """Those of the chart are rendered and checked in tests/e2e/helm."""
    ended = sidecar("config", "check", str(file))
    assert ended.code == 0, ended.err


def commands() -> dict[str, list[str]]:
    """Return the options and arguments of each command."""
    root = typer.main.get_command(app)
    return dict(_commands(root, root.make_context("sidecar", [], resilient_parsing=True), ()))


def _commands(command: Any, context: Any, path: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    if not hasattr(command, "list_commands"):
        names = [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]
        yield " ".join(path), sorted({*names, *command.earlier_names()})
        return
    for name in command.list_commands(context):
        yield from _commands(command.get_command(context, name), context, (*path, name))


def test_every_command_takes_the_options_that_it_took() -> None:
    """Later versions may have more."""
    now = commands()
    for name, options in EXPECTED["commands"].items():
        assert set(options) <= set(now.get(name, ())), name


# Names, in a data directory and in Redis.


@asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[dict[str, Any]]:
    """Run a command of the product that serves; give the line in which it says that it is ready."""
    started = await python(
        "-m", "sidecar", *arguments, "--json", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        assert started.stdout is not None
        yield json.loads(await started.stdout.readline())
    finally:
        if started.returncode is None:
            started.send_signal(signal.SIGKILL)
        await started.wait()
        started.close()


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    """Run an engine that makes each answer from the id of the weights that it was given; give its address."""
    options = ("--compute", "none", "--time-scale", "0", "--grpc-port", "0", "--metrics-port", "0", "--json")
    with subprocess.Popen([sys.executable, "-m", "sidecar", "emulate", *options], stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        try:
            yield json.loads(started.stdout.readline())["grpc"]
        finally:
            started.kill()


async def command(sidecar: Command, *arguments: str) -> Any:
    """Return the JSON that a command prints, in a thread: what it asks may be served by this event loop."""
    ended = await asyncio.to_thread(sidecar, *arguments, "--json")
    assert ended.code == 0, ended.err
    return ended.json()


async def names(sidecar: Command, ready: dict[str, Any]) -> dict[str, Any]:
    """Return what is registered, by name, without where it happens to be now."""
    listed = await command(sidecar, "adapters", "list", "--admin", ready["admin"])
    passing = ("store", "backends", "requests", "held_s", "paused_s")
    for adapter in listed:
        for version in adapter["versions"]:
            version["labels"] = sorted(version["labels"])
    return {each["name"]: {key: value for key, value in each.items() if key not in passing} for each in listed}


async def answers(sidecar: Command, ready: dict[str, Any], *adapters: str) -> dict[str, Any]:
    """Ask each for some tokens; an answer is of the version that it is made with, and of no other."""
    asked = ("--tokens", "1,2,3", "--max-tokens", "4", "--tenant", "red", "--server", ready["data"])
    told = {name: await command(sidecar, "generate", name, *asked) for name in adapters}
    return {
        name: {"token_ids": answer["token_ids"], "digest": answer["origin"]["digest"]} for name, answer in told.items()
    }


async def test_a_data_directory_has_its_names_and_weights(sidecar: Command, engine: str, tmp_path: Path) -> None:
    """Versions, pins and allow lists are what they were, and packed weights of the disk tier have the ids that they
    had. The folders that the adapters were registered from are gone.
    """
    data = unpacked(BEFORE / "data.tgz", tmp_path) / "data"
    async with process("serve", "--backend", f"triton://{engine}", "--data", str(data), *FREE) as ready:
        assert await names(sidecar, ready) == EXPECTED["data directory"]["names"]
        expected = EXPECTED["data directory"]["answers"]
        assert await answers(sidecar, ready, *expected) == expected


async def restore(client: Redis, dump: list[dict[str, Any]]) -> None:
    """Put keys into a Redis as two replicas left them."""
    for held in dump:
        key, value = base64.b64decode(held["key"]), held["value"]
        match held["type"]:
            case "hash":
                await client.hset(key, mapping={_bytes(name): _bytes(text) for name, text in value})
            case "zset":
                await client.zadd(key, {_bytes(name): score for name, score in value})
            case "stream":
                for number, fields in value:
                    await client.xadd(key, {_bytes(name): _bytes(text) for name, text in fields}, id=number)
            case kind:
                raise AssertionError(f"{kind} is not restored here")


def _bytes(text: str) -> Any:
    return base64.b64decode(text)


async def owned(sidecar: Command, ready: dict[str, Any]) -> list[str]:
    listed = await command(sidecar, "replicas", "list", "--admin", ready["admin"])
    return [held["backend"] for each in listed if each["self"] for held in each["owns"]]


async def test_a_redis_has_its_names_and_leases(sidecar: Command, engine: str, tmp_path: Path) -> None:
    """A new replica lists what two of before registered, and takes over an engine when their lease is over."""
    async with running_redis(tmp_path / "redis") as redis:
        async with Redis(host="127.0.0.1", port=redis.port) as client:
            await restore(client, json.loads((BEFORE / "redis.json").read_text()))
        config = tmp_path / "replica.yaml"
        record = {
            "backends": [{"id": "trt-0", "url": f"triton://{engine}", "weights_transport": "grpc"}],
            "state": {"url": redis.url},
            "replicas": {"address": "127.0.0.1:0", "name": "r2", "lease_s": 1.0},
        }
        config.write_text(json.dumps(record))  # which is YAML too
        async with process("serve", "--config", str(config), *FREE) as ready:
            assert await names(sidecar, ready) == EXPECTED["redis"]["names"]
            async with asyncio.timeout(PATIENCE_S):
                while await owned(sidecar, ready) != ["trt-0"]:
                    await asyncio.sleep(0.2)
