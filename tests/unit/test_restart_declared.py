"""What an entry may say about restarts, and when other engines serve all that one serves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sidecar.backends.registry import entries_of
from sidecar.config import parse
from sidecar.config.backends import Backend as Entry
from sidecar.core import events as ev
from sidecar.core.state import Backend
from sidecar.errors import Misused
from sidecar.serve.restarting import others_serve
from tests.kit.corekit import World, adapter_of, facts_of, with_facts
from tests.kit.trtllm_emulated import BASE_CONFIG

SLICES = {"endpoint_slices": {"service": "trtllm", "port": 8000}}
DRAIN = {"host_versions_max": 100, "host_versions_on_limit": "drain"}


def entry(folder: Path, **keys: Any) -> Entry:
    (folder / "base.json").write_text(json.dumps(BASE_CONFIG))
    record = {
        "id": "t",
        "kind": "trtllm",
        "adapters_dir": str(folder),
        "base_model": {"name": "tiny", "config": str(folder / "base.json")},
        "lora_config": {"max_loras": 2},
    }
    where = {} if "discover" in keys else {"url": "trtllm://gpu:8000"}
    return entries_of(parse({"backends": [record | where | keys]}, "the test"))[0]


def test_a_restart_that_is_declared(tmp_path: Path) -> None:
    """It is there for engines to be drained at their limit, and not for others."""
    restart = {"command": ["systemctl", "restart", "trtllm"]}
    declared = entry(tmp_path, restart=restart, **DRAIN).restart_when_out
    assert declared is not None
    assert declared.command == ("systemctl", "restart", "trtllm")
    assert entry(tmp_path, restart=restart, host_versions_max=100).restart_when_out is None
    assert entry(tmp_path).restart_when_out is None


def test_each_engine_of_a_pool_is_restarted_as_the_pool_says(tmp_path: Path) -> None:
    pool = entry(tmp_path, restart={"delete_pod": True}, discover=SLICES, **DRAIN)
    restart = pool.at("trtllm-0", "10.0.0.1:8000").restart_when_out
    assert restart is not None
    assert restart.delete_pod


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"host_versions_on_limit": "drain", "restart": {"command": ["x"]}}, "drain needs host_versions_max"),
        (DRAIN, "drain needs a way to restart the engine: restart: {command: [PROGRAM, ARGUMENT]}"),
        ({"restart": {}}, "restart: it needs one of command and delete_pod"),
        ({"restart": {"command": ["x"], "delete_pod": True}}, "restart: it needs one of command and delete_pod"),
        ({"restart": {"command": []}}, "restart: it needs one of command and delete_pod"),
        ({"restart": {"command": [""]}}, "restart.command.0"),
        ({"restart": {"command": "x"}}, "restart.command: it must be a list"),
        ({"restart": {"delete_pod": True}}, "restart.delete_pod: pods are known by name only"),
        ({"restart": {"delete_pod": True}, "discover": {"dns": "gpu:8000"}}, "pods are known by name only"),
        ({"host_versions_max": 9}, "host_versions_max"),
    ],
)
def test_what_is_refused(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(Misused) as refused:
        entry(tmp_path, **keys)
    assert words in refused.value.message


def replaceable(world: World, backend: str = "b0") -> bool:
    def takes(other: Backend) -> bool:
        return other.takes_requests

    return others_serve(world.core.state, world.core.state.backends[backend], takes)


def test_one_engine_alone_cannot_be_spared() -> None:
    assert not replaceable(World(engines=1))
    assert replaceable(World(engines=2))


@pytest.mark.parametrize("trouble", ["lost", "drained", "leaving", "another's"])
def test_an_engine_that_takes_nothing_serves_nothing(trouble: str) -> None:
    world = World(engines=2)
    world.register("sql")
    if trouble == "lost":
        world.lose("b1")
    elif trouble == "drained":
        world.feed(ev.DrainSet("b1", True))
    elif trouble == "leaving":
        world.leave("b1")
    else:
        world.core.state.backends["b1"].owned = False
    assert not replaceable(world)


def test_each_adapter_needs_another_engine_but_not_the_same_one() -> None:
    """Two engines that hold smaller ranks, and one of them a larger one, serve it together."""
    world = World(engines=0)
    world.add_engine("b0", with_facts(facts_of(), rank_max=32))
    world.add_engine("b1", with_facts(facts_of(), rank_max=8))
    world.register_as("small", adapter_of("small", 8))
    assert replaceable(world)
    world.register_as("large", adapter_of("large", 32))
    assert not replaceable(world)
    assert replaceable(world, "b1")
    world.add_engine("b2", with_facts(facts_of(), rank_max=64))
    assert replaceable(world)


def test_an_adapter_that_it_cannot_serve_needs_nobody() -> None:
    world = World(engines=0)
    for backend in ("b0", "b1"):
        world.add_engine(backend, with_facts(facts_of(), rank_max=8))
    world.register_as("large", adapter_of("large", 32))
    assert replaceable(world)


def test_an_engine_of_another_base_model_serves_nothing_of_it() -> None:
    """Requests for the base model count as well, where no adapter is registered."""
    world = World(engines=1)
    world.add_engine("b1", with_facts(facts_of(), base_models=("another",)))
    assert not replaceable(world)


def test_it_is_the_same_while_it_is_drained() -> None:
    """What it served before is looked at: drained, it serves nothing."""
    world = World(engines=2)
    world.register("sql")
    world.feed(ev.DrainSet("b0", True))
    assert replaceable(world)
    world.lose("b1")
    assert not replaceable(world)
