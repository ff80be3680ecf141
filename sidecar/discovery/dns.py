"""Find engines by DNS: a name with one address for each engine, as a headless Service has.

The resolver is the system's. A dual-stack name has two addresses for every engine, and nothing tells which two belong
together, so IPv6 is resolved only if there is no IPv4 address.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from time import monotonic

from sidecar.discovery.found import Found

logger = logging.getLogger(__name__)

NONE_THERE = frozenset(
    code for name in ("EAI_NONAME", "EAI_NODATA") if (code := getattr(socket, name, None)) is not None
)
"""The resolver's errors when a name server answered that the name does not exist or has no address."""
Resolve = Callable[[str, int, socket.AddressFamily], Awaitable[list[str]]]


async def resolve(host: str, port: int, family: socket.AddressFamily) -> list[str]:
    """Return a name's addresses of one family. Raises socket.gaierror as the system's resolver does.

    The lookup runs in a daemon thread: it times out only after half a minute if the name server is unreachable, and a
    stopping process must not wait for that.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[str]] = loop.create_future()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        except OSError as error:
            finish = functools.partial(_fail, answer, error)
        else:
            finish = functools.partial(_succeed, answer, sorted({str(address[0]) for *_, address in found}))
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(finish)

    threading.Thread(target=ask, name="resolve", daemon=True).start()
    return await answer


def _succeed(answer: asyncio.Future[list[str]], addresses: list[str]) -> None:
    if not answer.done():
        answer.set_result(addresses)


def _fail(answer: asyncio.Future[list[str]], error: OSError) -> None:
    if not answer.done():
        answer.set_exception(error)


class DnsFinder:
    """Resolves a name periodically (implements `found.Finder`).

    An answer without addresses counts only after it has lasted for `empty_s`: a name server that has just started
    knows no names yet.
    """

    def __init__(
        self,
        host: str,
        port: int,
        every_s: float = 5.0,
        empty_s: float = 30.0,
        ask: Resolve = resolve,
        clock_s: Callable[[], float] = monotonic,
    ) -> None:
        self._host = host
        self._port = port
        self._every_s = every_s
        self._empty_s = empty_s
        self._ask = ask
        self._clock_s = clock_s
        self._empty_since_s: float | None = None
        self._trouble = ""

    async def watch(self) -> AsyncIterator[frozenset[Found]]:
        known: frozenset[Found] | None = None
        while True:
            found = await self._resolve()
            if found is not None and found != known:
                known = found
                yield found
            await asyncio.sleep(self._every_s)

    async def _resolve(self) -> frozenset[Found] | None:
        """Return the engines found, or None while the answer is uncertain."""
        try:
            addresses = await self._addresses()
        except OSError as error:
            self._empty_since_s = None
            self._log_once(f"{self._host} cannot be resolved: {error.strerror or error}; engines that were found stay")
            return None
        if addresses:
            self._empty_since_s = None
            self._log_once("")
            return frozenset(Found(address, _joined(address, self._port)) for address in addresses)
        self._log_once(f"{self._host} has no address; engines that were found stay for {self._empty_s:g} s")
        now_s = self._clock_s()
        if self._empty_since_s is None:
            self._empty_since_s = now_s
        return frozenset() if now_s - self._empty_since_s >= self._empty_s else None

    async def _addresses(self) -> list[str]:
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                addresses = await self._ask(self._host, self._port, family)
            except socket.gaierror as error:
                if error.errno not in NONE_THERE:
                    raise
            else:
                if addresses:
                    return addresses
        return []

    def _log_once(self, trouble: str) -> None:
        """Log a problem, once until another one occurs."""
        if trouble and trouble != self._trouble:
            logger.warning("%s", trouble)
        self._trouble = trouble


def _joined(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
