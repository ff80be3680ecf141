"""The inputs and outputs of an emulated engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sidecar.lab.engine.pages import Row


class QueueFull(Exception):
    """The executor's queue is at its limit; the text is the engine's."""


@dataclass(frozen=True)
class Request:
    """One request as the executor receives it.

    `rows` is its lora_config; None means that only the id was sent. `weights` is an opaque payload kept with the cached
    adapter; None with rows is an adapter that is sized but not computed. Higher priorities are fetched first.
    `stop_after` is the true number of output tokens, where a simulation knows it: the engine reserves for
    `max_new_tokens` and ends the request after that many. `flaw` is what the executor will say of the weights when it
    stores them, where only who has the bytes can know.
    """

    request_id: int
    input_tokens: int
    max_new_tokens: int
    task_id: int | None = None
    rows: tuple[Row, ...] | None = None
    weights: object | None = None
    priority: float = 0.5
    dtype: str | None = None
    stop_after: int | None = None
    flaw: str | None = None


@dataclass(frozen=True)
class Iteration:
    """One step: the ids whose prompts it computes and those it decodes; each of them gets one token."""

    index: int
    context: tuple[int, ...]
    generation: tuple[int, ...]
    duration_ns: int


@dataclass(frozen=True)
class Ending:
    """A request that finished; `reason` is "length" or "eos", or "loaded" for a load call of vLLM."""

    request_id: int
    output_tokens: int
    reason: str


@dataclass(frozen=True)
class Failure:
    """A request that ended without finishing, with the engine's text; `cancelled` if its client left."""

    request_id: int
    text: str
    cancelled: bool = False


class Output(NamedTuple):
    """The output of the engine at one time: one token for each id in `tokens`, endings, failures."""

    at_ns: int
    tokens: tuple[int, ...] = ()
    endings: tuple[Ending, ...] = ()
    failures: tuple[Failure, ...] = ()


class Event(NamedTuple):
    """What an observer learns at one time: the ids with their first token, endings, failures."""

    at_ns: int
    started: tuple[int, ...] = ()
    endings: tuple[Ending, ...] = ()
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True)
class Counters:
    """The values of the engine's metrics, plus what no metric shows: pages and evictions of the adapter caches, and the
    adapters that are kept in host memory outside them.
    """

    active: int
    waiting: int
    scheduled: int
    context: int
    generation: int
    paused: int
    context_tokens: int
    kv_max_blocks: int
    kv_used_blocks: int
    iteration_counter: int
    host_pages_used: int
    device_pages_used: int
    host_evictions: int
    device_evictions: int
    known_adapters: int = 0
    known_bytes: int = 0

    @property
    def kv_free_blocks(self) -> int:
        """KV blocks that no sequence holds."""
        return self.kv_max_blocks - self.kv_used_blocks
