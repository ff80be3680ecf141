"""Keep the public keys of an issuer of tokens: its JWKS, from an https URL or a file.

start              the keys of the copy on disk count at once, and a fetch begins
jwks_refresh_s     a fetch; its keys replace all others, so that a key which is no longer published ends
an unknown key id  a fetch, at most one each FETCH_AGAIN_S for all that ask; they wait for it together
a failed fetch     the keys stay until the last good fetch is jwks_stale_max_s ago, also over a restart
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
from joserfc.jwk import Key, import_key

from sidecar.adapters.strict_json import parse_object
from sidecar.config.identities import clipped
from sidecar.config.identity import Issuer
from sidecar.files import file_for_ssl, read_regular
from sidecar.tasks import ended

logger = logging.getLogger(__name__)

FETCH_AGAIN_S = 30.0
"""The shortest time between two fetches that unknown key ids cause."""
RETRY_S = 10.0
"""The time after a failed fetch until the next one."""
FETCH_S = 10.0
"""The time limit of one fetch as a whole."""
WAIT_S = 5.0
"""The longest that a caller waits for a fetch."""
SIZE_BYTES_MAX = 1 << 20
KEYS_MAX = 100
RSA_BITS_MIN = 2048
FUTURE_S_MAX = 300.0
"""How far in the future the time of a copy may be, by a clock that was put back."""

_TOKEN = re.compile(rb"[\x21-\x7e]+")

Fetch = Callable[[Issuer], Awaitable[bytes]]


@dataclass(frozen=True)
class PublicKey:
    """A key of a JWKS. `text` is the whole entry as JSON with sorted keys; two keys with the same text are equal."""

    text: str
    kid: str | None = field(compare=False)
    key: Key = field(compare=False, repr=False)


class Jwks:
    """The keys of one issuer. `folder` takes the copy; without one, keys do not outlive the process.

    `clock` gives Unix seconds. `fetch` returns the bytes of the JWKS and may raise anything.
    """

    def __init__(
        self,
        issuer: Issuer,
        folder: Path | None,
        clock: Callable[[], float],
        fetch: Fetch,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._issuer = issuer
        name = sha256(f"{issuer.issuer}\n{issuer.jwks}".encode()).hexdigest()[:32]
        self._copy = None if folder is None else folder / f"jwks-{name}.json"
        self._clock = clock
        self._fetch = fetch
        self._sleep = sleep
        self._text = b""
        self._keys: tuple[PublicKey, ...] = ()
        self._held: frozenset[PublicKey] = frozenset()
        self._fetched_at = self._begun_at = float("-inf")
        self._fetching: asyncio.Task[None] | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._problem = ""

    def start(self) -> None:
        """Read the copy and begin to fetch. It neither waits for the issuer nor fails without it."""
        self._read_copy()
        self._refreshing = asyncio.create_task(self._refresh())

    async def stop(self) -> None:
        await ended(self._refreshing, self._fetching)

    def holds(self, key: PublicKey) -> bool:
        """Return True if a key is still one of the issuer's."""
        return key in self._held and not self._is_stale

    def find(self, kid: str | None) -> list[PublicKey]:
        """Return the keys with an id, or all of them for None."""
        if self._is_stale:
            return []
        return [key for key in self._keys if kid is None or key.kid == kid]

    @property
    def is_empty(self) -> bool:
        """True if there are no keys: none came yet, or the last ones are too old."""
        return self._is_stale or not self._keys

    @property
    def _is_stale(self) -> bool:
        return self._clock() - self._fetched_at >= self._issuer.jwks_stale_max_s

    async def renew(self) -> bool:
        """Fetch the keys unless that began less than FETCH_AGAIN_S ago; callers share a fetch that is under way.

        Returns True if there are fetched keys within WAIT_S.
        """
        if self._fetching is None:
            if 0 <= self._clock() - self._begun_at < FETCH_AGAIN_S:
                return False
            self._begin()
        fetching = self._fetching
        assert fetching is not None
        before = self._fetched_at
        await asyncio.wait({fetching}, timeout=WAIT_S)  # unlike a timeout it does not cancel what others wait for
        return self._fetched_at > before

    async def _refresh(self) -> None:
        while True:
            if self._fetching is None:
                self._begin()
            before = self._fetched_at
            assert self._fetching is not None
            await asyncio.wait({self._fetching})
            refresh_s = self._issuer.jwks_refresh_s
            await self._sleep(refresh_s if self._fetched_at > before else min(RETRY_S, refresh_s))

    def _begin(self) -> None:
        self._begun_at = self._clock()
        self._fetching = asyncio.create_task(self._fetch_once())

    async def _fetch_once(self) -> None:
        try:
            text = await self._fetch(self._issuer)
            self._take(text, self._begun_at)
        except Exception as error:  # noqa: BLE001 — whatever an issuer does, its keys stay and the next fetch comes
            self._report(str(error) or type(error).__name__)
        else:
            self._report("")
            await asyncio.to_thread(self._write_copy, text)
        finally:
            self._fetching = None

    def _take(self, text: bytes, fetched_at: float) -> None:
        if text != self._text:
            self._keys = tuple(read_keys(text, self._issuer.issuer))
            self._text, self._held = text, frozenset(self._keys)
        self._fetched_at = fetched_at

    def _report(self, problem: str) -> None:
        """Log a problem once, and its end."""
        if problem != self._problem:
            if problem:
                rest_s = self._issuer.jwks_stale_max_s - (self._clock() - self._fetched_at)
                until = f"the present ones count for {rest_s:.0f} s more" if rest_s > 0 else "its tokens are refused"
                logger.warning("the keys of the issuer %s were not fetched (%s); %s", self._named, problem, until)
            else:
                logger.warning("the keys of the issuer %s are fetched again", self._named)
            self._problem = problem

    @property
    def _named(self) -> str:
        return clipped(self._issuer.issuer)

    def _read_copy(self) -> None:
        try:
            if self._copy is None or not self._copy.exists():
                return
            copy = parse_object(self._copy.read_bytes())
            text, fetched_at = copy["jwks"], copy["fetched_at"]
            if not isinstance(text, str) or not isinstance(fetched_at, int | float):
                raise ValueError("a field has another type")
            if fetched_at > self._clock() + FUTURE_S_MAX:
                raise ValueError("it is from the future")
            self._take(text.encode(), fetched_at)
        except (OSError, ValueError, KeyError) as error:
            logger.warning("the copy %s of an issuer's keys is not used: %s", self._copy, error)

    def _write_copy(self, text: bytes) -> None:
        if self._copy is None:
            return
        part = self._copy.with_suffix(".part")
        try:
            self._copy.parent.mkdir(parents=True, exist_ok=True)
            record = {"issuer": self._issuer.issuer, "fetched_at": self._fetched_at, "jwks": text.decode()}
            with part.open("wb") as file:
                file.write(json.dumps(record).encode())
                file.flush()
                os.fsync(file.fileno())
            part.rename(self._copy)
        except OSError as error:
            logger.warning("the keys of the issuer %s were not copied to %s: %s", self._named, self._copy, error)


def read_keys(text: bytes, issuer: str) -> list[PublicKey]:
    """Return the keys of a JWKS that can verify signatures; others are logged, as far as they were meant to.

    Raises ValueError if it is no JWKS.
    """
    keys, problems = keys_in(text)
    for number, problem in problems:
        logger.warning("key %s of the issuer %s is not used: %s", number, clipped(issuer), problem)
    return keys


def keys_in(text: bytes) -> tuple[list[PublicKey], list[tuple[int, str]]]:
    """Return the keys of a JWKS that can verify signatures, and the numbers of others with what is wrong with them.

    Raises ValueError if it is no JWKS.
    """
    entries = parse_object(text).get("keys")
    if not isinstance(entries, list):
        raise ValueError("it has no list of keys")
    if len(entries) > KEYS_MAX:
        raise ValueError(f"it has {len(entries)} keys; at most {KEYS_MAX} are taken")
    keys, problems = [], []
    for number, entry in enumerate(entries):
        if isinstance(entry, dict) and entry.get("use", "sig") == "enc":
            continue
        try:
            keys.append(_usable(entry))
        except Exception as error:  # noqa: BLE001 — the library raises many kinds for what is wrong with a key
            problems.append((number, clipped(str(error))))
    return keys, problems


def _usable(entry: Any) -> PublicKey:
    if not isinstance(entry, dict):
        raise ValueError("it is not an object")
    if entry.get("kty") not in ("RSA", "EC", "OKP"):
        raise ValueError("its type (kty) is not RSA, EC or OKP; symmetric keys prove nothing")
    if entry.get("use", "sig") != "sig":
        raise ValueError("its use is not sig")
    if "d" in entry:
        raise ValueError("it is a private key; the issuer has to replace it")
    if entry["kty"] == "RSA" and 6 * len(entry.get("n", "")) < RSA_BITS_MIN:
        raise ValueError(f"an RSA key needs {RSA_BITS_MIN} bits")
    key = import_key(entry)
    return PublicKey(json.dumps(entry, sort_keys=True), key.kid, key)


async def fetch_jwks(issuer: Issuer) -> bytes:
    """Return the bytes of an issuer's JWKS. Raises OSError, ValueError, TimeoutError or httpx.HTTPError."""
    if issuer.jwks_file is not None:
        return await asyncio.to_thread(read_file, issuer.jwks_file)
    # The authority and the token are read anew each time: in a pod both are replaced while it runs.
    context = await asyncio.to_thread(_tls_context, issuer.jwks_ca)
    headers = {"accept": "application/jwk-set+json, application/json", "accept-encoding": "identity"}
    if issuer.jwks_token_file is not None:
        headers["authorization"] = f"Bearer {await asyncio.to_thread(_read_token, issuer.jwks_token_file)}"
    async with (
        asyncio.timeout(FETCH_S),  # httpx limits the time between two pieces, which a slow server renews for ever
        httpx.AsyncClient(verify=context, trust_env=False, follow_redirects=False, timeout=FETCH_S) as client,
        client.stream("GET", issuer.jwks, headers=headers) as answer,
    ):
        if answer.has_redirect_location:
            raise ValueError("the server redirects; set jwks to the URL where the keys are")
        if answer.status_code != 200:
            raise ValueError(f"the server answers {answer.status_code}")
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise ValueError("the server compresses although the request forbids it")
        body = bytearray()
        async for part in answer.aiter_raw():
            body += part
            _check_size(len(body))
    return bytes(body)


def _tls_context(ca: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=None if ca is None else file_for_ssl(ca))
    except OSError as error:  # ssl.SSLError is one
        raise OSError(f"jwks_ca {ca} cannot be used: {error.strerror or error}") from error


def _read_token(file: str) -> str:
    token = read_file(Path(file).expanduser()).strip()
    if not _TOKEN.fullmatch(token):  # the HTTP library would show what it cannot send
        raise ValueError(f"jwks_token_file {file} holds no token")
    return token.decode()


def read_file(path: Path) -> bytes:
    """Return the bytes of a JWKS or of a token. Raises OSError, also for more than SIZE_BYTES_MAX."""
    return read_regular(path, SIZE_BYTES_MAX)


def _check_size(size_bytes: int) -> None:
    if size_bytes > SIZE_BYTES_MAX:
        raise ValueError(f"it is larger than {SIZE_BYTES_MAX} bytes")
