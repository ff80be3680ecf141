"""Sends messages to a house one after another, and finds out what came of each."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from asyncio import events
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import thread_time
from typing import Any

from tests.fuzz.wire.bodies import body
from tests.fuzz.wire.house import House, Told, emulated_house, tapped
from tests.fuzz.wire.mutators import mutate
from tests.fuzz.wire.seeds import ADMIN, NAMES, core, ensemble, generate, infer, llmapi
from tests.fuzz.wire.trees import Tree, encode

WAYS = {"unary": 34, "stream": 34, "generate": 18, "openai": 5, "admin": 9}
"""Of a hundred messages."""
WIRED = 0.15
"""The share of KServe and Generate messages that go through gRPC; the others go to the same handlers without it."""
PROTOCOLS = ("triton", "llmapi")
Sending = Callable[[], Awaitable[Told]]


@dataclass
class Found:
    """What came of the messages. `lies` and `crashes` name the case, which with the seed makes it again."""

    outcomes: Counter[str] = field(default_factory=Counter)
    lies: list[str] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    """The longest that anything held the event loop, in CPU time; client and engine are on it as well."""
    making: bool = False
    """Whether this callback of the event loop is for a message that is being made: it is not timed."""
    memory_bytes: tuple[int, int] = (0, 0)
    """After a tenth of the messages, and at the end."""


async def run(cases: range, seed: int, folder: Path) -> Found:
    """Send the messages of these cases to sidecars before an emulated engine of each kind."""
    async with AsyncExitStack() as stack:
        sent = stack.enter_context(tapped())
        houses = {
            name: await stack.enter_async_context(emulated_house(folder / name, name, sent)) for name in PROTOCOLS
        }
        return await send(cases, seed, houses)


async def send(cases: range, seed: int, houses: dict[str, House]) -> Found:
    """Send the messages of these cases to houses, which go by the protocols of their engines."""
    found = Found()
    with _timed(found), _heard(found):
        for place, case in enumerate(cases):
            await _one(case, seed, houses, found)
            if place == len(cases) // 10:
                found.memory_bytes = (_resident_bytes(), 0)
    found.memory_bytes = (found.memory_bytes[0], _resident_bytes())
    return found


async def _one(case: int, seed: int, houses: dict[str, House], found: Found) -> None:
    generator = random.Random(f"{seed}:{case}")
    protocol = PROTOCOLS[generator.random() < 0.25 and PROTOCOLS[1] in houses]
    way = generator.choices(list(WAYS), list(WAYS.values()))[0]
    into = houses[protocol]
    noticed = len(found.crashes)
    try:
        send, named = _made(generator, way, protocol, into)
        found.making = True
        await asyncio.sleep(0)
        told = await send()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a find
        told, named = Told(None, "crash"), None
        found.crashes.append(f"case {case} ({way}, {protocol}): {error!r}")
    found.crashes[noticed:] = [f"case {case} ({way}, {protocol}): {words}" for words in found.crashes[noticed:]]
    lies = into.lies(told)
    if named is not None and (told.version is None or told.version.partition("@")[0] != named.partition("@")[0]):
        lies.append(f"a good request for {named!r} was told {told}")
    found.lies += [f"case {case} ({way}, {protocol}): {lie}" for lie in lies]
    found.outcomes[f"{way}: {'answered' if told.version is not None else told.error}"] += 1


def _made(generator: random.Random, way: str, protocol: str, into: House) -> tuple[Sending, str | None]:
    """Make one message; return what sends it and says what its sender was told, and the name in it if it is as good as
    its seed.
    """
    if way == "openai":
        raw, named = body(generator)
        return partial(into.openai, raw), named
    if way == "admin":
        method = generator.choice(list(ADMIN))
        return partial(into.admin, method, mutate(generator, ADMIN[method], Tree(), 0)), None
    name, wired = generator.choice(NAMES), generator.random() < WIRED
    chef = into.ids["chef"]
    assert chef is not None
    if way == "generate":
        good = generate(generator, name)
        raw = mutate(generator, good, generate(generator, "chef"), chef)
        is_tokens = any(one.number == 3 for one in good.fields)
        refused = protocol == "llmapi" and is_tokens
        return partial(into.generate, raw, wired), name if raw == encode(good) and not refused else None
    good, other = _infer(generator, protocol, name), _infer(generator, protocol, "chef")
    raw = mutate(generator, good, other, chef)
    send = into.unary if way == "unary" else into.stream
    return partial(send, raw, wired), name if raw == encode(good) else None


def _infer(generator: random.Random, protocol: str, name: str) -> Tree:
    if protocol == "llmapi":
        return infer(generator, "tensorrt_llm", llmapi(False), name)
    text = generator.random() < 0.4
    tensors = ensemble(False) if text else core(False)
    return infer(generator, "ensemble" if text else "tensorrt_llm", tensors, name)


@contextmanager
def _timed(found: Found) -> Iterator[None]:
    """Take the CPU time of each callback of the event loop."""
    plain = events.Handle._run

    def timed(handle: Any) -> None:
        began = thread_time()
        found.making = False
        plain(handle)
        if not found.making:
            found.slowest_s = max(found.slowest_s, thread_time() - began)

    events.Handle._run = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        events.Handle._run = plain  # type: ignore[method-assign]


@contextmanager
def _heard(found: Found) -> Iterator[None]:
    """Take what is logged as an error, and what the event loop has to say of tasks, for crashes."""

    class Hearing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.crashes.append(record.getMessage()[:300])

    hearing, loop = Hearing(logging.ERROR), asyncio.get_running_loop()
    logging.getLogger().addHandler(hearing)
    loop.set_exception_handler(lambda _, context: found.crashes.append(str(context)[:300]))
    try:
        yield
    finally:
        logging.getLogger().removeHandler(hearing)
        loop.set_exception_handler(None)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def summed(parts: Iterable[Found]) -> Found:
    """Return all that several processes found. Memory is that of the one whose grew most."""
    whole = Found()
    for part in parts:
        whole.outcomes.update(part.outcomes)
        whole.lies += part.lies
        whole.crashes += part.crashes
        whole.slowest_s = max(whole.slowest_s, part.slowest_s)
        whole.memory_bytes = max(whole.memory_bytes, part.memory_bytes, key=lambda pair: pair[1] - pair[0])
    return whole
