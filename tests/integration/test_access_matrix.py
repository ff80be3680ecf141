"""Each way to prove who calls, at each front, for each action: allowed and denied as the documentation says.

The expected answers are written here from `docs/access.md`: under `tenant_prefix` a tenant uses what is under its own
prefix and what an allow list shares with it, a publisher also changes what is under it, an operator does everything.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
import yaml
from tritonclient.grpc import service_pb2, service_pb2_grpc

from sidecar.access.access import NOT_PERMITTED, UNAUTHENTICATED
from sidecar.fronts.admin import pool
from sidecar.proto import admin_pb2 as pb
from sidecar.proto import admin_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from sidecar.shell.catalogue import Wanted
from sidecar.shell.loading import PATH
from tests.kit.authority import NEEDS_OPENSSL, Authority
from tests.kit.emulated import running_engine
from tests.kit.faults import ENDLESS
from tests.kit.kserve_clients import DUMMY
from tests.kit.peft_files import write_adapter
from tests.kit.redis_servers import running
from tests.kit.replica_pool import replicas
from tests.kit.serving import Serving, serving, until
from tests.kit.tokens import TokenMaker

Metadata = tuple[tuple[str, str], ...]
ROLES = ("tenant", "publisher", "operator")
KINDS = ("key", "key of the file", "token", "service account", "forwarded certificate")
OK, DENIED, HIDDEN = "OK", "PERMISSION_DENIED", "NOT_FOUND"


def expected(role: str) -> dict[str, str]:
    """Return what each action of a caller of tenant acme must come to."""
    publishes = OK if role != "tenant" else DENIED
    operates = OK if role == "operator" else DENIED
    return {
        "infer own": OK,
        "infer other's": OK if role == "operator" else HIDDEN,
        "infer shared": OK,
        "infer own version": OK,
        "infer base": OK,
        "show own": OK,
        "show other's": OK if role == "operator" else HIDDEN,
        "show nothing": HIDDEN,
        "register own": publishes,
        "register other's": operates,
        "register another's folder": operates,
        "promote own": publishes,
        "promote other's": OK if role == "operator" else HIDDEN,
        "evict own": publishes,
        "pause own": publishes,
        "drain": operates,
        "cancel own": publishes,
        "cancel other's": operates,
        "see own queue": OK,
        "see other's queue": operates,
        "see backends": operates,
        "see replicas": operates,
        "manage": operates,
        "who am I": OK,
    }


@dataclass
class Caller:
    """One caller's clients of a sidecar."""

    metadata: Metadata
    served: Serving
    http: httpx.AsyncClient
    folder: Path

    async def infer(self, front: str, adapter: str) -> str:
        return await {"generate": self._generate, "unary": self._unary, "stream": self._stream, "openai": self._openai}[
            front
        ](adapter)

    async def _generate(self, adapter: str) -> str:
        tokens = gateway_pb2.TokenIds(ids=[1, 2])
        request = gateway_pb2.GenerateRequest(adapter=adapter, tokens=tokens, max_tokens=2)
        try:
            async for _ in self.served.gateway.Generate(request, metadata=self.metadata):
                pass
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return OK

    async def _unary(self, adapter: str) -> str:
        try:
            await self._kserve().ModelInfer(kserve_request(adapter, streaming=False), metadata=self.metadata)
        except grpc.aio.AioRpcError as error:
            # Streaming engines answer no unary call: that error comes after the policy has let it through.
            return OK if "decoupled" in (error.details() or "") else error.code().name
        return OK

    async def _stream(self, adapter: str) -> str:
        call = self._kserve().ModelStreamInfer(iter([kserve_request(adapter)]), metadata=self.metadata)
        errors = [message.error_message async for message in call if message.error_message]
        return OK if not errors else HIDDEN if "[UNKNOWN_ADAPTER]" in errors[0] else errors[0]

    async def _openai(self, adapter: str) -> str:
        body = {"model": adapter or "base", "prompt": "hi", "max_tokens": 2}
        answer = await self.http.post("/v1/completions", json=body, headers=list(self.metadata))
        return {200: OK, 403: DENIED, 404: HIDDEN}.get(answer.status_code, answer.text)

    def _kserve(self) -> Any:
        return service_pb2_grpc.GRPCInferenceServiceStub(self.served.channel)

    async def models(self) -> set[str]:
        answer = await self.http.get("/v1/models", headers=list(self.metadata))
        return {entry["id"] for entry in answer.json()["data"]}

    async def admin(self, service: str, name: str, request: Any) -> str:
        stub = getattr(admin_pb2_grpc, f"{service}Stub")(self.served.admin_channel)
        try:
            await getattr(stub, name)(request, metadata=self.metadata)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return OK

    async def listed(self) -> set[str]:
        stub: Any = admin_pb2_grpc.AdaptersStub(self.served.admin_channel)  # type: ignore[no-untyped-call]
        answer = await stub.List(pb.ListAdaptersRequest(), metadata=self.metadata)
        return {adapter.name for adapter in answer.adapters}

    async def actions(self, front: str) -> dict[str, str]:
        """Try every action, and return what each came to. What is changed is changed back."""
        done = {
            "infer own": await self.infer(front, "acme/sql"),
            "infer other's": await self.infer(front, "blue/sql"),
            "infer shared": await self.infer(front, "shared"),
            "infer own version": await self.infer(front, "acme/sql@v1"),
            "infer base": await self.infer(front, ""),
        }
        for name, (service, rpc, request) in self._calls().items():
            done[name] = await self.admin(service, rpc, request)
        return done

    def _calls(self) -> dict[str, tuple[str, str, Any]]:
        sql, other = "acme/sql", "blue/sql"
        path = str(self.folder / "acme" / "more")
        return {
            "show own": ("Adapters", "Get", pb.AdapterRequest(name=sql)),
            "show other's": ("Adapters", "Get", pb.AdapterRequest(name=other)),
            "show nothing": ("Adapters", "Get", pb.AdapterRequest(name="acme/nothing")),
            "register own": ("Adapters", "Register", pb.RegisterRequest(name="acme/more", path=path)),
            "register other's": ("Adapters", "Register", pb.RegisterRequest(name="blue/more", path=path)),
            "register another's folder": (
                "Adapters",
                "Register",
                pb.RegisterRequest(name="acme/stolen", path=str(self.folder / "more")),
            ),
            "promote own": ("Adapters", "Promote", pb.PromoteRequest(name=sql, version="v1")),
            "promote other's": ("Adapters", "Promote", pb.PromoteRequest(name=other, version="v1")),
            "evict own": ("Adapters", "Evict", pb.AdapterRequest(name=sql)),
            "pause own": ("Adapters", "Resume", pb.AdapterRequest(name=sql)),
            "drain": ("Backends", "Undrain", pb.BackendRequest(backend="b0")),
            "cancel own": ("Queues", "Cancel", pb.CancelRequest(tenant="acme")),
            "cancel other's": ("Queues", "Cancel", pb.CancelRequest(tenant="blue")),
            "see own queue": ("Queues", "Get", pb.QueueRequest()),
            "see other's queue": ("Queues", "List", pb.ListRequestsRequest(tenant="blue")),
            "see backends": ("Backends", "List", pb.ListBackendsRequest()),
            "see replicas": ("Replicas", "List", pb.ListReplicasRequest()),
            "manage": ("Access", "ListKeys", pb.ListKeysRequest()),
            "who am I": ("Access", "WhoAmI", pb.WhoAmIRequest()),
        }


def kserve_request(adapter: str, streaming: bool = True, tokens: int = 2) -> Any:
    request = service_pb2.ModelInferRequest(model_name="tensorrt_llm", id="7")
    if adapter:
        request.parameters["lora_name"].string_param = adapter
    for name, values in (("input_ids", [1, 2]), ("input_lengths", [2]), ("request_output_len", [tokens])):
        tensor = request.inputs.add(name=name, datatype="INT32", shape=[1, len(values)])
        tensor.contents.int_contents.extend(values)
    tensor = request.inputs.add(name="streaming", datatype="BOOL", shape=[1, 1])
    tensor.contents.bool_contents.append(streaming)
    return request


def access_of(folder: Path, maker: TokenMaker, **identity: Any) -> dict[str, Any]:
    """Return a configuration that takes every kind of credential, and gives acme's groups their roles."""
    keys = [
        {"tenant": "acme", "key": f"lsk_{number:012d}_{role.encode().hex():0<64}", "roles": [role], "groups": [role]}
        for number, role in enumerate(ROLES[1:], 1)
    ]
    keys.append({"tenant": "acme", "key": f"lsk_{0:012d}_{'a' * 64}"})
    keys.append({"tenant": "blue", "key": f"lsk_{9:012d}_{'b' * 64}"})
    (folder / "keys.yaml").write_text(yaml.safe_dump(keys))
    accounts = maker.entry | {
        "issuer": "https://kubernetes.default.svc",
        "tenant": "sub",
        "tenant_pattern": "system:serviceaccount:{tenant}:*",
    }
    return {
        "identity": {
            "mode": "enforce",
            "keys_file": str(folder / "keys.yaml"),
            "issuers": [maker.entry, accounts],
            "certificates": {
                "tenant_pattern": "spiffe://cluster.local/ns/{tenant}/sa/*",
                "forwarded": {"strict_mutual_tls": True},
            },
            "local_admin": False,
        }
        | identity,
        "access": {
            "policies": {
                "ready": "tenant_prefix",
                "roles": {"group:publisher": ["publisher"], "group:operator": ["operator"]},
            }
        },
    }


async def credential(kind: str, role: str, served: Serving, maker: TokenMaker) -> Metadata | None:
    """Return the metadata of a caller of tenant acme with a role; None where a kind carries no role."""
    groups = [role] if role != "tenant" else []
    if kind == "key":
        operator = f"Bearer lsk_{2:012d}_{b'operator'.hex():0<64}"
        stub: Any = admin_pb2_grpc.AccessStub(served.admin_channel)  # type: ignore[no-untyped-call]
        request = pb.CreateKeyRequest(tenant="acme", roles=groups)
        made = await stub.CreateKey(request, metadata=(("authorization", operator),))
        return (("authorization", f"Bearer {made.secret}"),)
    if kind == "key of the file":
        secret = f"lsk_{ROLES.index(role):012d}_" + (f"{role.encode().hex():0<64}" if groups else "a" * 64)
        return (("authorization", f"Bearer {secret}"),)
    if kind == "token":
        return (("authorization", maker.bearer("acme", groups=groups)),)
    if kind == "service account":
        claims = {"iss": "https://kubernetes.default.svc", "sub": "system:serviceaccount:acme:web", "groups": groups}
        return (("authorization", maker.bearer("ignored", **claims)),)
    if role != "tenant":
        return None  # a certificate has no groups; its tenant could be given a role
    uri = "spiffe://cluster.local/ns/acme/sa/web"
    return (("x-forwarded-client-cert", f"By=spiffe://cluster.local/ns/x/sa/y;Hash={'0' * 64};URI={uri}"),)


def write_names(folder: Path) -> None:
    for number, name in enumerate(("sql", "theirs", "shared", "more")):
        write_adapter(folder / name, seed=number)
    write_adapter(folder / "acme" / "more", seed=9)


async def register_all(served: Serving, folder: Path) -> None:
    catalogue = served.sidecar.gateway.catalogue
    await catalogue.register("acme/sql", str(folder / "sql"), Wanted())
    await catalogue.register("blue/sql", str(folder / "theirs"), Wanted())
    await catalogue.register("shared", str(folder / "shared"), Wanted(allow=("acme", "green")))


@asynccontextmanager
async def caller_of(served: Serving, metadata: Metadata, folder: Path) -> AsyncIterator[Caller]:
    address = f"http://{served.sidecar.http_address}"
    async with httpx.AsyncClient(base_url=address, trust_env=False, timeout=60) as http:
        yield Caller(metadata, served, http, folder)


@pytest.mark.parametrize("kind", KINDS)
async def test_every_kind_at_every_front_for_every_action(tmp_path: Path, kind: str) -> None:
    maker = TokenMaker(tmp_path)
    write_names(tmp_path)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], roots=[tmp_path], backend={"id": "b0"}, **access_of(tmp_path, maker)) as served,
    ):
        await register_all(served, tmp_path)
        for role in ROLES:
            metadata = await credential(kind, role, served, maker)
            if metadata is None:
                continue
            async with caller_of(served, metadata, tmp_path) as caller:
                for front in ("generate", "unary", "stream", "openai"):
                    assert await caller.actions(front) == expected(role), (kind, role, front)
                known = {"acme/sql", "shared"} | ({"acme/more", "acme/stolen"} & set(served.state.names))
                everything = set(served.state.names)
                assert await caller.listed() == (everything if role == "operator" else known)
                assert await caller.models() >= known
                assert ("blue/sql" in await caller.models()) is (role == "operator")


async def test_observe_counts_what_enforce_would_refuse(tmp_path: Path) -> None:
    """Once at every front, and nobody who would be let in: a client with a key need not name its tenant."""
    maker = TokenMaker(tmp_path)
    write_names(tmp_path)
    configured = access_of(tmp_path, maker, mode="observe")
    async with running_engine(**DUMMY) as engine, serving([engine], roots=[tmp_path], **configured) as served:
        await register_all(served, tmp_path)
        denials = served.sidecar.gateway.access.denials
        for front in ("generate", "unary", "stream", "openai"):
            denials.update(dict.fromkeys(denials, 0))
            async with caller_of(served, (("authorization", maker.bearer("acme")),), tmp_path) as acme:
                assert await acme.infer(front, "acme/sql") == OK
                assert set(denials.values()) == {0}, front
                assert await acme.infer(front, "blue/sql") == OK
                assert denials[NOT_PERMITTED, "true"] == 1, front
            async with caller_of(served, (), tmp_path) as nobody:
                assert await nobody.infer(front, "acme/sql") == OK
            assert (denials[UNAUTHENTICATED, "true"], sum(denials.values())) == (1, 2), front


async def test_observe_counts_each_call_to_the_admin_listener_once(tmp_path: Path) -> None:
    """Whatever it asks for, and those only that enforce would refuse; all of them are answered."""
    maker = TokenMaker(tmp_path)
    write_names(tmp_path)
    configured = access_of(tmp_path, maker, mode="observe")
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], roots=[tmp_path], backend={"id": "b0"}, **configured) as served,
    ):
        await register_all(served, tmp_path)
        denials = served.sidecar.gateway.access.denials
        for role in (*ROLES, "nobody"):
            groups = [role] if role != "tenant" else []
            metadata = () if role == "nobody" else (("authorization", maker.bearer("acme", groups=groups)),)
            async with caller_of(served, metadata, tmp_path) as caller:
                for name, (service, rpc, request) in caller._calls().items():
                    denials.update(dict.fromkeys(denials, 0))
                    assert await caller.admin(service, rpc, request) == (HIDDEN if name == "show nothing" else OK), name
                    cause = UNAUTHENTICATED if role == "nobody" else NOT_PERMITTED
                    is_denied = role == "nobody" or (expected(role)[name] != OK and name != "show nothing")
                    assert (denials[cause, "true"], sum(denials.values())) == (is_denied, is_denied), (role, name)


async def test_observe_counts_each_call_of_the_openai_api_once(tmp_path: Path) -> None:
    """Models that would not be shown, load calls, and a list of prompts, which is one call."""
    maker = TokenMaker(tmp_path)
    write_names(tmp_path)
    configured = access_of(tmp_path, maker, mode="observe") | {"openai": {"load_calls": True}}
    acme, operator = ({"authorization": maker.bearer("acme", groups=[group])} for group in ("none", "operator"))
    load = {"lora_name": "blue/new", "lora_path": str(tmp_path / "more")}
    prompts = {"model": "blue/sql", "prompt": ["a", "b", "c"], "max_tokens": 2}
    claims = acme | {"x-lora-tenant": "blue"}
    calls: tuple[tuple[str, str, dict[str, Any] | None, dict[str, str], int], ...] = (
        ("GET", "/v1/models", None, {}, 1),
        ("GET", "/v1/models", None, acme, 0),
        ("GET", "/v1/models/blue/sql", None, {}, 1),
        ("GET", "/v1/models/blue/sql", None, acme, 1),
        ("GET", "/v1/models/acme/sql", None, acme, 0),
        ("GET", "/v1/models/blue/sql", None, operator, 0),
        ("POST", "/v1/completions", prompts, {}, 1),
        ("POST", "/v1/completions", prompts, acme, 1),
        ("POST", "/v1/completions", prompts, operator, 0),
        ("POST", "/v1/completions", prompts, claims, 1),
        ("POST", "/v1/load_lora_adapter", load, {}, 1),
        ("POST", "/v1/load_lora_adapter", load | {"load_inplace": True}, acme, 1),
        ("POST", "/v1/load_lora_adapter", load | {"load_inplace": True}, operator, 0),
    )
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], roots=[tmp_path], **configured) as served,
        caller_of(served, (), tmp_path) as caller,
    ):
        await register_all(served, tmp_path)
        denials = served.sidecar.gateway.access.denials
        for method, path, body, headers, count in calls:
            denials.update(dict.fromkeys(denials, 0))
            answer = await caller.http.request(method, path, json=body, headers=headers)
            assert answer.status_code == 200, (path, answer.text)
            cause = NOT_PERMITTED if headers else UNAUTHENTICATED
            assert (denials[cause, "true"], sum(denials.values())) == (count, count), (path, headers)


CEDAR_ROLES = Path(__file__).parents[2] / "examples" / "access" / "roles.cedar"


@pytest.mark.parametrize("mode", ["enforce", "observe"])
@pytest.mark.parametrize("policies", [{"ready": "roles"}, {"cedar": str(CEDAR_ROLES)}], ids=["roles", "cedar"])
async def test_a_version_that_is_denied_leaves_a_line(tmp_path: Path, policies: dict[str, Any], mode: str) -> None:
    """One, at every front, with the version; one that does not exist leaves none and is answered alike."""
    maker = TokenMaker(tmp_path)
    write_names(tmp_path)
    configured = access_of(tmp_path, maker, mode=mode) | {
        "access": {"policies": policies | {"roles": {"group:viewer": ["viewer"]}}},
        "data_directory": str(tmp_path / "data"),
    }
    async with running_engine(**DUMMY) as engine, serving([engine], roots=[tmp_path], **configured) as served:
        for folder in ("sql", "theirs"):
            await served.sidecar.gateway.catalogue.register("sql", str(tmp_path / folder), Wanted())
        record = served.sidecar.registry.get("sql")
        assert record is not None
        old = f"sql@{record.of(1).adapter.digest[:12]}"
        denials, audit = served.sidecar.gateway.access.denials, served.sidecar.access.audit
        told = OK if mode == "observe" else HIDDEN
        for front in ("generate", "unary", "stream", "openai"):
            async with caller_of(served, (("authorization", maker.bearer("acme")),), tmp_path) as caller:
                for reference, answer, count in (("sql@v1", told, 1), (old, told, 1), ("sql@v9", HIDDEN, 0)):
                    denials.update(dict.fromkeys(denials, 0))
                    assert await caller.infer(front, reference) == answer, (front, reference)
                    assert sum(denials.values()) == count, (front, reference)
                denials.update(dict.fromkeys(denials, 0))
                assert [await caller.infer(front, name) for name in ("sql", "sql@v2")] == [OK, OK]
            async with caller_of(
                served, (("authorization", maker.bearer("b", groups=["viewer"])),), tmp_path
            ) as caller:
                assert await caller.infer(front, "sql@v1") == OK
            assert sum(denials.values()) == 0, front
        assert audit.log.flush()
        line = json.loads(next(audit.read(0)))
        assert line["resource"] == {"sort": "version", "name": "sql", "version": 1}
        assert (line["action"], line["result"]) == ("infer_version", "observed" if mode == "observe" else "denied")
        assert line["who"]["tenant"] == "acme"
        assert line["why"]


async def test_what_is_denied_counts_in_usage_at_every_front(tmp_path: Path) -> None:
    """For the tenant, and without the name: it may not exist."""
    maker = TokenMaker(tmp_path)
    write_names(tmp_path)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], roots=[tmp_path], **access_of(tmp_path, maker)) as served,
        caller_of(served, (("authorization", maker.bearer("acme")),), tmp_path) as acme,
    ):
        await register_all(served, tmp_path)
        fronts = ("generate", "unary", "stream", "openai")
        for front in fronts:
            assert await acme.infer(front, "blue/sql") == HIDDEN
        stub: Any = admin_pb2_grpc.AccessStub(served.admin_channel)  # type: ignore[no-untyped-call]
        asked = pb.UsageRequest(by=["tenant", "adapter"], tenant="acme", until=time.time())
        (row,) = (await stub.GetUsage(asked, metadata=acme.metadata)).rows
        assert (row.adapter, dict(row.requests)) == ("(unknown)", {"refused": len(fronts)})
        _, text = await served.sidecar.metrics.render()
        counted = [line for line in text.decode().splitlines() if 'outcome="refused"' in line and "adapter=" in line]
        labels = 'adapter="_other",outcome="refused"'
        assert counted == [f"lora_sidecar_adapter_requests_total{{{labels}}} {len(fronts)}.0"]


@NEEDS_OPENSSL
async def test_a_certificate_at_every_front(tmp_path: Path) -> None:
    """The listeners ask for certificates; the SPIFFE id in it is the tenant's, whatever the request says."""
    maker, authority = TokenMaker(tmp_path), Authority(tmp_path)
    write_names(tmp_path)
    await authority.found()
    key, certificate = await authority.sign("server", "IP:127.0.0.1,DNS:localhost")
    own_key, own = await authority.sign("web", "URI:spiffe://cluster.local/ns/acme/sa/web")
    tls = {"certificate": str(certificate), "key": str(key), "ca": str(authority.ca)}
    listener = {"address": "127.0.0.1:0", "tls": tls}
    config = access_of(tmp_path, maker, certificates={
        "enabled": True, "tenant_pattern": "spiffe://cluster.local/ns/{tenant}/sa/*"
    })  # fmt: skip
    config["listeners"] = {"data": listener, "admin": listener, "http": listener}
    credentials = grpc.ssl_channel_credentials(authority.ca.read_bytes(), own_key.read_bytes(), own.read_bytes())
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(running_engine(**DUMMY))
        served = await stack.enter_async_context(serving([engine], roots=[tmp_path], backend={"id": "b0"}, **config))
        await register_all(served, tmp_path)
        for name in ("channel", "admin_channel"):
            address = served.sidecar.data_address if name == "channel" else served.sidecar.admin_address
            channel = await stack.enter_async_context(grpc.aio.secure_channel(address, credentials))
            setattr(served, name, channel)
        served.gateway = gateway_pb2_grpc.GatewayStub(served.channel)  # type: ignore[no-untyped-call]
        context = ssl.create_default_context(cafile=str(authority.ca))
        context.load_cert_chain(own, own_key)
        address = f"https://{served.sidecar.http_address}"
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=address, verify=context, trust_env=False, timeout=60)
        )
        caller = Caller((), served, http, tmp_path)
        for front in ("generate", "unary", "stream", "openai"):
            assert await caller.actions(front) == expected("tenant"), front
        smuggled = Caller((("lora-tenant", "blue"), ("x-lora-tenant", "blue")), served, http, tmp_path)
        assert await smuggled.infer("generate", "blue/sql") == DENIED
        assert await smuggled.infer("openai", "blue/sql") == DENIED


@NEEDS_OPENSSL
async def test_between_replicas_the_entry_decides(tmp_path: Path) -> None:
    """A request is judged where it enters and is served by the backend's owner; without mutual TLS nobody gets in."""
    maker, authority = TokenMaker(tmp_path), Authority(tmp_path)
    adapters = tmp_path / "adapters"
    write_adapter(adapters / "a", seed=1)
    await authority.found()
    key, certificate = await authority.sign("replica", "IP:127.0.0.1,DNS:localhost")
    tls = {"certificate": str(certificate), "key": str(key), "ca": str(authority.ca)}
    config = access_of(tmp_path, maker)
    config["access"]["policies"]["ready"] = "open"
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(running(tmp_path / "redis"))
        engine = await stack.enter_async_context(running_engine(**DUMMY))
        shared = {"address": "127.0.0.1:0", "lease_s": 3.0, "tls": tls}
        pool = await stack.enter_async_context(replicas(2, redis.url, [engine], adapters, **config, replicas=shared))
        owner = next(each for each in pool if each.state.backends["b0"].takes_requests)
        (entry,) = (each for each in pool if each is not owner)
        for role in ROLES:
            metadata = await credential("token", role, entry, maker)
            assert metadata is not None
            async with caller_of(entry, metadata, tmp_path) as caller:
                for front in ("generate", "stream", "openai"):
                    assert await caller.infer(front, "a") == OK
                    assert await caller.infer(front, "nothing") == HIDDEN
        async with caller_of(entry, (), tmp_path) as nobody:
            assert await nobody.infer("generate", "a") == "UNAUTHENTICATED"
        assert entry.sidecar.replica.router.forwards >= 9
        bare = grpc.aio.insecure_channel(entry.sidecar.replica.address)
        call = bare.stream_stream("/lorasidecar.v1.Peers/Forward")
        with pytest.raises(grpc.aio.AioRpcError):
            await call(iter([b""])).read()
        await bare.close()
        own_key, own = await authority.sign("web", "URI:spiffe://cluster.local/ns/acme/sa/web")
        for files, code in (((key, certificate), "UNAVAILABLE"), ((own_key, own), "UNAUTHENTICATED")):
            pair = [file.read_bytes() for file in files]
            credentials = grpc.ssl_channel_credentials(authority.ca.read_bytes(), *pair)
            async with grpc.aio.secure_channel(entry.sidecar.replica.address, credentials) as channel:
                asked = pb.AdapterRequest()  # any empty message
                call = channel.unary_unary("/lorasidecar.v1.Peers/Keep", type(asked).SerializeToString)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call(asked)
                assert caught.value.code().name == code


async def test_a_publisher_does_not_take_over_what_is_hidden_from_it(tmp_path: Path) -> None:
    """Neither by a registration with an allow list of its own, under any set, nor by another's folder."""
    maker = TokenMaker(tmp_path)
    write_names(tmp_path)
    config = access_of(tmp_path, maker)
    config["access"]["policies"]["ready"] = "open"
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], roots=[tmp_path], backend={"id": "b0"}, **config) as served,
    ):
        catalogue = served.sidecar.gateway.catalogue
        await catalogue.register("secret", str(tmp_path / "theirs"), Wanted(allow=("blue",)))
        before = served.sidecar.registry.get("secret")
        publisher = await credential("token", "publisher", served, maker)
        assert publisher is not None
        async with caller_of(served, publisher, tmp_path) as caller:
            wanted = pb.RegisterRequest(name="secret", path=str(tmp_path / "more"), allow=["acme"])
            assert await caller.admin("Adapters", "Register", wanted) == DENIED
            assert await caller.admin("Adapters", "Pause", pb.PauseRequest(name="secret")) == HIDDEN
            own = pb.RegisterRequest(name="mine", path=str(tmp_path / "more"))
            assert await caller.admin("Adapters", "Register", own) == OK
        assert served.sidecar.registry.get("secret") == before


ONLY_CURRENT = """
permit (principal in Role::"operator", action, resource);
permit (principal, action in Action::"use", resource is Adapter);
permit (principal, action == Action::"list", resource is Version) when { resource.ordinal == 1 };
"""


@pytest.mark.parametrize("policy", ["tenant_prefix", "cedar"])
async def test_a_shared_name_shows_no_folder_allow_list_or_hidden_version(tmp_path: Path, policy: str) -> None:
    """To those who may not change it, on the admin listener and in /v1/models."""
    maker = TokenMaker(tmp_path)
    write_names(tmp_path)
    config = access_of(tmp_path, maker)
    if policy == "cedar":
        (tmp_path / "policies.cedar").write_text(ONLY_CURRENT)
        config["access"]["policies"] = {"cedar": str(tmp_path / "policies.cedar")}
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], roots=[tmp_path], backend={"id": "b0"}, **config) as served,
    ):
        await register_all(served, tmp_path)
        catalogue = served.sidecar.gateway.catalogue
        labels = ((PATH, "/their/own/path"), ("team", "ml"))
        await catalogue.register("shared", str(tmp_path / "more"), Wanted(allow=("acme", "green"), labels=labels))
        seen = {}
        for role in ("tenant", "operator"):
            metadata = await credential("key of the file", role, served, maker)
            assert metadata is not None
            async with caller_of(served, metadata, tmp_path) as caller:
                stub: Any = admin_pb2_grpc.AdaptersStub(served.admin_channel)  # type: ignore[no-untyped-call]
                shown = await stub.Get(pb.AdapterRequest(name="shared"), metadata=metadata)
                listed = await stub.List(pb.ListAdaptersRequest(), metadata=metadata)
                assert shown in listed.adapters
                for tenant in ("acme", "green", "blue"):  # a filter tells no more than what is shown
                    found = await stub.List(pb.ListAdaptersRequest(tenant=tenant), metadata=metadata)
                    is_told = tenant in shown.allow
                    assert ("shared" in [adapter.name for adapter in found.adapters]) is is_told
                watched = await read_until(
                    stub.Watch(pb.WatchRequest(), metadata=metadata), lambda change: change.name == "shared"
                )
                assert watched.adapter == shown
                one = await caller.http.get("/v1/models/shared", headers=list(metadata))
                entries = (await caller.http.get("/v1/models", headers=list(metadata))).json()["data"]
                assert one.json() in entries
                seen[role] = shown, one.json()["root"]
        shown, root = seen["operator"]
        assert (shown.path, list(shown.allow)) == (str(tmp_path / "more"), ["acme", "green"])
        assert root == "/their/own/path"
        shown, root = seen["tenant"]
        assert (shown.path, list(shown.allow), shown.managed_by) == ("", ["acme"], "")
        assert not any(str(tmp_path) in version.origin or PATH in version.labels for version in shown.versions)
        assert [version.version for version in shown.versions] == (["v1"] if policy == "cedar" else ["v1", "v2"])
        assert shown.version == ("" if policy == "cedar" else "shared@v2")
        assert root == ("shared" if policy == "cedar" else "shared@v2")
        operator, tenant = [await credential("key of the file", role, served, maker) for role in ("operator", "tenant")]
        stub = admin_pb2_grpc.AdaptersStub(served.admin_channel)  # type: ignore[no-untyped-call]
        await stub.Prefetch(pb.PrefetchRequest(name="shared"), metadata=operator)
        store, digest = served.state.store, served.state.names["shared"].digest
        await until(lambda: any(store.entries[key].ready for key in store.keys_of(digest)))
        for state in ("cold", "stored"):  # a hidden version moves no adapter from one list to another
            found = await stub.List(pb.ListAdaptersRequest(state=state), metadata=tenant)
            is_told = (state == "cold") is (policy == "cedar")
            assert ("shared" in [adapter.name for adapter in found.adapters]) is is_told


async def test_what_a_tenant_sees_of_limits_and_usage_is_its_own(tmp_path: Path) -> None:
    maker = TokenMaker(tmp_path)
    write_names(tmp_path)
    config = access_of(tmp_path, maker)
    config["access"]["limits"] = [
        {"tenant": "*", "tokens_per_minute": 100_000},
        {"tenant": "acme", "requests_per_day": 100},
        {"tenant": "*", "adapter": "blue/sql", "requests_per_minute": 9},
        {"adapter": "blue/sql", "requests_per_minute": 99},
        {"requests_per_day": 1000},
    ]
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], roots=[tmp_path], backend={"id": "b0"}, **config) as served,
    ):
        await register_all(served, tmp_path)
        stub: Any = admin_pb2_grpc.AccessStub(served.admin_channel)  # type: ignore[no-untyped-call]
        seen: dict[str, list[tuple[str, str]]] = {}
        for role in ("tenant", "operator"):
            metadata = await credential("token", role, served, maker)
            for asked in ("", "acme"):
                answer = await stub.ListLimits(pb.ListLimitsRequest(tenant=asked), metadata=metadata)
                seen[f"{role} {asked}".strip()] = [(limit.tenant, limit.adapter) for limit in answer.limits]
            if role == "tenant":
                assert not (await stub.GetUsage(pb.UsageRequest(by=["tenant"]), metadata=metadata)).rows
                for request in (pb.ListLimitsRequest(tenant="blue"), pb.UsageRequest(tenant="blue")):
                    call = stub.ListLimits if isinstance(request, pb.ListLimitsRequest) else stub.GetUsage
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await call(request, metadata=metadata)
                    assert caught.value.code().name == DENIED
        assert seen["tenant"] == seen["tenant acme"] == [("*", ""), ("acme", "")]
        assert len(seen["operator"]) == 5


@pytest.mark.parametrize("watched", ["names", "pool"])
async def test_a_watcher_is_sent_away_when_its_key_is_revoked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: str
) -> None:
    """Whatever it watches, and however seldom it wants to be told."""
    monkeypatch.setattr(pool, "INTERVAL_S_MAX", 1e9)
    maker = TokenMaker(tmp_path)
    write_names(tmp_path)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], roots=[tmp_path], backend={"id": "b0"}, **access_of(tmp_path, maker)) as served,
    ):
        access: Any = admin_pb2_grpc.AccessStub(served.admin_channel)  # type: ignore[no-untyped-call]
        adapters: Any = admin_pb2_grpc.AdaptersStub(served.admin_channel)  # type: ignore[no-untyped-call]
        pools: Any = admin_pb2_grpc.PoolStub(served.admin_channel)  # type: ignore[no-untyped-call]
        operator = (("authorization", f"Bearer lsk_{2:012d}_{b'operator'.hex():0<64}"),)
        made = await access.CreateKey(pb.CreateKeyRequest(tenant="acme"), metadata=operator)
        own = (("authorization", f"Bearer {made.secret}"),)
        if watched == "names":
            watch = adapters.Watch(pb.WatchRequest(), metadata=own)
        else:
            watch = pools.Watch(pb.WatchPoolRequest(interval_s=1e9), metadata=own)
            assert (await watch.read()).time
        waiting = asyncio.create_task(watch.read())
        await access.RevokeKey(pb.RevokeKeyRequest(id=made.key.id), metadata=operator)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async with asyncio.timeout(60):
                await waiting
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


# What is revoked while a client keeps its stream open.


class Requests:
    """The client's side of a stream, which it keeps open."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Any] = asyncio.Queue()

    def send(self, request: Any) -> None:
        self._queue.put_nowait(request)

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (request := await self._queue.get()) is not None:
            yield request


@pytest.mark.parametrize("on_revoked", ["finish", "end"])
async def test_a_key_is_revoked_under_an_open_stream(tmp_path: Path, on_revoked: str) -> None:
    maker = TokenMaker(tmp_path)
    write_names(tmp_path)
    config = access_of(tmp_path, maker, on_revoked=on_revoked)
    async with (
        running_engine(**DUMMY | ENDLESS) as engine,
        serving([engine], roots=[tmp_path], backend={"id": "b0"}, **config) as served,
    ):
        await register_all(served, tmp_path)
        stub: Any = admin_pb2_grpc.AccessStub(served.admin_channel)  # type: ignore[no-untyped-call]
        operator = (("authorization", f"Bearer lsk_{2:012d}_{b'operator'.hex():0<64}"),)
        made = await stub.CreateKey(pb.CreateKeyRequest(tenant="acme"), metadata=operator)
        requests, kserve = Requests(), service_pb2_grpc.GRPCInferenceServiceStub(served.channel)
        stream = kserve.ModelStreamInfer(requests, metadata=(("authorization", f"Bearer {made.secret}"),))
        requests.send(kserve_request("acme/sql", tokens=1 << 19))
        first = await stream.read()
        assert not first.error_message
        await stub.RevokeKey(pb.RevokeKeyRequest(id=made.key.id), metadata=operator)
        requests.send(kserve_request("acme/sql"))
        refused = await read_until(stream, lambda message: bool(message.error_message))
        assert "UNAUTHENTICATED" in refused.error_message
        if on_revoked == "finish":
            assert not (await stream.read()).error_message
            assert len(served.state.requests) == 1
        else:
            ended = "[CANCELLED] the credential of the request was revoked"
            if ended not in refused.error_message:  # the one refused may come before
                await read_until(stream, lambda message: ended in message.error_message)
            await until(lambda: not served.state.requests)
        stream.cancel()


async def read_until(stream: Any, wanted: Callable[[Any], bool]) -> Any:
    async with asyncio.timeout(60):
        while True:
            message = await stream.read()
            if wanted(message):
                return message
