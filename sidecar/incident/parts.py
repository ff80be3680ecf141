"""Gather the parts of an incident independently of each other; a missing part is noted with the reason.

The sidecar need not run, and a running one is not disturbed: files are only read, and `/metrics` is requested once.
"""

from __future__ import annotations

import json
import os
import platform
import re
import ssl
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import pairwise
from pathlib import Path
from secrets import token_bytes
from tempfile import TemporaryFile
from typing import IO, Any

import httpx
import yaml

from sidecar.backends.credentials import tls_context
from sidecar.backends.registry import entries_of, full_record
from sidecar.config import Config
from sidecar.config.backends import Backend
from sidecar.errors import Misused
from sidecar.incident.arrivals import header_in
from sidecar.incident.finding import began_of
from sidecar.journal.segments import product_version, segment_paths

CUT = "(redacted)"

_SECRET_WORDS = {
    "apikey", "authorization", "bearer", "credential", "credentials", "passphrase", "passwd", "password", "secret",
    "secrets", "signature", "token",
}  # fmt: skip
_SECRET_KEYS = {"access_key", "account_key", "api_key", "private_key", "secret_key"}
_WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+")
_USER = re.compile(r"(?!hf://)(\b[A-Za-z][\w+.-]*://)[^\s'\"?#]*@")
_QUERY = re.compile(r"(\b[A-Za-z][\w+.-]*://[^\s'\"?#]*)[?#][^\s'\"]*")
_PEM = "-----BEGIN"
_CLIENT_ID = re.compile(rb'(?<=[{,])"client_id":("(?:[^"\\]|\\.)+")')
"""A client's id as a journal writes it; inside a text, the quotation marks are escaped."""


def redacted(record: Any) -> tuple[Any, list[str]]:
    """Return JSON values without their secrets, and the dotted keys that were redacted.

    A user who sends an incident has no time to check it first, so this errs on the safe side: it removes every value
    under a key that sounds like a secret, the user name and query of every URL, and every PEM block.
    """
    cut: list[str] = []
    return _value(record, "", False, cut), cut


def redacted_text(text: str) -> str:
    """Return a text without the user names and queries of its URLs; a text with a key is replaced as a whole."""
    if _PEM in text:
        return CUT
    return _QUERY.sub(rf"\1?{CUT}", _USER.sub(rf"\1{CUT}@", text))


def ids_redactor() -> Callable[[Iterable[bytes]], Iterator[bytes]]:
    """Return a generator function that yields a journal's lines without clients' ids.

    Within one redactor, equal ids get equal replacements, which cannot be reversed by trying ids. A cut-off last line
    is left out: it may end in the middle of an id.
    """
    key = token_bytes(32)

    def stand_in(found: re.Match[bytes]) -> bytes:
        digest = blake2b(json.loads(found[1]).encode(errors="replace"), key=key, digest_size=8).hexdigest()
        return b'"client_id":"redacted-%s"' % digest.encode()

    def redact(lines: Iterable[bytes]) -> Iterator[bytes]:
        return (_CLIENT_ID.sub(stand_in, line) for line in lines if line.endswith(b"\n"))

    return redact


def is_secret(key: str) -> bool:
    """Return True if a key names a secret itself; `token_file` does not, it names a file."""
    words = [word.lower() for word in _WORD.findall(key)]
    return bool(words) and (words[-1] in _SECRET_WORDS or "_".join(words[-2:]) in _SECRET_KEYS)


def _value(value: Any, path: str, secret: bool, cut: list[str]) -> Any:
    if isinstance(value, dict):
        return {
            key: _value(held, f"{path}.{key}".lstrip("."), secret or is_secret(str(key)), cut)
            for key, held in value.items()
        }
    if isinstance(value, list):
        return [_value(held, f"{path}.{index}", secret, cut) for index, held in enumerate(value)]
    if not isinstance(value, str) or not value:
        return value
    kept = CUT if secret else redacted_text(value)
    if kept != value:
        cut.append(path)
    return kept


ANSWER_TIMEOUT_S = 5.0
ANSWER_BYTES_MAX = 64 << 20
ENGINE_CONFIG_BYTES_MAX = 4 << 20
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
_REQUIREMENT = re.compile(r"[A-Za-z0-9._-]+")
_KEY = re.compile(rf"(?:[:;] |unknown key )((?:{'|'.join(Config.model_fields)})(?:\.\w+)*)")
"""A key of the configuration, as the errors about it begin."""


@dataclass(frozen=True)
class Part:
    """A small file of an incident, and its description."""

    name: str
    content: bytes
    about: str


@dataclass
class Segment:
    """An open journal segment: it can be read up to `size_bytes` even if the sidecar deletes it."""

    name: str
    file: IO[bytes]
    size_bytes: int
    header: dict[str, Any]
    ended: datetime


@dataclass
class Missing:
    """The missing parts with their reasons, in order."""

    found: list[dict[str, str]] = field(default_factory=list)

    def note(self, what: str, why: object) -> None:
        self.found.append({"what": what, "why": redacted_text(str(why))})


# The journal.


def journal_of(data: Path, last: timedelta, missing: Missing) -> list[Segment]:
    """Open the segments that cover the last `last` seconds of the journal, oldest first.

    The time ends at the last write, so a sidecar that died an hour ago is captured as it died. Each segment begins with
    a snapshot, so it can be replayed alone. The caller closes the files.
    """
    directory = data if segment_paths(data) else data / "journal"
    held = [segment for path in segment_paths(directory) if (segment := _held(path, missing)) is not None]
    if not held:
        missing.note("journal", f"there is no segment-*.jsonl in {directory}")
        return []
    for segment, following in pairwise(held):
        segment.ended = began_of(following.header) or segment.ended
    since = held[-1].ended - last
    kept = [segment for segment in held if segment.ended >= since]
    for segment in held[: -len(kept)]:
        segment.file.close()
    return kept


def _held(path: Path, missing: Missing) -> Segment | None:
    try:
        file = path.open("rb")
    except OSError as error:  # just rotated away, or not readable by this user
        missing.note(f"journal/{path.name}", error.strerror or error)
        return None
    status = os.fstat(file.fileno())
    header = header_in(file.readline())
    file.seek(0)
    return Segment(path.name, file, status.st_size, header, datetime.fromtimestamp(status.st_mtime, UTC))


def without_ids(segments: list[Segment]) -> list[Segment]:
    """Return copies of segments without clients' request ids, and close the given ones."""
    redact = ids_redactor()
    copies = []
    for segment in segments:
        copy = TemporaryFile()  # noqa: SIM115 — the caller closes it, like the segment's own
        with segment.file as file:
            copy.writelines(redact(_lines_of(file, segment.size_bytes)))
        size_bytes = copy.tell()
        copy.seek(0)
        copies.append(replace(segment, file=copy, size_bytes=size_bytes))
    return copies


def _lines_of(file: IO[bytes], size_bytes: int) -> Iterator[bytes]:
    """Yield the lines of a file up to a size, which may cut off the last one."""
    while size_bytes and (line := file.readline(size_bytes)):
        size_bytes -= len(line)
        yield line


# The configuration and the engines.


def why_broken(error: Misused) -> str:
    """Return why there is no configuration, without any of its values: the error shows those that are wrong."""
    keys = ", ".join(dict.fromkeys(_KEY.findall(error.message)))
    wrong = f"it is wrong at {keys}" if keys else "it is refused"
    return f"{wrong} [{error.reason.value}]; `sidecar config check FILE` says why, with the values"


def configuration_of(config: Config) -> tuple[Part, list[str]]:
    """Return the effective configuration without its secrets, and the keys that were redacted."""
    record, cut = redacted(full_record(config))
    text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True)
    return Part("config.yaml", text.encode(), "the configuration, environment and defaults included"), cut


def engine_configs_of(config: Config, missing: Missing) -> Iterator[Part]:
    """Yield the files that the configuration names for each backend's engine and base model."""
    for number, backend in enumerate(entries_of(config)):
        folder = f"backends/{number:02}-{_UNSAFE.sub('_', backend.identity)[:80]}"
        named = False
        for name, path in _files_of(backend):
            named = True
            part = _engine_config(Path(path).expanduser(), f"{folder}/{name}", backend.identity, missing)
            if part is not None:
                yield part
        if not named:
            missing.note(f"engine config of {backend.identity}", "backends[].engine.config names no file")


def _files_of(backend: Backend) -> Iterator[tuple[str, str]]:
    if backend.engine.config is not None:
        yield "engine.json", backend.engine.config
    if backend.base_model is not None and backend.base_model.config is not None:
        yield "base_model.json", backend.base_model.config


def _engine_config(path: Path, name: str, backend: str, missing: Missing) -> Part | None:
    path = path / "config.json" if path.is_dir() else path
    try:
        with path.open("rb") as file:
            content = file.read(ENGINE_CONFIG_BYTES_MAX + 1)
        if len(content) > ENGINE_CONFIG_BYTES_MAX:
            raise ValueError(f"it is larger than {ENGINE_CONFIG_BYTES_MAX} bytes")
        record, _ = redacted(json.loads(content))
    except (OSError, ValueError, RecursionError) as error:
        missing.note(name, f"{path}: {error}")
        return None
    return Part(name, json.dumps(record, indent=2).encode(), f"{path} of {backend}")


# The running process, and this one.


@dataclass(frozen=True)
class HttpListener:
    """The address of an http listener (HOST:PORT), and the TLS files to reach it.

    `tls` holds PEM files: `ca` (without it, this machine's CAs are trusted), `certificate` and `key`, which may be
    absent. It is None for a listener without TLS. `asks_back` is True if the listener requires a client's certificate.
    """

    address: str
    tls: Mapping[str, str] | None = None
    asks_back: bool = False

    @property
    def url(self) -> str:
        return f"{'http' if self.tls is None else 'https'}://{self.address}"

    def way_out(self, error: Exception) -> str:
        """Return advice for a listener that was not reached."""
        if self.tls is None:
            return "--http names another address, --ca turns TLS on"
        if self.asks_back and "certificate" not in self.tls:
            return "it asks its clients for a certificate: --certificate and --key name the PEM files of one"
        if "certificate verify failed" not in str(error):
            return "--http names another address"
        if "mismatch" in str(error):
            return "--http names the address that its certificate is for"
        return "--ca names the PEM file of the CA that signed its certificate"


def answers_of(listener: HttpListener, missing: Missing) -> Iterator[Part]:
    """Yield the pages of a running sidecar's http listener; each page that fails is noted as missing.

    Raises Misused for unusable TLS files.
    """
    verify = False if listener.tls is None else tls_context(listener.tls, "http/1.1")
    for page, name, codes in (("metrics", "metrics.txt", (200,)), ("readyz", "readiness.txt", (200, 503))):
        url = f"{listener.url}/{page}"
        try:
            yield Part(name, _get(url, codes, verify), f"{url} at the time of the capture")
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            missing.note(page, f"{url}: {error or type(error).__name__}; {listener.way_out(error)}")
            return  # the other page would not be answered either


def _get(url: str, codes: tuple[int, ...], verify: ssl.SSLContext | bool) -> bytes:
    content = b""
    with (
        httpx.Client(timeout=ANSWER_TIMEOUT_S, trust_env=False, verify=verify) as client,
        client.stream("GET", url) as answer,
    ):
        if answer.status_code not in codes:
            raise ValueError(f"it answers {answer.status_code}: no sidecar answers there")
        for piece in answer.iter_bytes():
            content += piece
            if len(content) > ANSWER_BYTES_MAX:
                raise ValueError(f"the answer is larger than {ANSWER_BYTES_MAX} bytes")
    return content


def http_address(listened: str) -> str:
    """Return the address to reach a listener at: the loopback for one that listens on all addresses."""
    host, _, port = listened.rpartition(":")
    loopback = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "[::1]", "::": "[::1]"}
    return f"{loopback.get(host, host)}:{port}"


def versions() -> dict[str, str]:
    """Return the versions that this command runs with; each segment names the version that wrote it."""
    found = {"lora-sidecar": product_version(), "python": sys.version.split()[0], "platform": platform.platform()}
    for requirement in requires("lora-sidecar") or ():
        named = _REQUIREMENT.match(requirement)
        if named is None or "extra ==" in requirement:
            continue
        try:
            found[named[0]] = version(named[0])
        except PackageNotFoundError:
            found[named[0]] = "not installed"
    return found
