"""Clients that ask any replica for any adapter, look at every token, and send again what was refused."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from random import Random
from time import monotonic
from typing import Any

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2

from sidecar.core.facts import Layout, packed_key, task_id_of
from sidecar.errors import Family, Reason
from sidecar.fronts.status import DETAILS, PUSHBACK
from sidecar.lab.engine.kserve.compute import dummy_token
from sidecar.lab.engine.tokens import BOS
from sidecar.proto import gateway_pb2, gateway_pb2_grpc
from tests.chaos.pool import ChaosPool

RATE = 20.0
"""Requests a second, whatever becomes of those before."""
TOKENS = 80
TRIES = 12
PAUSE_S, PAUSE_S_MAX = 0.1, 1.0
LOOK_S = 0.05
SILENT_S = 60.0
"""After so long without an ending a request is taken for lost."""
UNREACHED = ("failed to connect", "Connection refused")

FULL, REFUSED, UNREACHABLE, BROKEN, CUT = "full", "refused", "unreached", "broken", "cut"
FAILED, SILENT, WRONG, DOUBLED = "failed", "silent", "wrong", "doubled"


@dataclass
class Try:
    """One request as its client saw it.

    full: all tokens. refused: the sidecar says that it did not run. unreached: nobody listened. broken: ended by the
    sidecar after a token. cut: ended by the wire. failed: ended by the sidecar without a token and not refused. silent:
    never ended. wrong, doubled: other tokens than the adapter's own, or more than one answer has.
    """

    replica: str
    adapter: str
    streams: bool
    begun_s: float
    digest: str = ""
    tenant: str = ""
    silence_s: float = 0.0
    """For how long its client reads nothing after the first message."""
    tokens: int = 0
    ending: str = ""
    ended_s: float = 0.0
    backend: str = ""
    why: str = ""
    pushback_s: float | None = None


@dataclass
class Load:
    """Asks at a steady rate until it is told to stop; `tries` is all that happened."""

    pool: ChaosPool
    seed: int
    rate: float = RATE
    silent_s: float = SILENT_S
    tries: list[Try] = field(default_factory=list)
    given_up: int = 0
    """Requests that were refused at every try."""
    stood_still_s: float = 0.0
    """For how long at most this process did not get to run: then the others may not have either."""
    _asks: set[asyncio.Task[None]] = field(default_factory=set)
    _source: asyncio.Task[None] | None = None
    _watch: asyncio.Task[None] | None = None
    _channels: dict[str, grpc.aio.Channel] = field(default_factory=dict)

    async def __aenter__(self) -> Load:
        options = [("grpc.max_reconnect_backoff_ms", 200), ("grpc.initial_reconnect_backoff_ms", 100)]
        for replica in self.pool.replicas:
            self._channels[replica.name] = grpc.aio.insecure_channel(replica.data, options)
        self._source = asyncio.create_task(self._come())
        self._watch = asyncio.create_task(self._look_at_clock())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        if self._watch is not None:
            self._watch.cancel()
        for channel in self._channels.values():
            await channel.close()

    async def stop(self) -> None:
        """Ask nothing more and return when all that was asked has ended."""
        if self._source is not None:
            self._source.cancel()
        await asyncio.gather(*self._asks)

    def answered(self, backend: str, since_s: float) -> list[Try]:
        """Return what came after a time and was answered in full by a backend, the first answered first."""
        found = [
            each for each in self.tries if each.ending == FULL and each.backend == backend and each.begun_s >= since_s
        ]
        return sorted(found, key=lambda each: each.ended_s)

    async def _come(self) -> None:
        random = Random(self.seed)
        while True:
            one = Random(random.random())
            adapter = one.choice(sorted(self.pool.digests))
            self.begin(self.ask(one, adapter, self.pool.digests[adapter]))
            await asyncio.sleep(random.expovariate(self.rate))

    def begin(self, asking: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Let something be asked beside all else; `stop` waits for it, whoever else does."""
        ask = asyncio.create_task(asking)
        self._asks.add(ask)
        ask.add_done_callback(self._ended)
        return ask

    async def _look_at_clock(self) -> None:
        seen_s = monotonic()
        while True:
            await asyncio.sleep(LOOK_S)
            before_s, seen_s = seen_s, monotonic()
            self.stood_still_s = max(self.stood_still_s, seen_s - before_s - LOOK_S)

    def _ended(self, ask: asyncio.Task[None]) -> None:
        if ask.cancelled() or ask.exception() is None:
            self._asks.discard(ask)

    async def ask(self, random: Random, adapter: str, digest: str, tenant: str = "", silence_s: float = 0.0) -> None:
        """Ask one replica after the other until it has run, or there is no point any more."""
        streams = silence_s > 0 or random.random() < 0.5
        pause_s, first = PAUSE_S, random.randrange(len(self.pool.replicas))
        for number in range(TRIES):
            replica = self.pool.replicas[(first + number) % len(self.pool.replicas)]
            tried = Try(replica.name, adapter, streams, monotonic(), digest, tenant, silence_s)
            self.tries.append(tried)
            await self._try(tried)
            if tried.ending not in (REFUSED, UNREACHABLE):
                return
            await asyncio.sleep(pause_s if tried.pushback_s is None else tried.pushback_s)
            pause_s = min(PAUSE_S_MAX, 2 * pause_s)
        self.given_up += 1

    async def _try(self, tried: Try) -> None:
        request = gateway_pb2.GenerateRequest(
            adapter=tried.adapter,
            tokens=gateway_pb2.TokenIds(ids=[BOS, 1, 2, 3]),
            max_tokens=TOKENS,
            stream=tried.streams,
            tenant=tried.tenant,
        )
        got: list[int] = []
        origins: list[Any] = []
        stub = gateway_pb2_grpc.GatewayStub(self._channels[tried.replica])
        try:
            async for message in stub.Generate(request, timeout=self.silent_s):
                if tried.silence_s and not got:
                    await asyncio.sleep(tried.silence_s)
                got += message.token_ids
                if message.HasField("origin"):
                    origins.append(message.origin)
        except grpc.aio.AioRpcError as error:
            judge_error(tried, error, bool(got))
        else:
            tried.ending = FULL if len(origins) == 1 and len(got) == TOKENS else DOUBLED
            tried.backend = origins[0].backend if origins else ""
        if len(origins) > 1:
            tried.ending = DOUBLED
        judge(tried, got)


def judge(tried: Try, got: list[int]) -> None:
    """Note the end of a request, and whether its tokens were its adapter's."""
    tried.tokens, tried.ended_s = len(got), monotonic()
    expected = tokens_of(tried.digest, TOKENS)
    if len(got) > TOKENS:
        tried.ending = DOUBLED
    elif got != expected[: len(got)]:
        tried.ending = WRONG
        tried.why = f"{bytes(got).decode()} for {bytes(expected).decode()}"


def tokens_of(digest: str, count: int) -> list[int]:
    """Return what an engine with dummy compute answers with an adapter."""
    task_id = task_id_of(packed_key(digest, Layout("float16")))
    return [dummy_token(task_id, position) for position in range(count)]


def judge_error(tried: Try, error: grpc.aio.AioRpcError, begun: bool) -> None:
    reason = _reason_of(error)
    tried.why = f"{error.code().name} {reason}: {error.details()}"
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and reason is None:
        tried.ending = SILENT
    elif reason is None:
        reached = begun or not any(text in (error.details() or "") for text in UNREACHED)
        tried.ending = CUT if reached else UNREACHABLE
    elif reason.row.family is Family.REFUSED:
        tried.ending = WRONG if begun else REFUSED
        tried.pushback_s = _pushback_s(error)
    else:
        tried.ending = BROKEN if begun else FAILED


def _reason_of(error: grpc.aio.AioRpcError) -> Reason | None:
    """Return the sidecar's reason, None for an error that is not its own."""
    for packed in _details_of(error):
        info = error_details_pb2.ErrorInfo()
        if packed.Unpack(info):
            return Reason(info.reason)
    return None


def _details_of(error: grpc.aio.AioRpcError) -> Sequence[Any]:
    told = dict(error.trailing_metadata() or ())
    return list(status_pb2.Status.FromString(told[DETAILS]).details) if DETAILS in told else []


def _pushback_s(error: grpc.aio.AioRpcError) -> float | None:
    told = dict(error.trailing_metadata() or ())
    return int(told[PUSHBACK]) / 1000 if PUSHBACK in told else None
