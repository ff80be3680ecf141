"""An external check decides about each call, at every front, and without a clear yes in time no call is let in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2

from sidecar.proto import admin_pb2, admin_pb2_grpc, gateway_pb2
from tests.attack.test_credentials import HEADER, Door, Metadata
from tests.integration.test_observe import denials
from tests.kit import protobuf_wire as wire
from tests.kit.authority import NEEDS_OPENSSL, Authority
from tests.kit.authorization import (
    DENIED,
    ERROR,
    PERMISSION_DENIED,
    Asked,
    AuthorizationServer,
    authorization,
    denied,
    ok,
    silence,
)
from tests.kit.emulated import running_engine
from tests.kit.kserve_clients import DUMMY
from tests.kit.serving import serving, until, write_adapters
from tests.kit.tokens import TokenMaker

CODE = grpc.StatusCode
HUGE = "x" * 200_000
FOREVER_S = 10.0
"""A time limit that no test reaches; that of the product is 0.5 s."""


@dataclass
class House(Door):
    """A sidecar that asks `checks`, and its clients."""

    checks: AuthorizationServer
    folder: Path

    @property
    def good(self) -> Metadata:
        return ((HEADER, self.bearer),)

    async def list_adapters(self, metadata: Metadata) -> grpc.StatusCode:
        stub: Any = admin_pb2_grpc.AdaptersStub(self.served.admin_channel)  # type: ignore[no-untyped-call]
        try:
            await stub.List(admin_pb2.ListAdaptersRequest(), metadata=metadata)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return CODE.OK

    async def refusal(self, metadata: Metadata) -> grpc.aio.AioRpcError:
        """Return the error of a Generate call."""
        request = gateway_pb2.GenerateRequest(tokens=gateway_pb2.TokenIds(ids=[1]), max_tokens=2)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in self.served.gateway.Generate(request, metadata=metadata):
                pass
        return caught.value

    async def metrics(self) -> dict[str, float]:
        """Return the counts of checks by result, and how many were timed."""
        _, text = await self.served.sidecar.metrics.render()
        found = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if "external_check" in line)
        name = 'lora_sidecar_external_checks_total{result="%s"}'
        counts = {result: float(found[name % result]) for result in ("ok", "denied", "failed")}
        return counts | {"timed": float(found.get("lora_sidecar_external_check_seconds_count", 0))}

    @property
    def denials(self) -> list[dict[str, Any]]:
        return denials(self.folder / "data")


@asynccontextmanager
async def house(
    folder: Path,
    checks: AuthorizationServer | None = None,
    mode: str = "enforce",
    identity: dict[str, Any] | None = None,
    **external: Any,
) -> AsyncIterator[House]:
    write_adapters(folder / "adapters", 1)
    maker = TokenMaker(folder)
    async with (
        running_engine(**DUMMY) as engine,
        authorization() as own,
    ):
        checks = checks or own
        settings = {
            "mode": mode,
            "issuers": [maker.entry],
            "local_admin": False,
            "external": {"address": checks.address, "timeout_s": FOREVER_S} | external,
        }
        async with serving(
            [engine],
            folder / "adapters",
            identity=settings | (identity or {}),
            access={"policies": {"roles": {"acme": ["operator"]}}},
            data_directory=str(folder / "data"),
        ) as served:
            yield House(served, maker, checks, folder)


async def fronts(running: House, metadata: Metadata) -> dict[str, Any]:
    """Return what a call comes to at each front."""
    async with running.http() as http:
        models = await http.get("/v1/models?versions=1", headers=list(metadata))
    return {
        "generate": await running.generate(metadata),
        "unary": await running.infer(metadata),
        "stream": await running.stream(metadata),
        "openai": (await running.complete(list(metadata))).status_code,
        "models": models.status_code,
        "admin": await running.list_adapters(metadata),
    }


async def test_every_front_asks_and_says_what_it_is_asked(tmp_path: Path) -> None:
    """One check a call, with the head, who calls and what for; and a yes lets it pass."""
    async with house(tmp_path, context_extensions={"host": "llm.example"}) as running:
        found = await fronts(running, (*running.good, ("x-request-id", "r-1"), ("x-other", "secret")))
        assert found | {"unary": None} == {
            "generate": CODE.OK,
            "unary": None,  # this engine streams, and says so to a unary call that was let in
            "stream": "",
            "openai": 200,
            "models": 200,
            "admin": CODE.OK,
        }
        assert found["unary"] not in (CODE.UNAUTHENTICATED, CODE.PERMISSION_DENIED, CODE.UNAVAILABLE)
        asked = {each.path: each for each in running.checks.asked}
        assert len(asked) == len(running.checks.asked) == len(found)
        kserve, actions = "/inference.GRPCInferenceService", {}
        for path, each in asked.items():
            is_http = path.startswith("/v1/")
            assert each.headers == {"authorization": running.good[0][1], "x-request-id": "r-1"} | each.headers
            assert not each.headers.keys() - {"authorization", "x-request-id"}
            assert each.host == "127.0.0.1"
            assert each.port > 0
            assert each.id == "r-1"
            assert each.protocol == ("HTTP/1.1" if is_http else "HTTP/2")
            assert each.authority == (running.served.sidecar.http_address if is_http else "")
            assert each.extensions["tenant"] == "acme"
            assert each.extensions["subject"] == "somebody of acme"
            assert each.extensions["proof"] == "token"
            assert each.extensions["host"] == "llm.example"
            actions[path] = each.method, each.extensions["action"], each.extensions.get("verb")
        assert actions == {
            "/lorasidecar.v1.Gateway/Generate": ("POST", "infer", None),
            f"{kserve}/ModelInfer": ("POST", "infer", None),
            f"{kserve}/ModelStreamInfer": ("POST", "infer", None),
            "/v1/completions": ("POST", "infer", None),
            "/v1/models?versions=1": ("GET", "list", None),
            "/lorasidecar.v1.Adapters/List": ("POST", "list", "Adapters.List"),
        }
        assert len(running.checks.connections) == 1
        assert await running.metrics() == {"ok": 6, "denied": 0, "failed": 0, "timed": 6}


async def test_a_denial_is_refused_at_every_front(tmp_path: Path) -> None:
    """403 and 401, and the audit says who said so about whom."""
    async with house(tmp_path) as running:
        running.checks.answer = lambda asked: denied(403, "not on weekends")
        assert await fronts(running, running.good) == {
            "generate": CODE.PERMISSION_DENIED,
            "unary": CODE.PERMISSION_DENIED,
            "stream": "PERMISSION_DENIED",
            "openai": 403,
            "models": 403,
            "admin": CODE.PERMISSION_DENIED,
        }
        running.checks.answer = lambda asked: denied(401, "who are you")
        assert await fronts(running, running.good) == {
            "generate": CODE.UNAUTHENTICATED,
            "unary": CODE.UNAUTHENTICATED,
            "stream": "UNAUTHENTICATED",
            "openai": 401,
            "models": 401,
            "admin": CODE.UNAUTHENTICATED,
        }
        assert not running.received
        assert await running.metrics() == {"ok": 0, "denied": 12, "failed": 0, "timed": 12}
        await until(lambda: len(running.denials) >= 4)  # one for each action and cause, however often
        lines = [line for line in running.denials if "weekends" in line["why"]]
        assert {line["action"] for line in lines} == {"infer", "list"}
        for line in lines:
            assert line["why"] == "the external check answers 403: not on weekends"
            assert (line["result"], line["who"]["tenant"], line["proof"]) == ("denied", "acme", "token")
        assert running.served.sidecar.access.access.denials["not_permitted", "false"] == 12


async def test_without_a_credential_of_ours_nobody_is_asked(tmp_path: Path) -> None:
    async with house(tmp_path) as running:
        found = await fronts(running, ())
        assert set(found.values()) == {CODE.UNAUTHENTICATED, "UNAUTHENTICATED", 401}
        twice = [(HEADER, running.bearer), (HEADER, running.bearer)]
        assert (await running.complete(twice)).status_code == 401
        assert not running.checks.asked


async def test_http_clients_get_the_status_and_the_headers_that_the_server_chose(tmp_path: Path) -> None:
    """WWW-Authenticate and Retry-After go on, other headers stay; a body is told as one line, and in part."""
    async with house(tmp_path) as running:

        async def ask(answer: bytes) -> Any:
            running.checks.answer = lambda asked: answer
            return await running.complete(list(running.good))

        challenge = {"WWW-Authenticate": 'Bearer realm="llm"', "x-internal": "secret", "content-length": "3"}
        answer = await ask(denied(401, '{"why":\n "expired"}', challenge))
        assert answer.status_code == 401
        assert answer.headers.get_list("www-authenticate") == ['Bearer realm="llm"']
        assert "x-internal" not in answer.headers
        error = answer.json()["error"]
        assert (error["message"], error["reason"]) == ('{"why": "expired"}', "unauthenticated")
        assert error["type"] == "authentication_error"
        assert answer.headers["x-should-retry"] == "false"

        answer = await ask(denied(429, "slowly", {"retry-after": "7"}))
        assert (answer.status_code, answer.json()["error"]["reason"]) == (429, "not_allowed")
        assert (answer.headers["retry-after"], answer.headers["x-should-retry"]) == ("7", "true")
        refusal = await running.refusal(running.good)
        assert (refusal.code(), refusal.details()) == (CODE.PERMISSION_DENIED, "slowly")
        assert _retry_s(refusal) == 7

        answer = await ask(denied(403, HUGE))
        assert answer.json()["error"]["message"] == "x" * 500 + "…"
        answer = await ask(denied(403, "\x1b[31mred\x00"))
        assert answer.json()["error"]["message"] == "?[31mred?"
        answer = await ask(denied(403, "", {"www-authenticate": "a\r\nset-cookie: b", "retry-after": "soon"}))
        assert "www-authenticate" not in answer.headers
        assert "retry-after" not in answer.headers
        assert "the external check refuses the call" in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] is None
        for status in (None, 200, 302, 99, 1000):
            assert (await ask(denied(status, "no"))).status_code == 403
        status_alone = wire.field(1, wire.number_field(1, PERMISSION_DENIED))
        assert (await ask(status_alone)).status_code == 403
        assert (await ask(ok() + status_alone)).status_code == 403
        assert (await ask(wire.field(1, b"") + wire.field(DENIED, b""))).status_code == 403
        refusals = [await ask(ok()), await ask(wire.field(1, b""))]
        assert [each.status_code for each in refusals] == [200, 200]


def _retry_s(error: grpc.aio.AioRpcError) -> float:
    raw = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
    status, retry = status_pb2.Status.FromString(raw), error_details_pb2.RetryInfo()  # type: ignore[arg-type]
    return next(retry.retry_delay.seconds for each in status.details if each.Unpack(retry))


UNCLEAR = {
    "nothing": b"",
    "garbage": b"\xff\xfe\xfd",
    "no text": wire.field(1, b"") + wire.field(2, wire.field(3, b"\xff\xff")),
    "a text": b"no",
    "another message": wire.field(9, b"yes"),
    "an error of its own": wire.field(1, b"") + wire.field(ERROR, b""),
    "more than a message may have": denied(403, "x" * 300_000),
}


async def test_what_is_no_clear_answer_refuses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "sidecar.access.external")
    async with house(tmp_path) as running:
        for answer in UNCLEAR.values():
            running.checks.answer = lambda asked, answer=answer: answer  # type: ignore[misc]
            refused = await running.complete(list(running.good))
            assert refused.status_code == 503
            assert refused.json()["error"]["reason"] == "state_unavailable"
            assert "send it again" in refused.json()["error"]["message"]
            assert running.checks.address not in refused.text
            assert refused.headers["x-should-retry"] == "true"

        def broken(asked: Asked) -> bytes:
            raise ValueError("a secret of the server")

        running.checks.answer = broken
        refusal = await running.refusal(running.good)
        assert refusal.code() is CODE.UNAVAILABLE
        assert "the external check failed (UNKNOWN)" in (refusal.details() or "")
        assert "secret" not in (refusal.details() or "")
        assert not running.received
        assert (await running.metrics())["failed"] == len(UNCLEAR) + 1
        running.checks.answer = lambda asked: ok()
        assert await running.generate(running.good) is CODE.OK
    warnings = [record.getMessage() for record in caplog.records if "the external check at" in record.getMessage()]
    assert "gave an empty answer" in warnings[0]
    assert len(warnings) == 2  # once for all in a while, and that it answers again


async def test_a_server_that_hangs_refuses_after_the_time_limit(tmp_path: Path) -> None:
    """At each front, though it never answers, and a client hears of the limit."""
    async with house(tmp_path, timeout_s=0.5) as running:
        running.checks.answer = silence
        async with asyncio.timeout(60):
            assert await fronts(running, running.good) == {
                "generate": CODE.UNAVAILABLE,
                "unary": CODE.UNAVAILABLE,
                "stream": "UNAVAILABLE",
                "openai": 503,
                "models": 503,
                "admin": CODE.UNAVAILABLE,
            }
            refusal = await running.refusal(running.good)
        assert "did not answer within 0.5 s" in (refusal.details() or "")
        assert "identity.external" in (refusal.details() or "")
        assert _retry_s(refusal) == 1
        assert not running.received
        assert await running.metrics() == {"ok": 0, "denied": 0, "failed": 7, "timed": 7}
        await until(lambda: any("did not answer" in line["why"] for line in running.denials))


async def test_a_server_that_is_away_refuses_and_one_that_comes_back_is_asked(tmp_path: Path) -> None:
    async with house(tmp_path) as running:
        assert await running.generate(running.good) is CODE.OK
        await running.checks.stop()
        refusal = await running.refusal(running.good)
        assert (refusal.code(), "UNAVAILABLE" in (refusal.details() or "")) == (CODE.UNAVAILABLE, True)
        await running.checks.start()

        async def answers() -> bool:
            return await running.generate(running.good) is CODE.OK

        async with asyncio.timeout(60):
            while not await answers():
                await asyncio.sleep(0.05)


async def test_checks_run_at_once_and_too_many_are_refused_at_the_door(tmp_path: Path) -> None:
    async with house(tmp_path, in_flight_max=2) as running:
        free = asyncio.Event()

        async def later(asked: Asked) -> bytes:
            await free.wait()
            return ok()

        running.checks.answer = later
        waiting = [asyncio.create_task(running.generate(running.good)) for _ in range(2)]
        await until(lambda: len(running.checks.asked) == 2)  # both are asked before one is answered
        refusal = await running.refusal(running.good)
        assert refusal.code() is CODE.RESOURCE_EXHAUSTED
        assert "identity.external.in_flight_max" in (refusal.details() or "")
        assert len(running.checks.asked) == 2
        free.set()
        assert await asyncio.gather(*waiting) == [CODE.OK, CODE.OK]
        assert await running.generate(running.good) is CODE.OK
        assert await running.metrics() == {"ok": 3, "denied": 0, "failed": 1, "timed": 3}


async def test_a_client_that_leaves_frees_its_check(tmp_path: Path) -> None:
    async with house(tmp_path, in_flight_max=1) as running:
        running.checks.answer = silence
        leaving = asyncio.create_task(running.generate(running.good))
        await until(lambda: len(running.checks.asked) == 1)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        running.checks.answer = lambda asked: ok()
        async with asyncio.timeout(60):
            while await running.generate(running.good) is CODE.RESOURCE_EXHAUSTED:
                await asyncio.sleep(0.01)
        assert (await running.metrics())["ok"] == 1


async def test_observe_only_records(tmp_path: Path) -> None:
    """Clients are answered, though the server denies or hangs, and who would be denied is recorded."""
    async with house(tmp_path, mode="observe") as running:
        good = (*running.good, ("x-lora-tenant", "acme"))
        running.checks.answer = lambda asked: denied(403, "never")
        assert await running.generate(running.good) is CODE.OK
        assert (await running.complete(list(good))).status_code == 200
        assert await running.list_adapters(running.good) is CODE.OK
        await until(lambda: len(running.denials) == 2)
        for line in running.denials:
            assert (line["result"], line["who"]["tenant"]) == ("observed", "acme")
            assert line["why"] == "the external check answers 403: never"
        assert running.served.sidecar.access.access.denials["not_permitted", "true"] == 3
        running.checks.answer = silence
        assert (await running.complete(list(good))).status_code == 200  # it has FOREVER_S
        await until(lambda: len(running.checks.asked) == 4)
        assert await running.metrics() == {"ok": 0, "denied": 3, "failed": 0, "timed": 3}


PROVES = {"keys": False, "issuers": []}


async def test_the_server_proves_whose_a_call_is(tmp_path: Path) -> None:
    """By a header of its answer, or its dynamic metadata; one that names no tenant lets nobody in."""
    async with house(tmp_path, identity=PROVES, proves=True) as running:
        theirs = ((HEADER, "Basic abc"),)
        for answer in (
            ok(x_lora_tenant="acme"),
            ok({"x-lora-tenant": "acme"}),
            ok({"x-lora-tenant": "a"}, x_other="b"),
        ):
            running.checks.answer = lambda asked, answer=answer: answer  # type: ignore[misc]
            assert await running.generate(theirs) is CODE.OK
        assert [event.tenant for event in running.received] == ["acme", "acme", "a"]
        assert {each.headers["authorization"] for each in running.checks.asked} == {"Basic abc"}
        assert all("tenant" not in each.extensions for each in running.checks.asked)
        assert await running.generate(()) is CODE.OK  # the server may let in whom it likes
        running.checks.answer = lambda asked: ok(x_lora_tenant="acme")
        assert await running.list_adapters(theirs) is CODE.OK  # acme is an operator
        other = await running.complete([*theirs, ("x-lora-tenant", "blue")])
        assert other.status_code == 403
        for answer in (
            ok(),
            ok(x_lora_tenant=""),
            ok({"x-lora-tenant": "a"}, x_lora_tenant="b"),
            ok(x_lora_tenant=" a"),
            ok(x_lora_tenant="x" * 600),
        ):
            running.checks.answer = lambda asked, answer=answer: answer  # type: ignore[misc]
            assert await running.generate(theirs) is CODE.UNAVAILABLE
        running.checks.answer = lambda asked: ok(x_lora_tenant="load-calls")  # the sidecar's own
        assert await running.generate(theirs) is CODE.UNAUTHENTICATED
        asked = len(running.checks.asked)
        assert (await running.complete([*theirs, (HEADER, "Basic def")])).status_code == 401  # it may read the other
        assert len(running.checks.asked) == asked
        running.checks.answer = lambda asked: denied(401, "no", {"www-authenticate": "Negotiate"})
        answer = await running.complete(list(theirs))
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Negotiate")


async def test_observe_with_proves_judges_by_the_servers_tenant(tmp_path: Path) -> None:
    async with house(tmp_path, mode="observe", identity=PROVES, proves=True) as running:
        running.checks.answer = lambda asked: ok(x_lora_tenant="acme")
        headers = [("x-lora-tenant", "blue")]
        assert (await running.complete(headers)).status_code == 200
        running.checks.answer = lambda asked: denied(403, "never")
        assert (await running.complete(headers)).status_code == 200
        await until(lambda: len(running.denials) == 2)
        texts = [line["why"] for line in running.denials]
        assert texts == [
            'the request says tenant "blue", its credential "acme"',
            "the external check answers 403: never",
        ]


async def test_a_forwarded_certificate_is_sent_only_where_a_mesh_writes_it(tmp_path: Path) -> None:
    """A server that believes the header, as behind Envoy it may, must not get a stranger's."""
    forged = f"By=spiffe://a/ns/x/sa/y;Hash={'0' * 64};URI=spiffe://cluster.local/ns/acme/sa/web"
    async with house(tmp_path) as running:
        await running.complete([*running.good, ("x-forwarded-client-cert", forged)])
        assert not [each for each in running.checks.asked if "x-forwarded-client-cert" in each.headers]
        assert running.checks.asked[0].principal == ""
    certificates = {
        "tenant_pattern": "spiffe://cluster.local/ns/{tenant}/sa/*",
        "forwarded": {"strict_mutual_tls": True},
    }
    (tmp_path / "mesh").mkdir()
    async with house(tmp_path / "mesh", identity={"certificates": certificates}) as running:
        assert (await running.complete([("x-forwarded-client-cert", forged)])).status_code == 200
        (asked,) = running.checks.asked
        assert asked.headers["x-forwarded-client-cert"] == forged
        assert asked.principal == "spiffe://cluster.local/ns/acme/sa/web"
        assert asked.extensions["proof"] == "forwarded certificate"


async def test_bytes_of_clients_that_are_no_text_reach_the_server_as_text(tmp_path: Path) -> None:
    async with house(tmp_path, headers=["authorization", "x-note"]) as running:
        headers = [*running.good, ("x-note", b"\xff\xfe"), ("x-note", "two")]
        assert (await running.complete(headers)).status_code == 200  # type: ignore[arg-type]
        assert running.checks.asked[0].headers["x-note"] == "ÿþ,two"


@NEEDS_OPENSSL
async def test_the_server_is_asked_by_mutual_tls(tmp_path: Path) -> None:
    """With the authority's certificate it is asked; a server of another authority gets no credential."""
    authority, strangers = Authority(tmp_path / "ours"), Authority(tmp_path / "others")
    for each in (authority, strangers):
        each.folder.mkdir()
        await each.found()
    server_key, server = await authority.sign("server", "IP:127.0.0.1")
    client_key, client = await authority.sign("client")
    for trusted, status in ((authority, 200), (strangers, 503)):
        checks = AuthorizationServer()
        pair = server_key.read_bytes(), server.read_bytes()
        await checks.start(grpc.ssl_server_credentials([pair], authority.ca.read_bytes(), True))
        folder = tmp_path / str(status)
        folder.mkdir()
        tls = {"ca": str(trusted.ca), "certificate": str(client), "key": str(client_key)}
        try:
            async with house(folder, checks, tls=tls) as running:
                assert (await running.complete(list(running.good))).status_code == status
                assert len(checks.asked) == (1 if status == 200 else 0)
        finally:
            await checks.stop()


async def test_groups_go_along_as_json(tmp_path: Path) -> None:
    """One may have a comma in it."""
    async with house(tmp_path) as running:
        bearer = running.maker.bearer("acme", groups=["a,b", "c"])
        assert await running.generate(((HEADER, bearer),)) is CODE.OK
        assert json.loads(running.checks.asked[0].extensions["groups"]) == ["a,b", "c"]
