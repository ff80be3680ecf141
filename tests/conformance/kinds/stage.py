"""A backend of the kind in question in front of a real engine, with the store behind it, and nothing else of a process.

The test provides the engine; the checks connect a backend to it and play the core's part: they order loads and runs and
read the events that are posted.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sidecar.adapters.origins.allowing import AllowList
from sidecar.adapters.peft import read_adapter
from sidecar.adapters.registration import adapter_of
from sidecar.backends.api import Backend, Payload, Prompt, Reply, Ticket, Weights
from sidecar.backends.buffers import AnswerBuffers
from sidecar.backends.kind import Ask, Asking, Kind, ModelKind, Wiring
from sidecar.core.effects import Dispatch, Fetch, Load
from sidecar.core.enums import Cache
from sidecar.core.events import (
    BackendLost,
    BackendUp,
    Event,
    Fetched,
    FetchFailed,
    FirstToken,
    LoadDone,
    LoadFailed,
    RunEnded,
    RunFailed,
)
from sidecar.core.facts import BASE_PACKED, Adapter, EngineFacts, Packed, packed_for
from sidecar.serve.pool import facts_of, stagings_of
from sidecar.shell.sources import Sources
from sidecar.shell.store import BlobStore
from tests.conformance.kinds.asking import ASKS
from tests.conformance.kinds.sections import entry_of

PATIENCE_S = 30.0
LOOK_S = 0.005
LONG_TOKENS = 3000
E = TypeVar("E", bound=Event)


class Engine(Protocol):
    """An engine that a test provides. It has one seat, and room for two adapters or more."""

    record: Mapping[str, Any]
    """The keys of its backend's entry, its url among them. A short `progress_timeout_s` makes losses quick to see."""
    slots: int
    """How many adapters it holds."""

    async def start(self) -> None:
        """Start it, at the address of the url, with no adapter. Also after `kill`."""

    async def kill(self) -> None:
        """End it as `kill -9` does. Nothing to do for one that does not run."""

    def running(self) -> int:
        """Return how many requests it is answering."""


@dataclass
class Stage:
    """What a live check is given. `adapters` are PEFT folders that fit the engine, two more than it has slots.

    `wiring` is what a process lends to its backends.
    """

    kind: Kind
    engine: Engine
    adapters: Sequence[Path]
    wiring: Wiring
    numbers: count[int] = field(default_factory=lambda: count(1))

    @asynccontextmanager
    async def backend(self) -> AsyncIterator[Bench]:
        """Give a backend that has been started, with the engine running; it is stopped in the end."""
        bench = Bench(self)
        await bench.store.open()
        try:
            await self.engine.start()
            await bench.backend.start(bench.heard)
            await bench.comes(BackendUp)
            yield bench
        finally:
            await bench.stop()
            bench.store.close()
            await self.engine.kill()


@dataclass
class Answer:
    """What came of a run: its end, none where the loss of the backend ended it, and its replies."""

    end: RunEnded | RunFailed | None
    replies: list[Reply]
    firsts: int

    def read(self, asking: Asking, prompt: Prompt) -> tuple[str, list[int], int]:
        """Return the text, the token ids and the number of tokens of an answer."""
        reader = asking.reader(prompt is Prompt.TEXT)
        pieces = [reader.read(reply) for reply in self.replies]
        ids = [token for piece in pieces for token in piece.token_ids]
        return "".join(piece.text for piece in pieces), ids, sum(piece.tokens for piece in pieces)


class Bench:
    """A backend, what it posts, and orders to it.

    An adapter is named by its number among the stage's, the base model by None.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.events: list[Event] = []
        self.weights: list[Counted] = []
        entry = entry_of(stage.kind, stage.engine.record)
        declared = facts_of([entry])[entry.identity]
        self.backend: Backend
        self.backend, self._facts = stage.kind.connect(entry, declared, stage.wiring)
        roots = {folder.parent for folder in stage.adapters}
        self.store = BlobStore(self.heard, Sources(AllowList.of(roots=roots)), stagings=stagings_of([entry]))
        self._adapters: dict[int, Adapter] = {}
        self._tickets: dict[int, Ticket] = {}

        self._is_stopped = False

    async def stop(self) -> None:
        """Stop the backend, once."""
        if not self._is_stopped:
            self._is_stopped = True
            await self.backend.stop()

    # What is posted.

    def heard(self, event: Event) -> None:
        """Be what the backend posts to."""
        self.events.append(event)
        if isinstance(event, BackendUp):
            self._facts = event.facts

    def of(self, kind: type[E]) -> list[E]:
        """Return the events of a kind so far."""
        return [event for event in self.events if isinstance(event, kind)]

    async def comes(self, *kinds: type[Any], times: int = 1, **fields: Any) -> Any:
        """Wait for an event of some kinds with these fields, as often as `times` says in all; return the last."""

        def found() -> list[Event]:
            return [
                event
                for event in self.events
                if isinstance(event, kinds) and all(getattr(event, key) == value for key, value in fields.items())
            ]

        names = " or ".join(kind.__name__ for kind in kinds)
        await self.until(lambda: len(found()) >= times, f"{names} {fields or ''} was not posted")
        return found()[times - 1]

    async def until(self, holds: Callable[[], bool], otherwise: str) -> None:
        """Wait until something holds. Raises AssertionError when it does not in a long time."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not holds():
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            said = ", ".join(map(str, self.events[-5:]))
            raise AssertionError(
                f"{otherwise} within {PATIENCE_S:g} s; it says: {self.backend.detail()}; last events: {said}"
            ) from None

    # What is known.

    @property
    def facts(self) -> EngineFacts:
        """What is known of the engine."""
        return self._facts

    @property
    def model(self) -> ModelKind:
        """The kind of model that the engine has."""
        found = next((model for model in self.stage.kind.models if model.name == self._facts.kind), None)
        assert found is not None, f"BackendUp says that the model is a {self._facts.kind}, which is none of its kind's"
        return found

    @property
    def asking(self) -> Asking:
        """How it is asked."""
        assert self.model.asking is not None, f"{self.model.name} has no asking: live checks cannot ask it"
        return self.model.asking

    @property
    def prompt(self) -> Prompt:
        """A kind of prompt that it takes."""
        return next(prompt for prompt in Prompt if prompt in self.asking.prompts)

    # Orders.

    async def adapter(self, number: int) -> tuple[Adapter, Packed]:
        """Return an adapter and its packed form for the engine, which the store has."""
        if number not in self._adapters:
            with read_adapter(self.stage.adapters[number]) as source:
                adapter = self._adapters[number] = adapter_of(source)
            packed = packed_for(adapter, self.facts, 0)
            origin = str(self.stage.adapters[number])
            self.store.fetch(Fetch(packed.key, adapter.digest, origin, self.facts.layout, packed.size_bytes))
            fetched = await self.comes(Fetched, FetchFailed, key=packed.key)
            assert isinstance(fetched, Fetched), f"the store could not bring {origin}: {fetched}"
        adapter = self._adapters[number]
        return adapter, packed_for(adapter, self.facts, 0)

    def order_load(self, adapter: Adapter, packed: Packed) -> int:
        """Order a load and return its number."""
        number = next(self.stage.numbers)
        weights = Counted(self.store.lease(packed.key))
        self.weights.append(weights)
        self.backend.load(Load(number, self.backend.id, "name", adapter.digest, packed), weights)
        return number

    async def load(self, number: int) -> None:
        """Load an adapter. Raises AssertionError when it fails."""
        load = self.order_load(*await self.adapter(number))
        ended = await self.comes(LoadDone, LoadFailed, load=load)
        assert isinstance(ended, LoadDone), f"the adapter was not loaded: {ended}"

    async def begin(
        self, number: int | None, prompt: Prompt | None = None, streams: bool = True, tokens: int = 5
    ) -> int:
        """Send a request and return its number."""
        request = next(self.stage.numbers)
        ask = ASKS[prompt or self.prompt]
        ask = Ask(ask.text, ask.token_ids, max_tokens=tokens)
        form = self.asking.write(ask, streams)
        payload = Payload("", form, raw=True, unary=False, prompt=prompt or self.prompt, kind=self.model.name)
        ticket = self._tickets[request] = Ticket(request, payload, f"check-{request}", AnswerBuffers(1 << 30, 1 << 30))
        adapter, packed = (None, BASE_PACKED) if number is None else await self.adapter(number)
        effect = Dispatch(
            request, 1, self.backend.id, "" if adapter is None else "name", "" if adapter is None else adapter.digest,
            1, packed.task_id, Cache.BASE if adapter is None else Cache.RESIDENT, 0, 0, 0, packed.key,
        )  # fmt: skip
        ticket.dispatched(effect)
        self.backend.run(effect, ticket)
        return request

    async def ended(self, request: int) -> Answer:
        """Wait until a run has ended, and return what came of it."""
        lost = len(self.of(BackendLost))
        await self.until(
            lambda: bool(self.ends(request)) or len(self.of(BackendLost)) > lost, f"the run {request} did not end"
        )
        await asyncio.sleep(0)
        ends = self.ends(request)
        assert len(ends) <= 1, f"a run ended {len(ends)} times: {ends}"
        firsts = [event for event in self.of(FirstToken) if event.request == request]
        return Answer(ends[0] if ends else None, list(self._tickets[request].replies), len(firsts))

    def ends(self, request: int) -> list[RunEnded | RunFailed]:
        """Return the ends that were posted of a run."""
        return [event for event in self.events if isinstance(event, RunEnded | RunFailed) and event.request == request]

    async def run(
        self, number: int | None, prompt: Prompt | None = None, streams: bool = True, tokens: int = 5
    ) -> Answer:
        """Run a request to its end."""
        return await self.ended(await self.begin(number, prompt, streams and self.backend.streams, tokens))

    async def says(self, number: int | None) -> tuple[str, list[int], int]:
        """Return what the engine answers with an adapter. Raises AssertionError when it does not answer."""
        answer = await self.run(number)
        assert isinstance(answer.end, RunEnded), f"the run failed: {answer.end}"
        return answer.read(self.asking, self.prompt)


class Counted:
    """Weights that count how often they are released."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.released = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weights, name)

    def release(self, settled: bool = False) -> None:
        self.released += 1
        self._weights.release(settled)
