"""The record of a backend kind: whatever depends on an engine's kind asks it.

A configuration names a `Kind`. Its engines serve models of one or several kinds (`ModelKind`); which one may be unknown
until an engine is reached. `EngineFacts.kind` is the name of a `ModelKind`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple, Protocol

from sidecar.adapters.shared_memory import NOT_SHARED, SharedMemory
from sidecar.backends.api import Backend, Form, Prompt, Reply
from sidecar.backends.checks.finding import Finding, Target
from sidecar.backends.openai.paths import CHAT, COMPLETIONS
from sidecar.backends.triton.loads import LoaderProcess
from sidecar.config.backends import Backend as Entry
from sidecar.core.facts import EngineFacts


class Native(Enum):
    """The API whose requests a model takes as clients send them, apart from the adapter.

    Its backends answer in that API's bytes (`api.Reply`). Those of KServe also get its other verbs (`Backend.call`).
    """

    KSERVE = "kserve"
    OPENAI = "openai"


@dataclass(frozen=True)
class Ask:
    """A request independent of any engine. The prompt is `text`, or else `token_ids`.

    None means the engine's default. `model` is the client's own name for the model, which answers repeat.
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
    min_tokens: int | None = None
    logprobs: bool = False
    salt: str | None = None


class Piece(NamedTuple):
    """What one reply adds to an answer: text or token ids, their number of tokens, and where it was asked for the
    logarithm of each token's probability. The number is the engine's own if it `is_told`.
    """

    text: str = ""
    token_ids: Sequence[int] = ()
    tokens: int = 0
    logprobs: Sequence[float] = ()
    is_told: bool = False


class Reader(Protocol):
    """Reads the replies of one answer, in order."""

    def read(self, reply: Reply) -> Piece: ...


@dataclass(frozen=True)
class Asking:
    """How an `Ask` is put to a model, and its answer read.

    `write(ask, streams)` returns the request without its adapter, which the backend adds at dispatch. `why_not(ask)`
    says which part of it the model has no input for, "" if none; only then is it written. `prompts` are the kinds of
    prompt that the model takes. `reader(is_text)` returns a reader for one answer, which is text if the prompt is.

    Another process may call them, so all three must be functions or classes of a module.
    """

    write: Callable[[Ask, bool], Form]
    why_not: Callable[[Ask], str]
    reader: Callable[[bool], Reader]
    prompts: frozenset[Prompt] = frozenset(Prompt)


@dataclass(frozen=True, eq=False)
class ModelKind:
    """A kind of model: what it can be asked, and how. Without `native` and `asking` it can be asked nothing."""

    name: str
    """Unique name: `EngineFacts.kind`, and `Payload.kind` of requests written for it."""
    title: str = ""
    """Name for people, in errors."""
    native: Native | None = None
    asking: Asking | None = None
    """How our own requests are put to it: `Generate`'s, and those of the OpenAI API unless it is native to that."""
    recognises: Callable[[Callable[[str], int | None]], bool] | None = None
    """Returns True if a client's KServe request is for this model, by `rank(name)`, the rank of an input or None. The
    request goes to the first model that returns True.
    """
    why_not_client: Callable[[str, Mapping[str, Any]], tuple[str, str]] = lambda path, members: ("", "")
    """Returns the member of a client's OpenAI request (its path, its body's members) that the model does not take, and
    why; ("", "") if it takes all. The request then goes to other kinds, or is refused.
    """
    paths: tuple[str, ...] = (COMPLETIONS, CHAT)
    """The paths of the OpenAI API that its engines may serve (`EngineFacts.paths` says which one does)."""
    why_no_path: Mapping[str, str] = field(default_factory=dict)
    """Why others are not served, where that is not plain."""
    salted: tuple[str, ...] = ()
    """The paths of the OpenAI API whose requests may have a salt for their prefix blocks, `cache_salt`."""
    long_by_default: bool = False
    """True if an OpenAI request without a length is answered to the end of the context, completions included."""
    text_model: str = ""
    """The model beside it that takes text for it and may be absent."""
    reads_files: bool = False
    """True if it reads adapters from a folder instead of taking packed weights."""
    canonical_files: bool = False
    """True if its loader skips tensors by unknown names and ignores `alpha_pattern`, so files are rewritten for it."""
    page_is_adapter: bool = False
    """True if a page of its cache holds one adapter of any size."""
    pages: str = "the engine has {host} in its host cache and {device} on the device"
    """Phrase for its number of pages."""


@dataclass(frozen=True)
class Wiring:
    """What the process provides for its backends. Most kinds need none of it.

    `loader` sends packed weights to Triton from another process. `memory` holds them for engines of this machine.
    `owner` is this replica's id, "" if there is only one.
    """

    loader: LoaderProcess
    memory: SharedMemory = NOT_SHARED
    owner: str = ""


@dataclass(frozen=True)
class CheckStep:
    """One check: the checks that it needs, its time limit in seconds, and the kind of model that it is limited to."""

    name: str
    run: Callable[[Any], Awaitable[Finding]]
    needs: tuple[str, ...] = ()
    limit_s: float = 15.0
    kind: str | None = None


@dataclass(frozen=True)
class Checks:
    """The checks of a live engine.

    `open` opens the look that the steps share; its `facts` are the declared ones, filled with those found. `target`
    returns the fields of a `Target` that only this kind has.
    """

    steps: tuple[CheckStep, ...]
    open: Callable[[Target], AbstractAsyncContextManager[Any]]
    target: Callable[[Any], dict[str, Any]]


def _declared_as_it_is(entry: Any, declared: EngineFacts, all_of_kind: Sequence[Any]) -> EngineFacts:
    return declared


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of backend.

    `declare(entry, declared, all_of_kind)` adds the facts that follow from an engine's entry and the other entries of
    this kind: at least the expected kind of model (`with_kind`).

    `connect(entry, declared, wiring)` makes the backend, which reaches for its engine once it is started, and returns
    with it the facts to assume until then: `declared`, or more.
    """

    name: str
    """Its name in a configuration: the first of its section's `SCHEMES`."""
    section: type[Entry]
    """How its entries of `backends` are read: a subclass with the kind's keys, `SCHEMES` and `ELSEWHERE`."""
    models: tuple[ModelKind, ...]
    connect: Callable[[Any, EngineFacts, Wiring], tuple[Backend, EngineFacts]]
    declare: Callable[[Any, EngineFacts, Sequence[Any]], EngineFacts] = _declared_as_it_is
    checks: Callable[[], Checks] | None = None
    """The checks of `backends check`; None if there are none."""
    notes: Callable[[Any, EngineFacts], Iterator[str]] = lambda entry, declared: iter(())
    """Yields the notes of `config check` on an entry: what it needs and lacks."""
    unchecked: Callable[[Sequence[str]], str] | None = None
    """Returns the warning for backends whose base model's files are not named, so adapters cannot be checked."""


def write_for(ask: Ask, streams: Mapping[ModelKind, bool]) -> tuple[dict[str, Form], dict[str, str]]:
    """Write a request for each kind of model that can answer it; return also why each other kind cannot.

    `streams` says for each kind whether it is to stream.
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
    """Return the facts of an engine with a model of this kind."""
    return replace(
        facts,
        kind=kind.name,
        reads_files=kind.reads_files,
        canonical_files=kind.canonical_files,
        page_is_adapter=kind.page_is_adapter,
    )
