"""The audit: who changed what, and who was denied what. Never a prompt, a token or a secret.

A change is one line, written before its answer goes out. A denial is written at once when it is the first of its kind
(the same caller, verb, action, resource and reason); its repetitions are counted and become one line per `aggregate_s`.
Serving never waits for the audit, except an operator's change for at most `WRITE_S`.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from time import time
from typing import Any

from sidecar.access.audit_log import (
    FORMAT,
    AuditLog,
    AuditRecord,
    Kind,
    Log,
    RotatingFile,
    Sink,
    Stdout,
    denials_file,
    read,
)
from sidecar.access.keys import SECRET
from sidecar.access.principal import Action, Principal, Proof, Resource
from sidecar.config import access as config

WRITE_S = 5.0
CALLERS_MAX = 10_000
"""Kinds of denials that are told apart at one time. Those of further callers are counted together."""
KINDS_OF_ONE_MAX = 100
"""Of these for one caller; its further ones are counted together, so that nobody hides behind another's thousands."""
TEXT_MAX = 300
ITEMS_MAX = 32
IDS_MAX = 100
"""How many ids of repeated denials their line has: who asks by one was told it with its error."""
MORE = "(more)"
_SECRETS = re.compile(rf"{SECRET}|eyJ[\w-]+\.[\w-]+\.[\w-]+|[\w-]{{16,}}\.[\w-]{{16,}}\.[\w-]{{16,}}")
"""API keys and JWTs, which callers write where they do not belong: as a name, or in place of an id."""
_NUMBER = re.compile(r"\d[\d.,]*")


@dataclass(slots=True)
class _Repeated:
    """A kind of denial: its line, how often it came again since `since` (Unix seconds), and ids of these."""

    line: dict[str, Any]
    since: float
    again: int = 0
    ids: list[str] = field(default_factory=list)


class Audit:
    """Records changes and denials in `log`; `clock` gives Unix seconds.

    `changed` belongs to the event loop; `denied` may be called by any thread.
    """

    def __init__(
        self,
        sinks: Mapping[Kind, Sink],
        file: Path | None = None,
        aggregate_s: float = 60.0,
        clock: Callable[[], float] = time,
    ) -> None:
        self.log = AuditLog(sinks, self.tell_repeated)
        self._file = file
        self._aggregate_s = aggregate_s
        self._clock = clock
        self._lock = threading.Lock()
        self._repeated: OrderedDict[tuple[Any, ...], _Repeated] = OrderedDict()
        """In the order of `since`."""
        self._kinds_of: Counter[tuple[Any, ...]] = Counter()

    @classmethod
    def configured(cls, settings: config.Audit, data: Path | None) -> Audit:
        """Return the audit of a configuration; `data` is the data directory. Without any place it goes to the log."""
        if settings.file is not None:
            file = Path(settings.file).expanduser()
        elif data is not None and not settings.stdout:
            file = data / "audit" / "audit.jsonl"
        else:
            sink = Stdout() if settings.stdout else Log()
            return cls({"change": sink, "denial": sink}, None, settings.aggregate_s)
        sizes = (settings.file_bytes_max, settings.files_max)
        sinks: dict[Kind, Sink] = {
            "change": RotatingFile(file, *sizes, is_synced=True),
            "denial": RotatingFile(denials_file(file), *sizes, is_synced=False),
        }
        return cls(sinks, file, settings.aggregate_s)

    def start(self) -> None:
        self.log.start()

    def stop(self) -> None:
        """Write all there is. Blocks for a few seconds at most."""
        self.tell_repeated(at_once=True)
        self.log.stop()

    async def changed(
        self,
        principal: Principal,
        peer: str,
        action: Action,
        resource: Resource,
        before: Mapping[str, Any],
        after: Mapping[str, Any],
        request_id: str,
        *,
        verb: str = "",
        why: str = "",
    ) -> bool:
        """Record a change, or with `why` one that failed for that reason. Return once it is written: True.

        Return False if it is lost, or not written within `WRITE_S`. `verb` is what was called, as "Adapters.Promote".
        """
        line = {
            **_said("change", self._clock(), principal, principal.proof, peer, action, resource),
            "verb": verb,
            "before": _clean(before),
            "after": _clean(after),
            "result": "failed" if why else "ok",
            "why": _text(why),
            "request_id": _text(request_id),
        }
        loop = asyncio.get_running_loop()
        written: asyncio.Future[bool] = loop.create_future()

        def told(is_written: bool) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(lambda: None if written.done() else written.set_result(is_written))

        self.log.put(AuditRecord("change", json.dumps(line), told))
        try:
            async with asyncio.timeout(WRITE_S):
                return await written
        except TimeoutError:
            return False

    def denied(
        self,
        principal: Principal | None,
        peer: str,
        proof: Proof,
        action: Action,
        resource: Resource,
        why: str,
        request_id: str = "",
        observed: bool = False,
        verb: str = "",
    ) -> None:
        """Record a denial, or with `observed` one that `identity.mode: observe` let pass. Never waits.

        `principal` is None if nothing was proven; `proof` is then how the call tried to.
        """
        who = _who(principal, proof, peer)
        cause = _NUMBER.sub("#", _text(why))  # "has 12,345 tokens left" is one cause, whatever the number
        about = (resource.sort, _text(resource.name), resource.ordinal)
        what: tuple[Any, ...] = (_text(verb), action, *about, cause, observed)
        now = self._clock()
        with self._lock:
            known = self._repeated.get((who, what))
            if known is None and self._kinds_of[who] >= KINDS_OF_ONE_MAX:
                what, resource = (MORE,), Resource(resource.sort, MORE)
                known = self._repeated.get((who, what))
            if known is None and len(self._repeated) >= CALLERS_MAX:
                who, what, resource = (MORE,), (MORE,), Resource(resource.sort, MORE)
                principal, peer = Principal(tenant=MORE), MORE
                known = self._repeated.get((who, what))
            if known is not None:
                known.again += 1
                if request_id and len(known.ids) < IDS_MAX:
                    known.ids.append(_text(request_id))
                return
            line = {
                **_said("denial", now, principal, proof, peer, action, resource),
                "verb": _text(verb),
                "result": "observed" if observed else "denied",
                "why": _text(why),
                "request_id": _text(request_id),
            }
            self._repeated[who, what] = _Repeated(line, now)
            self._kinds_of[who] += 1
        self.log.put(AuditRecord("denial", json.dumps(line)))

    def tell_repeated(self, at_once: bool = False) -> None:
        """Write a line for each kind of denial that has come again and is due; forget those that have not."""
        now = self._clock()
        while True:
            with self._lock:  # for one at a time: the event loop takes it for each denial
                kind, known = next(iter(self._repeated.items()), (None, None))
                if kind is None or known is None:
                    return
                if not at_once and 0 <= now - known.since < self._aggregate_s:  # below 0 the clock was set back
                    return
                again, since, ids = known.again, known.since, known.ids
                if again:
                    known.again, known.since, known.ids = 0, now, []
                    self._repeated.move_to_end(kind)
                else:
                    del self._repeated[kind]
                    self._kinds_of[kind[0]] -= 1
                    if not self._kinds_of[kind[0]]:
                        del self._kinds_of[kind[0]]
            if again:
                more = {"time": written_time(now), "count": again, "since": written_time(since), "request_ids": ids}
                self.log.put(AuditRecord("denial", json.dumps(known.line | more)))

    @property
    def is_readable(self) -> bool:
        """True if the lines are in files, which `read` finds."""
        return self._file is not None

    def read(self, since: float, adapter: str = "", tenant: str = "", kind: str = "") -> Iterator[str]:
        """Yield the JSON lines of this process since a time (Unix seconds), the newest last. Blocks while it reads.

        `adapter` finds what was done to it, and changes that name it, as a cancellation of its requests does;
        `tenant` finds what a tenant did and what was done to it. Yields nothing if the lines are in no file.
        """
        if self._file is None:
            return
        for text, line in read(self._file, since):
            about = line.get("resource", {})
            if (
                (not kind or line.get("kind") == kind)
                and (
                    not adapter
                    or (about.get("sort") in ("adapter", "version") and about.get("name") == adapter)
                    or adapter in (line.get(when, {}).get("adapter") for when in ("before", "after"))
                )
                and (
                    not tenant
                    or tenant == line.get("who", {}).get("tenant")
                    or (about.get("sort"), about.get("name")) == ("tenant", tenant)
                )
            ):
                yield text


def _who(principal: Principal | None, proof: Proof, peer: str) -> tuple[Any, ...]:
    """Return what tells callers apart: who they are, else the machine from which they come."""
    if principal is None:
        return (proof, host_of(peer))
    return (principal.tenant, principal.subject, principal.proof)


def host_of(peer: str) -> str:
    """Return the address of a peer without its port, which is another one with each connection."""
    return peer.rpartition(":")[0] or peer


def _said(
    kind: str, now: float, principal: Principal | None, proof: Proof, peer: str, action: Action, resource: Resource
) -> dict[str, Any]:
    """Return the part that changes and denials have in common."""
    who = principal or Principal()
    about = {"sort": resource.sort.value, "name": resource.name, "version": resource.ordinal}
    return {
        "format": FORMAT,
        "time": written_time(now),
        "kind": kind,
        "who": _clean({"tenant": who.tenant, "subject": who.subject, "groups": who.groups}),
        "proof": proof.value,
        "peer": _text(peer),
        "action": action.value,
        "resource": {key: _clean(value) for key, value in about.items() if value is not None},
    }


def written_time(now: float) -> str:
    """Return a time (Unix seconds) as lines have it: ISO 8601 in UTC with milliseconds."""
    return datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _clean(value: Any, depth: int = 0) -> Any:
    """Return a value of bounded size in which every text is printable: names and reasons come from anybody."""
    if isinstance(value, Mapping) and depth < 3:
        items = list(value.items())[:ITEMS_MAX]
        return {_text(str(key)): _clean(item, depth + 1) for key, item in items}
    if isinstance(value, (list, tuple)) and depth < 3:
        return [_clean(item, depth + 1) for item in value[:ITEMS_MAX]]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return round(value, 3) if isfinite(value) else None  # JSON has no such number
    return _text(str(value))


def _redacted(found: re.Match[str]) -> str:
    """Return what is left of a key or a token: the key's id, by which operators know it."""
    return f"lsk_{found[1]}_(hidden)" if found[1] else "(a token, hidden)"


def _text(text: str) -> str:
    is_long = len(text) > TEXT_MAX
    text = _SECRETS.sub(_redacted, text[: 2 * TEXT_MAX])  # cut first: a megabyte takes the pattern minutes
    if not is_long and len(text) <= TEXT_MAX and text.isprintable():
        return text
    printable = "".join(letter if letter.isprintable() else "?" for letter in text[:TEXT_MAX])
    return f"{printable}…" if is_long else printable
