"""Makes the golden journals: `python -m tests.golden.make_journals` adds a sample of each class that has none.

What is there stays as it is: it was written by an earlier release, whose journals have to be read. With `--again` the
journal and the incident are recorded anew; that is right only after a change of what the core decides, since they
would replay to other effects for ever after.
"""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import fields
from datetime import timedelta
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Union, get_args, get_origin, get_type_hints

from policies.id_queue import IdQueue
from sidecar.config import parse
from sidecar.core import effects as fx
from sidecar.core import events as ev
from sidecar.core.config import ClassLimit, CoreConfig
from sidecar.core.enums import Fault
from sidecar.core.facts import packed_for
from sidecar.core.pace import Pace
from sidecar.incident.capture import Wanted, capture
from sidecar.journal import codec
from sidecar.journal.snapshot import PolicySnapshot
from sidecar.journal.written_names import WRITTEN
from tests.kit.corekit import BLOB_BYTES, MS, SECOND, World, facts_of, with_facts
from tests.kit.journals import write_journal
from tests.properties.test_core_world import run_world

FOLDER = Path(__file__).parent / "journals"
JOURNAL, INCIDENT, SAMPLES = FOLDER / "journal", FOLDER / "incident.tgz", FOLDER / "samples.jsonl"
SEED = 50
"""Of a random world in which most kinds of events and effects occur; the scripted one has the others."""

# Samples: one of each class, with a value in every field, and one of each member of an enum.


WORDS = {"dtype": "bfloat16"}
"""Fields that do not take any word."""


def samples() -> Iterator[Any]:
    for cls in WRITTEN:
        yield from cls if issubclass(cls, Enum) else [sample_of(cls, "")]


def sample_of(hint: Any, name: str) -> Any:
    """Return a value of a type that says little but is never the field's default."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in (int, float, str, bool):
        return {int: 7, float: 0.25, str: WORDS.get(name, name), bool: True}[hint]
    if origin in (Union, types.UnionType):
        return sample_of(arguments[0], name)
    if origin is tuple:
        return tuple(sample_of(each, name) for each in arguments if each is not Ellipsis)
    if origin in (dict, Mapping):
        return {sample_of(arguments[0], name): sample_of(arguments[1], name)}
    if origin in (list, deque):
        return origin([sample_of(arguments[0], name)])
    if hint is None:
        return None
    if hint is IdQueue:
        return IdQueue([1, 2])
    if issubclass(hint, Enum):
        return next(iter(hint))
    hints = get_type_hints(hint)
    written = [each for each in fields(hint) if not each.metadata.get("derived")]
    return hint(
        **{
            each.name: PolicySnapshot([1]) if each.metadata.get("policy") else sample_of(hints[each.name], each.name)
            for each in written
        }
    )


def key_of(record: Mapping[str, Any]) -> tuple[str, str]:
    """Return what a written record is a sample of: a class, and the member where it is an enum."""
    return record["!"], record.get("=", "")


def add_samples() -> None:
    """Write a sample of each class and member that has none."""
    known = {key_of(json.loads(line)) for line in SAMPLES.read_text().splitlines()} if SAMPLES.exists() else set()
    lines = [codec.dumps(value) + "\n" for value in samples() if key_of(codec.encode(value)) not in known]
    with SAMPLES.open("a") as file:
        file.writelines(lines)


# Journals.


def record_again() -> None:
    """Write the journal and the incident anew."""
    shutil.rmtree(JOURNAL, ignore_errors=True)
    INCIDENT.unlink(missing_ok=True)
    write_journal(scripted(), JOURNAL, segment_bytes=8192)
    with TemporaryDirectory() as data:
        for world in (run_world(SEED), scripted()):
            write_journal(world, Path(data) / "journal", segment_bytes=30_000)
        config = parse({"backends": [{"url": "triton://engine-0:8001"}]}, "config.yaml")
        capture(Wanted(timedelta(hours=1), Path(data), config), INCIDENT)


def scripted() -> World:
    """Return a world that saw what random ones never do: two tiers, a silent engine, a move between replicas."""
    config = CoreConfig(
        store_bytes=2 * BLOB_BYTES, disk_bytes=8 * BLOB_BYTES, seat_slack=0.0, classes={"default": ClassLimit()}
    )
    world = _Tiers(config, engines=0)
    world.register("a0", "a1", "a2", "a3")
    world.pin("a0", True)
    packed = packed_for(world.adapters["a3"], facts_of(), 0)
    world.feed(ev.DiskHolds(packed.key, world.digest("a3"), packed.size_bytes))
    slow = with_facts(facts_of(), pace=Pace(prompt_token_ns=0.0))
    world.add_engine("b0", slow)
    world.add_engine("b1", facts_of(), owned=False, pool="p", fresh=True)
    world.feed(ev.BackendTaken("b1", 7))
    world.feed(ev.BackendPlanned("b1", (world.digest("a1"),)))
    world.engines["b0"].run_faults = [Fault.UNKNOWN_REGION]
    world.feed(ev.BackendMeasured("b0", 4, 1 << 20, 512))
    for number in range(12):
        world.send(f"a{number % 4}", tenant=f"t{number % 2}", client_id=f"c{number}")
        world.run(for_ns=10 * MS)
    world.feed(ev.ClientStalled(12))
    world.run()
    world.engines["b0"].run_ns = 5 * SECOND
    stays = [world.send("a0", only=("b0",)) for _ in range(3)]
    world.run(for_ns=SECOND)
    running = {request: 2 for request in stays if request in world.core.state.backends["b0"].running}
    world.feed(ev.Progress("b0", running))
    world.engines["b0"].frozen = True
    world.after(20 * SECOND, lambda: world.thaw("b0"))
    world.run()
    world.feed(ev.BackendGivenUp("b1", "another member is preferred"))
    world.feed(ev.ClientLeft(world.send("a2", only=("b1",)), moved=True))
    world.ask(lambda number: ev.PrefetchAsked(number, "a2", ("b0",)))
    world.ask(lambda number: ev.EvictAsked(number, "a1"))
    world.feed(ev.ReleaseAsked("a0"))
    world.feed(ev.AdapterUnregistered("a3"))
    world.feed(ev.ShutdownBegun())
    world.send("a0")
    world.remove("b1")
    world.run()
    return world


class _Tiers(World):
    """A world whose disk tier takes what it is given, but for the second adapter."""

    def _act(self, effect: fx.Effect) -> None:
        if isinstance(effect, fx.Spill):
            fails = effect.key.startswith(self.digest("a1"))
            self.after(
                MS, lambda: self.feed(ev.SpillFailed(effect.key, "no space") if fails else ev.Spilled(effect.key))
            )
        else:
            super()._act(effect)


if __name__ == "__main__":
    if "--again" in sys.argv[1:]:
        record_again()
    add_samples()
