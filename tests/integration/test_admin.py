"""The control plane over real gRPC, on a gateway without engines."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from sidecar.access.access import OURSELVES
from sidecar.access.operators import read_tokens
from sidecar.config.plugins import policies_of
from sidecar.core.config import CoreConfig
from sidecar.core.facts import EngineFacts, Suspicion
from sidecar.errors import Misused
from sidecar.fronts.admin.front import add_admin
from sidecar.proto import admin_pb2 as pb
from sidecar.proto import admin_pb2_grpc
from sidecar.shell.gateway import Gateway
from sidecar.shell.requests import RequestFacts
from sidecar.state.registry import SqliteRegistry
from tests.kit.cli_served import guarded
from tests.kit.peft_files import BASE_MODEL, write_adapter
from tests.kit.scripted_backend import PAYLOAD, ScriptedBackend
from tests.kit.serving import until


@dataclass
class Admin:
    """A gateway with an admin listener, and a client of it."""

    gateway: Gateway
    address: str
    adapters: Any
    backends: Any
    queues: Any


async def served(
    tmp_path: Path, backends: tuple[ScriptedBackend, ...] = (), token_file: Path | None = None
) -> AsyncIterator[Admin]:
    """Serve the admin services over a new gateway until the test is done."""
    config = CoreConfig()
    registry = SqliteRegistry(None)
    gateway = Gateway(config, policies_of(config), registry, [tmp_path])
    await gateway.start([(backend, EngineFacts(base_models=(BASE_MODEL,), seats=2)) for backend in backends])
    server = grpc.aio.server(interceptors=guarded(gateway, token_file))
    add_admin(server, gateway)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    address = f"127.0.0.1:{port}"
    async with grpc.aio.insecure_channel(address) as channel:
        yield Admin(
            gateway,
            address,
            admin_pb2_grpc.AdaptersStub(channel),
            admin_pb2_grpc.BackendsStub(channel),
            admin_pb2_grpc.QueuesStub(channel),
        )
    await server.stop(None)
    await gateway.stop()
    await registry.close()


@pytest.fixture
async def admin(tmp_path: Path) -> AsyncIterator[Admin]:
    """Serve a gateway with two scripted backends, one of them up."""
    async for served_admin in served(tmp_path, (ScriptedBackend("trt-0"), ScriptedBackend("trt-1", up=False))):
        yield served_admin


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """Return the machine's reason of a gRPC error."""
    details = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    assert isinstance(details, bytes)
    status_pb2.Status.FromString(details).details[0].Unpack(info)
    return info.reason


async def failure(call: Any) -> tuple[grpc.StatusCode, str, str]:
    """Return code, reason and message of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), reason_of(caught.value), caught.value.details() or ""


async def test_register_list_show_unregister(admin: Admin, tmp_path: Path) -> None:
    """A registered adapter is listed with its facts, and gone when its name is forgotten."""
    path = str(write_adapter(tmp_path / "sql"))
    answer = await admin.adapters.Register(pb.RegisterRequest(name="sql", path=path, allow=["acme"]))
    assert not answer.unchanged
    assert answer.adapter.version == "sql@v1"
    assert answer.adapter.rank == 8
    assert list(answer.adapter.modules) == ["attn_q", "attn_v"]
    assert list(answer.adapter.allow) == ["acme"]
    listed = await admin.adapters.List(pb.ListAdaptersRequest())
    assert [adapter.name for adapter in listed.adapters] == ["sql"]
    await admin.adapters.Unregister(pb.UnregisterRequest(name="sql"))
    assert not (await admin.adapters.List(pb.ListAdaptersRequest())).adapters


async def test_adapters_are_listed_in_pages(admin: Admin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name; a page ends with as many as are asked for, or with its bytes. One that goes meanwhile is left out."""
    path = str(write_adapter(tmp_path / "sql"))
    names = [f"a{number}" for number in range(7)]
    for number, name in enumerate(reversed(names)):
        allow = ["acme"] if number % 2 else []
        await admin.adapters.Register(pb.RegisterRequest(name=name, path=path, allow=allow))

    async def pages(**asked: Any) -> list[list[str]]:
        request, found = pb.ListAdaptersRequest(**asked), []
        while not found or request.page_token:
            page = await admin.adapters.List(request)
            found.append([adapter.name for adapter in page.adapters])
            request.page_token = page.next_page_token
        return found

    assert await pages() == [names]
    assert await pages(page_size=3) == [names[:3], names[3:6], names[6:]]
    assert await pages(page_size=7) == [names]
    assert await pages(page_token="a4x") == [names[5:]]
    assert await pages(tenant="beta", page_size=3) == [["a0", "a2", "a4"], ["a6"]]
    assert await pages(tenant="acme") == [names]
    assert await pages(state="cold", page_size=4) == [names[:4], names[4:]]
    assert await pages(state="loaded") == [[]]
    assert await pages(unused_s=3600) == [names]
    with pytest.raises(grpc.RpcError, match=r'state is "warm"; it must be one of loaded, stored, cold, quarantined'):
        await pages(state="warm")
    monkeypatch.setattr("sidecar.fronts.admin.adapters.PAGE_BYTES_MAX", 1)
    assert await pages() == [[name] for name in names]
    first = await admin.adapters.List(pb.ListAdaptersRequest(page_size=1))
    await admin.adapters.Unregister(pb.UnregisterRequest(name="a0"))
    await admin.adapters.Unregister(pb.UnregisterRequest(name="a1"))
    assert await pages(page_token=first.next_page_token) == [[name] for name in names[2:]]


async def test_the_same_content_again_is_unchanged(admin: Admin, tmp_path: Path) -> None:
    """Registering the same files under the same name twice says so and changes nothing."""
    request = pb.RegisterRequest(name="sql", path=str(write_adapter(tmp_path / "sql")))
    first = await admin.adapters.Register(request)
    again = await admin.adapters.Register(request)
    assert again.unchanged
    assert again.adapter.digest == first.adapter.digest


async def test_errors_carry_reasons(admin: Admin, tmp_path: Path) -> None:
    """What is refused has its own code, reason and sentence."""
    write_adapter(tmp_path / "sql")
    await admin.adapters.Register(pb.RegisterRequest(name="sql", path=str(tmp_path / "sql")))
    code, reason, message = await failure(admin.adapters.Get(pb.AdapterRequest(name="sqk")))
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_ADAPTER")
    assert "did you mean sql" in message
    code, reason, message = await failure(admin.adapters.Register(pb.RegisterRequest(name="x", path="/etc")))
    assert (code, reason) == (grpc.StatusCode.PERMISSION_DENIED, "ORIGIN_NOT_ALLOWED")
    code, reason, message = await failure(admin.adapters.Rollback(pb.RollbackRequest(name="sql")))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_PREVIOUS_VERSION")
    code, reason, message = await failure(admin.backends.Get(pb.BackendRequest(backend="trt-9")))
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_BACKEND")
    assert "trt-0, trt-1" in message


async def test_pin_prefetch_and_evict(admin: Admin, tmp_path: Path) -> None:
    """A prefetched adapter is in the store and on the named backend; an evicted one leaves the store only."""
    await admin.adapters.Register(pb.RegisterRequest(name="sql", path=str(write_adapter(tmp_path / "sql"))))
    answer = await admin.adapters.Prefetch(pb.PrefetchRequest(name="sql", backends=["trt-0"]))
    assert [(place.place, place.result) for place in answer.places] == [("trt-0", "fetching, to be loaded")]
    await admin.gateway.backends["trt-0"].loaded.wait()  # type: ignore[attr-defined]
    shown = await admin.adapters.Get(pb.AdapterRequest(name="sql"))
    assert [(copy.state, copy.dtype) for copy in shown.store] == [("held", "float16")]
    assert shown.store[0].task_id.isdigit()
    assert [(place.backend, place.tier) for place in shown.backends] == [("trt-0", "gpu"), ("trt-1", "absent")]
    assert (await admin.adapters.Pin(pb.AdapterRequest(name="sql"))).pinned
    assert not (await admin.adapters.Unpin(pb.AdapterRequest(name="sql"))).pinned
    places = (await admin.adapters.Evict(pb.AdapterRequest(name="sql"))).places
    assert places[0].result == "dropped"
    assert "no unload" in places[1].result
    assert not (await admin.adapters.Get(pb.AdapterRequest(name="sql"))).store


async def test_a_prefetch_without_backends_is_of_the_host_store(admin: Admin, tmp_path: Path) -> None:
    """It answers for the store, and for a backend only where that is why nothing is fetched; nothing is loaded."""

    async def prefetched() -> list[tuple[str, str]]:
        answer = await admin.adapters.Prefetch(pb.PrefetchRequest(name="sql"))
        return [(place.place, place.result) for place in answer.places]

    await admin.adapters.Register(pb.RegisterRequest(name="sql", path=str(write_adapter(tmp_path / "sql"))))
    assert await prefetched() == [("host store", "fetching")]
    store = admin.gateway.state.store
    await until(lambda: any(entry.ready for entry in store.entries.values()))
    assert await prefetched() == [("host store", "held already")]
    shown = await admin.adapters.Get(pb.AdapterRequest(name="sql"))
    assert [place.tier for place in shown.backends] == ["absent", "absent"]
    answer = await admin.adapters.Prefetch(pb.PrefetchRequest(name="sql", backends=["trt-0"]))
    assert [(place.place, place.result) for place in answer.places] == [("trt-0", "loading from the host store")]
    await until(lambda: bool(admin.gateway.state.backends["trt-0"].shadow.device.held))
    assert await prefetched() == [("host store", "held already"), ("trt-0", "resident already")]
    for backend in ("trt-0", "trt-1"):
        await admin.backends.Drain(pb.BackendRequest(backend=backend))
    assert await prefetched() == [("host store", "not fetched: no backend can serve it")]


async def test_backends_show_and_drain(admin: Admin, caplog: pytest.LogCaptureFixture) -> None:
    """A backend shows its facts and standing, and drains and comes back; the log says who asked."""
    caplog.set_level(logging.INFO, "sidecar")
    listed = (await admin.backends.List(pb.ListBackendsRequest())).backends
    assert [(backend.id, backend.state) for backend in listed] == [("trt-0", "up"), ("trt-1", "down")]
    assert listed[0].address == "scripted:0"
    assert listed[0].base_model == BASE_MODEL
    drained = await admin.backends.Drain(pb.BackendRequest(backend="trt-0"))
    assert (drained.state, drained.draining) == ("drained", True)  # nothing runs there
    assert (await admin.backends.Undrain(pb.BackendRequest(backend="trt-0"))).state == "up"
    said = [line for line in caplog.messages if " drains" in line]
    assert [line.rpartition(":")[0] for line in said] == [
        "trt-0 drains: asked by 127.0.0.1", "trt-0 drains no longer: asked by 127.0.0.1",
    ]  # fmt: skip


async def test_release_lifts_a_quarantine(admin: Admin, tmp_path: Path) -> None:
    """`Release` empties the reason that `List` shows."""
    await admin.adapters.Register(pb.RegisterRequest(name="sql", path=str(write_adapter(tmp_path / "sql"))))
    digest = admin.gateway.state.names["sql"].digest
    admin.gateway.state.versions[digest].quarantined = Suspicion(("b0", "b1"), "both died")
    listed = await admin.adapters.List(pb.ListAdaptersRequest())
    assert listed.adapters[0].quarantined == "its first loads coincided with the loss of b0 and b1 (last: both died)"
    assert not (await admin.adapters.Release(pb.AdapterRequest(name="sql"))).quarantined


async def test_the_queue_says_who_waits_and_why(admin: Admin) -> None:
    """With two seats taken the third request is shown waiting, for a seat."""
    tickets = [admin.gateway.submit(RequestFacts("", tenant="acme"), PAYLOAD, "", OURSELVES) for _ in range(3)]
    backend = admin.gateway.backends["trt-0"]
    await backend.running_are(2)  # type: ignore[attr-defined]
    view = await admin.queues.Get(pb.QueueRequest())
    assert (view.waiting, view.running) == (1, 2)
    assert [(why.why, why.count) for why in view.why] == [("seats full", 1)]
    assert "all seats are taken on trt-0" in view.verdict
    waiting = view.requests[0]
    assert (waiting.request, waiting.tenant, getattr(waiting, "class")) == (tickets[2].request, "acme", "default")
    promise = admin.gateway.state.requests[tickets[2].request].promise
    assert promise is not None
    assert waiting.bound_s == pytest.approx(promise.bound_ns / 1e9)
    assert (waiting.expires_s, waiting.voided) == (pytest.approx(600), "")
    assert waiting.waited_s < waiting.bound_s < waiting.expires_s
    assert (await admin.queues.Get(pb.QueueRequest(backend="trt-1"))).waiting == 0
    code, reason, _ = await failure(admin.queues.Get(pb.QueueRequest(adapter="nobody")))
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_ADAPTER")
    for ticket in tickets:
        admin.gateway.close(ticket)


async def test_a_token_is_asked_for(tmp_path: Path) -> None:
    """With a token file only calls that carry one of its tokens are answered."""
    file = tmp_path / "tokens"
    file.write_text("old\nnew\n")
    async for admin in served(tmp_path, token_file=file):
        request = pb.ListAdaptersRequest()
        for header in ((), (("authorization", "Bearer wrong"),), (("authorization", "old"),)):
            code, reason, message = await failure(admin.adapters.List(request, metadata=header))
            assert (code, reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
            assert "Bearer" in message
        twice = (("authorization", "Bearer old"), ("authorization", "Bearer new"))
        assert (await failure(admin.adapters.List(request, metadata=twice)))[0] == grpc.StatusCode.UNAUTHENTICATED
        for token in ("old", "new"):
            await admin.adapters.List(request, metadata=(("authorization", f"Bearer {token}"),))


def test_a_token_file_must_hold_a_token(tmp_path: Path) -> None:
    """An empty or missing token file is refused when it is read, not when somebody calls."""
    (tmp_path / "empty").write_text("\n")
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("empty", "is empty"), ("missing", "No such file"), ("pipe", "to which nobody writes")):
        with pytest.raises(Misused, match=words):
            read_tokens(tmp_path / name)
