"""The core and the messages between replicas hold values: no event, effect, cause or state has a sentence of ours."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import pytest
from google.protobuf.descriptor import FieldDescriptor

from policies.record import record
from sidecar.config.plugins import policies_of
from sidecar.core.causes import Said
from sidecar.core.core import Core
from sidecar.core.effects import Effect
from sidecar.core.events import Event
from sidecar.journal import codec
from sidecar.model.quote import Quote
from sidecar.proto import peers_pb2
from tests.golden.make_worlds import FOLDER

IDS = {
    "adapter", "asked", "backend", "backends", "base_model", "base_models", "client_id", "digest", "dtype", "id", "key",
    "klass", "known", "lost", "model", "models", "module", "modules", "name", "names", "near", "needs", "only",
    "origin", "packed_key", "pool", "pools", "replica", "replicas", "served", "session", "tenant", "tenants",
    "trained_on", "version", "versions",
}  # fmt: skip
"""Fields that hold names and ids which clients, operators, trainers or engines chose."""
LABELS = {"cause", "error", "fault", "kind", "missing", "reason", "together", "unloads", "what", "why"}
"""Fields that hold a word of a closed set, or the name of a class."""
CONFIGURED = {"classes", "disk_eviction", "eviction", "ordering", "prefetch", "raise_on", "routing", "tenant_weights"}
OF_MESSAGES = {
    "answer_id", "ending", "exchange", "member", "peer", "purpose", "resident", "restarting", "state", "url", "value",
}  # fmt: skip
"""More of these in messages between replicas; a value of metadata is the client's."""
QUOTES = {"failed"}
"""What a proxy said of an answer."""


def texts_in(hint: Any, value: Any) -> Iterator[str]:
    """Yield the strings in a value of the core, quotes and enums aside."""
    if hint == Quote or isinstance(value, Enum):
        return
    if isinstance(value, str):
        yield value
    elif isinstance(value, msgspec.Struct) or is_dataclass(value):
        of = get_type_hints(type(value), include_extras=True)
        names = value.__struct_fields__ if isinstance(value, msgspec.Struct) else [each.name for each in fields(value)]
        for name in names:
            yield from texts_in(of[name], getattr(value, name))
    elif isinstance(value, dict):
        key, inner = (*get_args(hint), None, None)[:2]
        for name, each in value.items():
            yield from texts_in(key, name)
            yield from texts_in(inner, each)
    elif isinstance(value, list | tuple | set):
        inner, *_ = get_args(hint) or (None,)
        for each in value:
            yield from texts_in(inner, each)


def is_sentence(text: str) -> bool:
    """Return True for three words or more: ids have no spaces, and labels at most two words."""
    return len(text.split()) > 2


def text_fields(*roots: Any) -> set[str]:
    """Return the names of the fields with strings that are no quotes, in the records that some types are made of."""
    found: set[str] = set()
    seen: set[Any] = set()
    hints = list(roots)
    while hints:
        hint = hints.pop()
        hints += () if hint == Quote else get_args(hint)
        if hint in seen or not (is_dataclass(hint) or (isinstance(hint, type) and issubclass(hint, msgspec.Struct))):
            continue
        seen.add(hint)
        for name, each in get_type_hints(hint, include_extras=True).items():
            hints.append(each)
            if each != Quote and (each is str or str in get_args(each)):
                found.add(name)
    return found


def test_each_string_of_an_event_or_an_effect_is_an_id_a_label_or_a_quote() -> None:
    """A field that is in no table holds a sentence, or a name that belongs into one."""
    assert text_fields(Event, Effect) - IDS - LABELS <= CONFIGURED


@record(frozen=True, slots=True)
class Spoken:
    """What no record of the core may be."""

    message: str


def test_a_sentence_would_be_seen() -> None:
    (said,) = texts_in(Spoken, Spoken("the engine is full; try again"))
    assert is_sentence(said)
    assert text_fields(Spoken) == {"message"}
    assert not list(texts_in(Said, Said("the engine is full; try again")))
    assert text_fields(Said) == set()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.jsonl.gz")), ids=lambda path: path.name[:3])
def test_recorded_worlds_have_no_sentence(path: Path) -> None:
    """Neither in what goes into the core, nor in what comes out, nor in what stays."""
    first, *steps = (json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines())
    config = codec.config_of(first["config"])
    core = Core(config, policies_of(config))
    for step in steps:
        event = codec.event_of(step["event"])
        for value in (event, *core.step(event, step["at"])):
            assert not [text for text in texts_in(type(value), value) if is_sentence(text)]
    assert not [text for text in texts_in(type(core.state), core.state) if is_sentence(text)]


def test_replicas_send_each_other_values() -> None:
    """Besides what a proxy said; an ending is a Settle's cause."""
    found = {
        field.name
        for message in peers_pb2.DESCRIPTOR.message_types_by_name.values()
        for field in message.fields
        if field.type == FieldDescriptor.TYPE_STRING
    }
    assert found - IDS - LABELS - QUOTES == OF_MESSAGES
