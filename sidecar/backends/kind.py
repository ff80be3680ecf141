"""A kind of backend as one record: whatever depends on the kind of an engine asks it, and nobody else knows.

A `Kind` is what a configuration names; its engines serve models of one or several kinds (`ModelKind`), which may not be
known before an engine is reached. `EngineFacts.kind` is a model's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple, Protocol

from sidecar.backends.api import Backend, Form, Prompt, Reply
from sidecar.backends.checks.finding import Finding, Target
from sidecar.backends.triton.loads import LoaderProcess
from sidecar.backends.triton.transport import NOT_SHARED, SharedMemory
from sidecar.config.backends import Backend as Entry
from sidecar.core.facts import EngineFacts


class Native(Enum):
    """The API whose requests a model takes as its client sent them, but for the adapter.

    Its backends answer in that API's own bytes (`api.Reply`). Those of KServe are asked its other verbs too
    (`Backend.call`).
    """

    KSERVE = "kserve"
    OPENAI = "openai"


@dataclass(frozen=True)
class Ask:
    """A request in the words of no engine. `text` or else `token_ids` is the prompt.

    None is the engine's own default. `model` is the name that its client gave, for answers that repeat it.
    """

    text: str | None
    token_ids: Sequence[int] = ()
    max_tokens: int = 1
    model: str = ""
    stop_words: tuple[str, ...] = ()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    ignore_eos: bool = False


class Piece(NamedTuple):
    """What one reply adds to an answer: text or token ids, and how many tokens that is."""

    text: str = ""
    token_ids: Sequence[int] = ()
    tokens: int = 0


class Reader(Protocol):
    """Reads the replies of one answer, in order."""

    def read(self, reply: Reply) -> Piece: ...


@dataclass(frozen=True)
class Asking:
    """How an `Ask` is put to a model, and its answer read.

    `write(ask, streams)` gives the request without its adapter, which the backend adds when it is sent; `why_not(ask)`
    says what of it the model has no input for, "" if nothing: then all of it is written. `prompts` are the kinds of
    prompt that the model takes. `reader(is_text)` reads one answer: `is_text` for a text prompt, whose answer is text.

    What is written here may be written in another process, so all three are functions of a module.
    """

    write: Callable[[Ask, bool], Form]
    why_not: Callable[[Ask], str]
    reader: Callable[[bool], Reader]
    prompts: frozenset[Prompt] = frozenset(Prompt)


@dataclass(frozen=True, eq=False)
class ModelKind:
    """A kind of model: what it can be asked, and how. One with neither `native` nor `asking` can be asked nothing."""

    name: str
    """Its name, which no other kind's model has: `EngineFacts.kind`, and `Payload.kind` of what is written for it."""
    title: str = ""
    """What people call it, in errors."""
    native: Native | None = None
    asking: Asking | None = None
    """How requests of ours are put to it: by `Generate`, and by the OpenAI API where it is not native to that."""
    recognises: Callable[[Callable[[str], int | None]], bool] | None = None
    """Whether a client's KServe request is for this model, where engines of several may have it: by the rank of its
    inputs, `rank(name)`, which is None for an input that is not there. The first model that says yes gets it.
    """
    text_model: str = ""
    """The model beside it that takes text for it, where it may be absent."""
    reads_files: bool = False
    """Whether it reads adapters from a folder, in place of being sent packed weights."""
    page_is_adapter: bool = False
    """Whether a page of its cache is room for one adapter, of any size."""
    pages: str = "the engine has {host} in its host cache and {device} on the device"
    """Says how many pages there are."""


@dataclass(frozen=True)
class Wiring:
    """What a process lends to its backends: most kinds need none of it.

    `loader` sends packed weights to Triton by another process, `memory` is where they lie for engines of this machine;
    `owner` is this replica's id, "" where there is one only.
    """

    loader: LoaderProcess
    memory: SharedMemory = NOT_SHARED
    owner: str = ""


@dataclass(frozen=True)
class CheckStep:
    """One check: the earlier ones that it rests on, the kind of model that it is for, the seconds that it may take."""

    name: str
    run: Callable[[Any], Awaitable[Finding]]
    needs: tuple[str, ...] = ()
    limit_s: float = 15.0
    kind: str | None = None


@dataclass(frozen=True)
class Checks:
    """What is asked of a live engine before it is trusted.

    `open` makes the look that the steps share; its `facts` are those declared, filled with what was found. `target`
    gives the fields of a `Target` that are this kind's own.
    """

    steps: tuple[CheckStep, ...]
    open: Callable[[Target], AbstractAsyncContextManager[Any]]
    target: Callable[[Any], dict[str, Any]]


def _declared_as_it_is(entry: Any, declared: EngineFacts, all_of_kind: Sequence[Any]) -> EngineFacts:
    return declared


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of backend.

    `declare(entry, declared, all_of_kind)` adds to what is declared of an engine what follows from its entry and the
    others of this kind; at least the kind of model to expect (`with_kind`), until the engine has said.

    `connect(entry, declared, wiring)` makes its backend, which reaches for the engine when it is started, and returns
    with it what is known of the engine until then: `declared`, or more.
    """

    name: str
    """What a configuration calls it: the first of its section's `SCHEMES`."""
    section: type[Entry]
    """How its entries of `backends` are read: a subclass with its own keys, `SCHEMES` and `ELSEWHERE`."""
    models: tuple[ModelKind, ...]
    connect: Callable[[Any, EngineFacts, Wiring], tuple[Backend, EngineFacts]]
    declare: Callable[[Any, EngineFacts, Sequence[Any]], EngineFacts] = _declared_as_it_is
    checks: Callable[[], Checks] | None = None
    """What `backends check` looks at; None where there is nothing to look at yet."""
    notes: Callable[[Any, EngineFacts], Iterator[str]] = lambda entry, declared: iter(())
    """What `config check` says of an entry: what it needs and is not given."""
    unchecked: Callable[[Sequence[str]], str] | None = None
    """Says of backends that adapters are loaded into, and whose base model's files nobody named, what follows."""


def write_for(ask: Ask, streams: Mapping[ModelKind, bool]) -> tuple[dict[str, Form], dict[str, str]]:
    """Return a request as each kind of model takes it that can answer it, and why each of the others can not.

    `streams` says of each kind whether it is to stream.
    """
    forms: dict[str, Form] = {}
    why_not: dict[str, str] = {}
    for kind, does_stream in streams.items():
        if kind.asking is None:
            continue
        reason = kind.asking.why_not(ask)
        if reason:
            why_not[kind.name] = reason
        else:
            forms[kind.name] = kind.asking.write(ask, does_stream)
    return forms, why_not


def with_kind(facts: EngineFacts, kind: ModelKind) -> EngineFacts:
    """Return the facts of an engine that serves a model of this kind."""
    return replace(facts, kind=kind.name, reads_files=kind.reads_files)
