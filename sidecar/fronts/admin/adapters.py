"""The service `lorasidecar.v1.Adapters`: register, show, move between versions, unregister, watch.

`Adapters.Push`: receive an adapter's files from a client, in chunks, into the spool.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable
from math import inf
from time import monotonic, monotonic_ns, time
from typing import Any

from sidecar.access.access import OURSELVES
from sidecar.adapters.names import check_name
from sidecar.adapters.pushed import PushedFile, Receiver, check_announced, wrong
from sidecar.config.identities import clipped
from sidecar.errors import Reason, Refused, SidecarError
from sidecar.fronts import callers
from sidecar.fronts.admin.verify import Verifier
from sidecar.fronts.callers import CALLER, CHECKED_S
from sidecar.fronts.status import abort, answers_errors
from sidecar.proto import admin_pb2, admin_pb2_grpc
from sidecar.proto.filling import filled
from sidecar.shell.catalogue import Entered, Wanted
from sidecar.shell.gateway import Gateway
from sidecar.shell.loading import PATH
from sidecar.state.records import Record, paused_for
from sidecar.state.registry import Change
from sidecar.tasks import undisturbed
from sidecar.telling.pool import ADAPTER_STATES, adapter_message, adapter_messages, adapter_state, caveats
from sidecar.telling.weights import told_at, told_of_store

PUSHES_MAX, PUSHES_OF_TENANT_MAX = 32, 4
"""Concurrent pushes: each holds a file open and up to one chunk in memory."""
SILENCE_S_MAX, LEAST_BYTES_S = 60.0, 64 << 10
"""How long a push may be silent, at a time and twice that in all but for a second for each `LEAST_BYTES_S`."""


class Pushes:
    """Receive pushes for a gateway."""

    def __init__(self, gateway: Gateway, silence_s_max: float = SILENCE_S_MAX) -> None:
        self._gateway = gateway
        self._silence_s_max = silence_s_max
        self._under_way: Counter[str] = Counter()
        """How many of each tenant are under way; callers without one, such as operators, count together."""

    async def receive(self, requests: AsyncIterator[Any]) -> Entered:
        """Receive one push, register its files and return the entry.

        Raises Refused for a protocol error or a client that is too slow, Invalid for a bad adapter.
        """
        tenant = CALLER.get(OURSELVES).principal.tenant
        if self._under_way.total() >= PUSHES_MAX:
            raise Refused(Reason.QUEUE_FULL, f"{PUSHES_MAX} pushes are under way; push again later")
        if tenant and self._under_way[tenant] >= PUSHES_OF_TENANT_MAX:
            text = f"{PUSHES_OF_TENANT_MAX} pushes of tenant {tenant} are under way; push again when one has ended"
            raise Refused(Reason.QUEUE_FULL, text)
        self._under_way[tenant] += 1
        try:
            return await self._receive(_Client(self._gateway, requests, self._silence_s_max))
        finally:
            self._under_way -= Counter([tenant])

    async def _receive(self, client: _Client) -> Entered:
        start = await self._start(client)
        files = [PushedFile(file.name, file.size_bytes, file.sha256) for file in start.files]
        check_name(start.name)
        wanted = _wanted(start)
        wanted.check(start.name)
        sources = self._gateway.sources
        check_announced(start.name, files, sources.limits)
        with sources.incoming() as folder:
            receiver = Receiver(start.name, files, folder)
            try:
                await self._take_all(start.name, client, receiver)
            finally:
                receiver.close()
            return await self._gateway.catalogue.push(start.name, folder, wanted)

    async def _start(self, client: _Client) -> Any:
        first = await client.next("")
        if first is None or first.WhichOneof("part") != "start":
            raise wrong("", "the first message must be the start: the name and the files")
        return first.start

    async def _take_all(self, name: str, client: _Client, receiver: Receiver) -> None:
        while (message := await client.next(name)) is not None:
            if message.WhichOneof("part") != "chunk":
                raise wrong(name, "after the start only chunks may follow")
            chunk = message.chunk
            # Runs to its end even if the client leaves: only then is the file closed and the folder removed.
            await undisturbed(asyncio.to_thread(receiver.take, chunk.file, chunk.offset, chunk.data))
        await undisturbed(asyncio.to_thread(receiver.finish))


class _Client:
    """Who pushes: its messages, for as long as its credential is good and it is quick enough."""

    def __init__(self, gateway: Gateway, requests: AsyncIterator[Any], silence_s_max: float) -> None:
        self._access = gateway.access
        self._caller = CALLER.get(OURSELVES)
        self._requests = requests
        self._silence_s_max, self._left_s = silence_s_max, 2 * silence_s_max

    async def next(self, name: str) -> Any:
        """Return the next message; None at the end. Raises SidecarError."""
        coming = asyncio.ensure_future(anext(self._requests, None))
        began_s = monotonic()
        try:
            while not coming.done():
                self._access.check(self._caller)
                waited_s = monotonic() - began_s
                if waited_s >= self._silence_s_max:
                    raise wrong(name, f"nothing came for {self._silence_s_max:g} s")
                if waited_s >= self._left_s:
                    why = f"it brings less than {LEAST_BYTES_S >> 10} KiB a second"
                    raise wrong(name, f"{why}; push over a faster connection, or register it from an origin")
                left_s = min(self._silence_s_max, self._left_s) - waited_s
                await asyncio.wait([coming], timeout=min(CHECKED_S, left_s))
        finally:
            coming.cancel()
        self._access.check(self._caller)
        message = coming.result()
        if message is not None:
            self._left_s += len(message.chunk.data) / LEAST_BYTES_S - (monotonic() - began_s)
        return message


def _wanted(start: Any) -> Wanted:
    return Wanted(
        allow=tuple(start.allow),
        pin=start.pin,
        labels=tuple(sorted(start.labels.items())),
        stage=start.stage,
        managed_by="push",
        hold_s=start.hold_s,
        base=start.base,
    )


LISTED_A_STEP = 50
PAGE_MAX, PAGE_BYTES_MAX = 1_000, 2 << 20
"""The most adapters of one page of a list, and the bytes with which a page ends: clients take 4 MiB at most."""
"""Adapters added to a list before the event loop may do something else."""
_TOKEN = re.compile(r"[0-9]{1,18}\Z")
OF_VERSION = (
    "version", "digest", "base_model", "path", "rank", "modules", "dtype", "quarantined", "store", "backends",
    "unused_s",
)  # fmt: skip
"""What a message says of the current version."""
WATCHED_MAX = 1000
"""Changes that a watcher may be behind; beyond that its call ends and it resumes from its last token."""


class AdaptersService(admin_pb2_grpc.AdaptersServicer):
    """Registers, shows, moves and forgets adapters."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._catalogue = gateway.catalogue
        self._pushes = Pushes(gateway)
        self._verifier = Verifier(gateway)

    @answers_errors
    async def Register(self, request: Any, context: Any) -> Any:  # noqa: N802 — gRPC's names, here and below
        wanted = Wanted(
            allow=tuple(request.allow),
            pin=request.pin,
            labels=tuple(sorted(request.labels.items())),
            stage=request.stage,
            hold_s=request.hold_s,
            base=request.base,
        )
        caller, access = callers.CALLER.get(), self._gateway.access
        allow = access.folders_of(caller, self._gateway.sources.allow, request.path, callers.id_of_call(context))
        return self._registered(await self._catalogue.register(request.name, request.path, wanted, allow))

    @answers_errors
    async def Push(self, requests: Any, context: Any) -> Any:  # noqa: N802
        return self._registered(await self._pushes.receive(requests))

    @answers_errors
    async def Get(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._adapter(request.name)

    @answers_errors
    async def List(self, request: Any, context: Any) -> Any:  # noqa: N802
        if request.state not in ("", *ADAPTER_STATES):
            states = ", ".join(ADAPTER_STATES)
            raise Refused(Reason.INVALID_REQUEST, f'state is "{clipped(request.state)}"; it must be one of {states}')
        if not request.unused_s >= 0:  # nan, too
            raise Refused(Reason.INVALID_REQUEST, f"unused_s is {request.unused_s}; it must be a number of seconds")
        response, shown = admin_pb2.ListAdaptersResponse(), await self._shown()
        state, size = self._gateway.state, min(request.page_size or PAGE_MAX, PAGE_MAX)
        tenant, after, size_bytes = request.tenant, request.page_token, 0
        names = sorted(
            name
            for name, known in state.names.items()
            if name > after and name in shown and (not tenant or known.is_for(tenant))
        )
        for number, adapter in enumerate(adapter_messages(state, monotonic_ns(), names), 1):
            if _is_asked_for(self._completed(adapter), request):
                response.adapters.append(adapter)
                size_bytes += response.adapters[-1].ByteSize()
                if (len(response.adapters) >= size or size_bytes >= PAGE_BYTES_MAX) and adapter.name != names[-1]:
                    response.next_page_token = adapter.name
                    break
            if number % LISTED_A_STEP == 0:
                await asyncio.sleep(0)  # a thousand adapters must not delay the tokens of running requests
        return response

    async def _shown(self) -> Collection[str]:
        """Return the names that the caller may see."""
        caller, access, records = callers.CALLER.get(), self._gateway.access, self._catalogue.registry.all()
        if access.is_operator(caller):
            return self._gateway.state.names
        return await access.visible(caller, caller.principal.tenant, records)

    def _may_see(self, change: Change) -> bool:
        """Return True if the caller may hear of a change. Of a name that is forgotten only operators do.

        What is sent is the name as it is now, so that has to be visible, too.
        """
        caller, access = callers.CALLER.get(), self._gateway.access
        if access.is_operator(caller):
            return True
        records = change.record, self._catalogue.registry.get(change.name)
        return all(record is not None and access.may_see(caller, caller.principal.tenant, record) for record in records)

    def _registered(self, entered: Entered) -> Any:
        """Return the result of a registration: the name as it is now, the content's version, and warnings."""
        name, state = entered.record.name, self._gateway.state
        adapter = self._adapter(name)
        version = state.names[name].versions.get(entered.ordinal)  # another replica may have removed it already
        returns = [f"a rollback had left v{entered.ordinal}; it is current again"] if entered.returns else []
        return admin_pb2.RegisterResponse(
            adapter=adapter,
            version=f"v{entered.ordinal}",
            unchanged=entered.unchanged,
            warnings=[*returns, *(() if version is None else caveats(state, version))],
        )

    @answers_errors
    async def Unregister(self, request: Any, context: Any) -> Any:  # noqa: N802
        gone = await self._catalogue.unregister(request.name, request.hold_s)
        return admin_pb2.UnregisterResponse(places=_places(told_at(gone)))

    @answers_errors
    async def Evict(self, request: Any, context: Any) -> Any:  # noqa: N802
        return _places_message(told_at((await self._gateway.evict(request.name)).places))

    @answers_errors
    async def Pin(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._catalogue.set_pin(request.name, True)
        return self._adapter(request.name)

    @answers_errors
    async def Unpin(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._catalogue.set_pin(request.name, False)
        return self._adapter(request.name)

    @answers_errors
    async def Prefetch(self, request: Any, context: Any) -> Any:  # noqa: N802
        answer = await self._gateway.prefetch(request.name, tuple(request.backends))
        return _places_message(told_at(answer.places) if request.backends else told_of_store(answer.places))

    @answers_errors
    async def Release(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._catalogue.release(request.name)
        return self._adapter(request.name)

    @answers_errors
    async def Promote(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._catalogue.promote(request.name, request.version, request.weight or 100, request.hold_s)
        return self._adapter(request.name)

    @answers_errors
    async def Rollback(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._catalogue.roll_back(request.name, request.version, request.hold_s)
        return self._adapter(request.name)

    @answers_errors
    async def Refresh(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._catalogue.refresh(request.name, request.version)
        return self._adapter(request.name)

    @answers_errors
    async def Pause(self, request: Any, context: Any) -> Any:  # noqa: N802
        if not request.for_s >= 0:  # not a number neither
            raise Refused(Reason.INVALID_REQUEST, f"for_s is {request.for_s:g}; it must be 0 or more seconds")
        await self._catalogue.set_pause(request.name, time() + request.for_s if request.for_s else inf)
        return self._adapter(request.name)

    @answers_errors
    async def Resume(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._catalogue.set_pause(request.name, 0.0)
        return self._adapter(request.name)

    async def Verify(self, request: Any, context: Any) -> None:  # noqa: N802
        """Stream the findings of a verification as they are made."""
        try:
            await self._verifier.verify(request, context)
        except SidecarError as error:
            await abort(context, error)

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        """Stream the changes after the token, or all names without one, then each change as it happens."""
        changes: asyncio.Queue[Change] = asyncio.Queue(WATCHED_MAX)
        unsubscribe = self._catalogue.registry.subscribe(lambda change: _queue(changes, change))
        try:
            caught_up = await self._catch_up(request.token)
            sent = {change.number for change in caught_up} if request.token else ()
            for change in filter(self._may_see, caught_up):
                await context.write(self._change_message(change))
            while not changes.full():
                self._gateway.access.check(callers.CALLER.get())  # its credential may end meanwhile
                try:
                    async with asyncio.timeout(callers.CHECKED_S):
                        change = await changes.get()
                except TimeoutError:
                    continue
                self._gateway.access.check(callers.CALLER.get())
                if change.number not in sent and self._may_see(change):  # a change made during the catch-up is in both
                    await context.write(self._change_message(change))
            raise Refused(Reason.QUEUE_FULL, "the watcher fell behind; watch again with its last token")
        except SidecarError as error:
            await abort(context, error)
        finally:
            unsubscribe()

    async def _catch_up(self, token: str) -> list[Change]:
        registry = self._catalogue.registry
        if not token:
            return [Change(registry.last_change, record.name, record) for record in registry.all()]
        if not _TOKEN.match(token):
            raise Refused(Reason.INVALID_REQUEST, f'"{clipped(token)}" is not a token that Watch gave')
        return await registry.changes_after(int(token))

    def _change_message(self, change: Change) -> Any:
        message = admin_pb2.WatchResponse(token=str(change.number), name=change.name)
        if change.record is not None and change.name in self._gateway.state.names:
            message.adapter.CopyFrom(self._adapter(change.name))
        return message

    def _adapter(self, name: str) -> Any:
        """Return a name as it is now. Raises Refused(UNKNOWN_ADAPTER) if it has been unregistered meanwhile."""
        self._catalogue.known(name)
        return self._completed(adapter_message(self._gateway.state, name, monotonic_ns()))

    def _completed(self, message: Any) -> Any:
        """Return an adapter as the caller may see it.

        Where its files are, for whom else it is and what manages it are shown to those who may change it.
        """
        record = self._catalogue.registry.get(message.name)
        if record is None:
            return message
        caller, access = callers.CALLER.get(), self._gateway.access
        shown = {
            version.ordinal for version in record.versions if access.may_see_version(caller, record, version.ordinal)
        }
        _add_record(message, record, shown)
        if self._gateway.state.names[message.name].current not in shown:
            for field in OF_VERSION:
                message.ClearField(field)
        if not access.may_change(caller, record):
            for field in ("path", "managed_by", "held_s"):
                message.ClearField(field)
            message.allow[:] = [tenant for tenant in message.allow if tenant == caller.principal.tenant]
            for version in message.versions:
                version.ClearField("origin")
                version.labels.pop(PATH, None)
        return message


def _queue(changes: asyncio.Queue[Change], change: Change) -> None:
    """Give a watcher a change. A full queue has lost one; `Watch` ends the call then."""
    if not changes.full():
        changes.put_nowait(change)


def _add_record(message: Any, record: Record, shown: Collection[int]) -> None:
    """Add what the registry knows of an adapter, and those of its versions that are shown."""
    message.versions.extend(_version_messages(record, shown))
    message.managed_by = record.managed_by
    message.held_s = max(0.0, record.held_until - time())
    message.paused_s = paused_for(record, time()) or 0.0
    if record.canary is not None and record.canary[0] in shown:
        message.canary_version, message.canary_weight = f"v{record.canary[0]}", record.canary[1]


def _version_messages(record: Record, shown: Collection[int]) -> list[Any]:
    roles: dict[int | None, str] = dict.fromkeys(record.withdrawn, "withdrawn")
    roles |= {record.previous: "previous", record.current: "current"}
    if record.canary is not None:
        roles[record.canary[0]] = "canary"
    return [
        filled(
            admin_pb2.Version,
            version,
            version=f"v{version.ordinal}",
            digest=version.adapter.digest,
            labels=dict(version.labels),
            role=roles.get(version.ordinal, ""),
        )
        for version in record.versions
        if version.ordinal in shown
    ]


def _places_message(lines: Iterable[tuple[str, str]]) -> Any:
    return admin_pb2.PlacesResponse(places=_places(lines))


def _places(lines: Iterable[tuple[str, str]]) -> list[Any]:
    return [admin_pb2.Place(place=place, result=result) for place, result in lines]


def _is_asked_for(adapter: Any, request: Any) -> bool:
    """Return True if a list is to have an adapter, by what its caller may see of it."""
    if request.tenant and adapter.allow and request.tenant not in adapter.allow:
        return False
    if request.unused_s and adapter.HasField("unused_s") and adapter.unused_s < request.unused_s:
        return False
    return request.state in ("", adapter_state(adapter))
