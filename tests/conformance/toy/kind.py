"""The backend kind `toy`, as another package would write it: its keys, how it is connected to, what it can be asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from sidecar.backends.api import Backend
from sidecar.backends.kind import Kind, ModelKind, Native, Wiring, with_kind
from sidecar.config.backends import Backend as Entry
from sidecar.core.facts import EngineFacts
from tests.conformance.toy.asking import ASKING, ASKING_KSERVE

PAGES = "the engine has {device} slots"
MODEL = ModelKind(
    name="toy", title="the toy engine", asking=ASKING, reads_files=True, page_is_adapter=True, pages=PAGES
)
KSERVE_MODEL = ModelKind(
    name="toy_kserve",
    title="the toy engine's KServe model",
    native=Native.KSERVE,
    asking=ASKING_KSERVE,
    recognises=lambda rank: rank("text_input") == 1 and rank("max_tokens") == 1,
    reads_files=True,
    page_is_adapter=True,
    pages=PAGES,
)


class ToyEntry(Entry):
    """A toy engine, by `toy://HOST:PORT`. `speaks` is the model that it has, which it is held to."""

    SCHEMES: ClassVar = {"toy": False}
    ELSEWHERE: ClassVar = {"triton://": {"engine.tp": "a toy engine has one rank"}}

    speaks: Literal["toy", "kserve"] = "toy"

    @property
    def model(self) -> ModelKind:
        return MODEL if self.speaks == "toy" else KSERVE_MODEL


def _declare(entry: ToyEntry, declared: EngineFacts, all_of_kind: Sequence[ToyEntry]) -> EngineFacts:
    return with_kind(declared, entry.model)


def _connect(entry: ToyEntry, declared: EngineFacts, wiring: Wiring) -> tuple[Backend, EngineFacts]:
    from tests.conformance.toy.backend import ToyBackend

    return ToyBackend(entry, declared), declared


def _notes(entry: ToyEntry, declared: EngineFacts) -> Iterator[str]:
    if entry.adapters_dir is None:
        yield "adapters_dir: without it the engine serves its base model only"


TOY = Kind("toy", ToyEntry, (MODEL, KSERVE_MODEL), _connect, _declare, notes=_notes)
