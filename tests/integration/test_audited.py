"""Every RPC and every command that changes something leaves exactly one line in the audit, and no secret is in it."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from sidecar.access.audit_log import denials_file, rotated_files
from sidecar.cli.commands import COMMANDS
from sidecar.core.facts import Suspicion
from sidecar.fronts.admin.verbs import VERBS
from sidecar.proto import admin_pb2 as pb
from sidecar.proto import admin_pb2_grpc
from tests.kit.cli_runs import Ended, runner
from tests.kit.emulated import running_engine
from tests.kit.peft_files import write_adapter
from tests.kit.serving import Serving, serving, until
from tests.unit.test_verbs import READS, paths

KSERVE = "inference.GRPCInferenceService"
PROMPT = "the quick brown prompt"


class House:
    """A sidecar that wants credentials, with one engine; processes of this machine are its operators."""

    def __init__(self, served: Serving, data: Path, folder: Path, command: Callable[..., Ended]) -> None:
        self.served = served
        self.folder = folder
        self.file = data / "audit" / "audit.jsonl"
        self.stubs = {
            name: getattr(admin_pb2_grpc, f"{name}Stub")(served.admin_channel)
            for name in ("Adapters", "Backends", "Configuration", "Queues", "Access")
        }
        self.triton: Any = service_pb2_grpc.GRPCInferenceServiceStub(served.admin_channel)
        self._command = command
        self._told = 0

    async def cli(self, *arguments: str) -> Ended:
        return await asyncio.to_thread(self._command, *arguments, "--admin", self.served.sidecar.admin_address)

    def is_told(self) -> bool:
        """Return True if something was recorded since the last time."""
        return len(self._lines()) > self._told

    def told(self) -> list[dict[str, Any]]:
        """Return the changes that were recorded since the last time."""
        lines = self._lines()
        new, self._told = lines[self._told :], len(lines)
        return new

    def _lines(self) -> list[dict[str, Any]]:
        files = (*rotated_files(self.file), self.file)
        return [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]


@pytest.fixture
async def house(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> AsyncIterator[House]:
    data, adapters = tmp_path / "data", tmp_path / "adapters"
    for seed, name in enumerate(("one", "two", "three")):
        write_adapter(adapters / name, seed=seed)
    async with (
        running_engine(compute="none", shape="tiny") as engine,
        serving(
            [engine],
            roots=[adapters],
            file=tmp_path / "config.json",
            data_directory=str(data),
            identity={"mode": "enforce"},
        ) as served,
    ):
        yield House(served, data, adapters, runner(capfd))


# The RPCs.


def changing_rpcs() -> set[str]:
    """Return the paths of our RPCs that change something, from the services' descriptors, and of Triton's."""
    ours = {path for path in paths(pb) if path.rpartition("/")[2] not in READS[_service(path)]}
    triton = {"RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting", "LogSettings"}
    return ours | {f"/{KSERVE}/{name}" for name in triton}


def _service(path: str) -> str:
    return path.split("/")[1].rpartition(".")[2]


def pushed(folder: Path) -> Iterator[Any]:
    """Yield the messages of a push."""
    import hashlib

    files = [(path, path.read_bytes()) for path in sorted(folder.iterdir())]
    listed = [
        pb.PushFile(name=path.name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for path, data in files
    ]
    yield pb.PushRequest(start=pb.PushStart(name="pushed", files=listed))
    for number, (_, data) in enumerate(files):
        yield pb.PushRequest(chunk=pb.PushChunk(file=number, offset=0, data=data))


def quarantined(house: House, name: Any = None) -> Any:
    """Quarantine sql, so that there is something to release, and return `name`."""
    state = house.served.sidecar.gateway.state
    state.versions[state.names["sql"].digest].quarantined = Suspicion(("b0", "b1"), "both died")
    return name


async def test_each_rpc_that_changes_something_leaves_one_line(house: House) -> None:
    """Called one after the other, as an operator does; each line names the RPC, who called it, and the outcome."""
    one, two, three = (str(house.folder / name) for name in ("one", "two", "three"))
    name, trt = pb.AdapterRequest(name="sql"), pb.BackendRequest(backend="trt-0")
    key: dict[str, str] = {}
    settings = service_pb2.LogSettingsRequest()
    settings.settings["log_verbose_level"].uint32_param = 1
    traces = service_pb2.TraceSettingRequest()
    traces.settings["trace_rate"].value.append("1000")
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("Adapters/Register", lambda: pb.RegisterRequest(name="sql", path=one)),
        ("Adapters/Register", lambda: pb.RegisterRequest(name="sql", path=two)),
        ("Adapters/Push", lambda: pushed(Path(three))),
        ("Adapters/Promote", lambda: pb.PromoteRequest(name="sql", version="v1")),
        ("Adapters/Rollback", lambda: pb.RollbackRequest(name="sql")),
        ("Adapters/Refresh", lambda: pb.RefreshRequest(name="sql")),
        ("Adapters/Pin", lambda: name),
        ("Adapters/Unpin", lambda: name),
        ("Adapters/Prefetch", lambda: pb.PrefetchRequest(name="sql", backends=["trt-0"])),
        ("Adapters/Evict", lambda: name),
        ("Adapters/Release", lambda: quarantined(house, name)),
        ("Adapters/Pause", lambda: pb.PauseRequest(name="sql")),
        ("Adapters/Pause", lambda: pb.PauseRequest(name="sql", for_s=60)),
        ("Adapters/Resume", lambda: name),
        ("Adapters/Unregister", lambda: pb.UnregisterRequest(name="pushed")),
        ("Backends/Drain", lambda: trt),
        ("Backends/Undrain", lambda: trt),
        ("Backends/Add", lambda: pb.AddBackendRequest(backend="more", url="triton://127.0.0.1:9")),
        ("Backends/Remove", lambda: pb.BackendRequest(backend="more")),
        ("Configuration/Reload", lambda: pb.ReloadRequest()),
        ("Queues/Cancel", lambda: pb.CancelRequest(request_id="nobody's")),
        ("Access/CreateKey", lambda: pb.CreateKeyRequest(tenant="acme", roles=["viewer"])),
        ("Access/RevokeKey", lambda: pb.RevokeKeyRequest(id=key["id"])),
        ("Access/SetLimit", lambda: pb.Limit(tenant="acme", tokens_per_minute=1000)),
        ("Access/SetLimit", lambda: pb.Limit(tenant="acme", tokens_per_minute=2000)),
        ("Access/RemoveLimit", lambda: pb.RemoveLimitRequest(tenant="acme")),
        ("RepositoryModelLoad", lambda: service_pb2.RepositoryModelLoadRequest(model_name="tensorrt_llm")),
        ("RepositoryModelUnload", lambda: service_pb2.RepositoryModelUnloadRequest(model_name="nobody")),
        ("TraceSetting", lambda: traces),
        ("LogSettings", lambda: settings),
    ]
    called = {f"/{KSERVE}/{each}" if "/" not in each else f"/lorasidecar.v1.{each}" for each, _ in calls}
    assert called == changing_rpcs()
    facts: dict[str, dict[str, Any]] = {}
    for path, message in calls:
        service, _, method = path.rpartition("/")
        if service:
            result, answer = "ok", await getattr(house.stubs[service], method)(message())
        else:
            result = "ok" if await ending(getattr(house.triton, method)(message())) == "ok" else "failed"
            await until(house.is_told)
        lines = house.told()
        assert [line["verb"].rpartition("/")[2] for line in lines] == [
            path.replace("/", ".") if service else lines[0]["verb"]
        ]
        (line,) = lines
        assert line["verb"].endswith(method)
        assert (line["result"], line["kind"], line["proof"]) == (result, "change", "local")
        assert line["request_id"]
        if method == "CreateKey":
            key |= {"id": answer.key.id, "secret": answer.secret}
        facts[path] = {"before": line["before"], "after": line["after"], "resource": line["resource"]}
    assert (facts["Adapters/Promote"]["before"]["version"], facts["Adapters/Promote"]["after"]["version"]) == (
        "v2",
        "v1",
    )
    assert facts["Adapters/Pause"]["before"]["paused_s"] is None  # until it is resumed
    assert facts["Adapters/Pause"]["after"]["paused_s"] > 0
    assert datetime.fromisoformat(facts["Access/CreateKey"]["after"]["created_at"]).tzinfo is UTC
    assert facts["Adapters/Resume"]["before"]["paused_s"] > 0
    assert "paused_s" not in facts["Adapters/Resume"]["after"]
    assert facts["Adapters/Unregister"]["after"] == {}
    assert facts["Backends/Drain"]["after"] == {"state": "drained"}
    assert facts["Backends/Add"]["before"] == {}
    assert facts["Backends/Add"]["after"].items() >= {"backend": "more", "url": "triton://127.0.0.1:9"}.items()
    assert facts["Configuration/Reload"]["after"] == {"changed": []}
    assert facts["Access/SetLimit"]["before"]["tokens_per_minute"] == 1000
    assert facts["Access/SetLimit"]["after"]["tokens_per_minute"] == 2000
    assert facts["Access/RemoveLimit"]["after"] == {}
    assert facts["Access/RevokeKey"]["resource"] == {"sort": "tenant", "name": "acme"}
    assert [facts["Access/RevokeKey"][when]["state"] for when in ("before", "after")] == ["active", "revoked"]
    assert key["secret"] not in house.file.read_text()


async def test_what_only_reads_leaves_none(house: House) -> None:
    for service, methods in READS.items():
        stub = getattr(admin_pb2_grpc, f"{service}Stub")(house.served.admin_channel)
        for method in sorted(methods - {"Watch", "Verify", "ReadAudit"}):
            message = pb.DESCRIPTOR.services_by_name[service].methods_by_name[method].input_type.name
            assert await ending(getattr(stub, method)(getattr(pb, message)())) in ("ok", "failed"), (
                f"{service}.{method}"
            )
    assert house.told() == []


async def ending(call: Any) -> str:
    """Return "ok" or "failed". An RPC that nobody answers is neither."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return "failed" if error.code() is not grpc.StatusCode.UNIMPLEMENTED else "unimplemented"
    return "ok"


async def test_a_change_that_fails_says_why(house: House) -> None:
    """Once, with the reason and nothing changed."""
    for call, message, reason in (
        (house.stubs["Adapters"].Promote, pb.PromoteRequest(name="nobody", version="v1"), "nobody"),
        (house.stubs["Adapters"].Register, pb.RegisterRequest(name="sql", path="/etc"), "/etc"),
        (house.stubs["Access"].RevokeKey, pb.RevokeKeyRequest(id="000000000000"), "000000000000"),
    ):
        assert await ending(call(message)) == "failed"
        await until(house.is_told)  # a refusal goes out first
        (line,) = house.told()
        assert line["result"] == "failed"
        assert reason in line["why"]


async def test_who_is_refused_waits_for_no_line(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call after the other is one open call, however slow the disk is; the lines come."""
    written, sink = threading.Event(), house.served.sidecar.gateway.access._audit.log._sinks["change"]
    monkeypatch.setattr(sink, "append", partial(_after, written, sink.append))
    try:
        for _ in range(200):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await house.stubs["Adapters"].Evict(pb.AdapterRequest(name="nobody"))
            assert refused.value.code() is grpc.StatusCode.NOT_FOUND, refused.value.details()
    finally:
        written.set()
    await until(lambda: len(house._lines()) == 200)


def _after(event: threading.Event, append: Callable[[bytes], None], data: bytes) -> None:
    event.wait()
    append(data)


# The commands.

QUIET = {
    "serve", "demo", "emulate", "calibrate", "generate", "queue", "replay", "simulate", "plan", "audit", "usage",
    "adapters list", "adapters show", "adapters watch", "adapters verify", "adapters inspect", "adapters convert",
    "backends list", "backends show", "backends check", "requests list", "requests show", "replicas list", "keys list",
    "limits list", "config check", "envoy config", "config show", "policies check", "access check", "debug capture",
    "whoami", "top",
}  # fmt: skip
"""Commands that change nothing at a running sidecar."""
ELSEWHERE = {"login", "logout", "state migrate", "state backup", "state restore"}
"""Commands that change the user's own files, or those of a sidecar that does not run."""


async def test_each_command_that_changes_something_leaves_one_line(house: House) -> None:
    """A new command is in this list, or in one of those that say why it need not be."""
    one, two, three = (str(house.folder / name) for name in ("one", "two", "three"))
    calls = (
        ("adapters register", "sql", one),
        ("adapters register", "sql", two),
        ("adapters register", "pushed", three, "--push"),
        ("adapters promote", "sql@v1"),
        ("adapters rollback", "sql"),
        ("adapters refresh", "sql"),
        ("adapters pin", "sql"),
        ("adapters unpin", "sql"),
        ("adapters prefetch", "sql"),
        ("adapters evict", "sql"),
        ("adapters release", "sql"),
        ("adapters pause", "sql", "--for", "1m"),
        ("adapters resume", "sql"),
        ("adapters unregister", "pushed"),
        ("backends drain", "trt-0"),
        ("backends undrain", "trt-0"),
        ("backends add", "more", "--address", "triton://127.0.0.1:9"),
        ("backends remove", "more"),
        ("config reload",),
        ("requests cancel", "nobody's"),
        ("keys create", "--tenant", "acme"),
        ("keys revoke", "KEY"),
        ("limits set", "acme", "--tokens-per-minute", "20k"),
        ("limits remove", "acme"),
    )
    assert {call[0] for call in calls} | QUIET | ELSEWHERE == set(COMMANDS)
    key = ""
    for words, *arguments in calls:
        if words == "adapters release":
            quarantined(house)
        ended = await house.cli(*words.split(), *(key if each == "KEY" else each for each in arguments), "--json")
        assert ended.code == (1 if words == "requests cancel" else 0), f"{words}: {ended.err}"
        lines = house.told()
        assert [line["kind"] for line in lines] == ["change"], words
        if words == "keys create":
            key = ended.json()["id"]
            assert ended.json()["secret"] not in house.file.read_text()


# Denials, and secrets.


async def test_denials_of_every_front_are_recorded_without_a_secret(house: House) -> None:
    """The truth is in the audit: who, what and why; neither the credential nor the prompt is."""
    sidecar = house.served.sidecar
    made = (await house.cli("keys", "create", "--tenant", "acme", "--json")).json()
    await house.cli("adapters", "register", "beta/sql", str(house.folder / "one"), "--allow", "beta")
    house.told()
    for secret in ("lsk_not-a-key-of-ours", made["secret"]):
        call = house.served.gateway.Generate(_generate("beta/sql"), metadata=(("authorization", f"Bearer {secret}"),))
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in call:
                pass
    async with httpx.AsyncClient(base_url=f"http://{sidecar.http_address}") as client:
        for secret in ("lsk_neither", made["secret"]):
            body = {"model": "beta/sql", "messages": [{"role": "user", "content": PROMPT}]}
            answer = await client.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {secret}"})
            assert answer.status_code in (401, 404)
    denied = await asyncio.to_thread(lambda: [json.loads(line) for line in sidecar.access.audit.read(0, kind="denial")])
    assert sidecar.access.audit.log.flush()
    denied = [json.loads(line) for line in sidecar.access.audit.read(0, kind="denial")]
    of_acme = [line for line in denied if line["who"]["tenant"] == "acme"]
    assert of_acme
    assert all(line["who"]["subject"] == made["id"] for line in of_acme)
    assert all(line["resource"]["name"] == "beta/sql" for line in of_acme)
    assert [line for line in denied if not line["who"]["tenant"]]
    assert house.told() == []
    text = "".join(file.read_text() for file in (house.file, denials_file(house.file)))
    for secret in ("lsk_not-a-key-of-ours", "lsk_neither", made["secret"], PROMPT):
        assert secret not in text


async def test_a_key_where_a_name_belongs_is_kept_nowhere(house: House) -> None:
    """Clients take one header for another, and a key for a version; the journal has what a client asked for."""
    made = (await house.cli("keys", "create", "--tenant", "acme", "--json")).json()
    await house.cli("adapters", "register", "sql", str(house.folder / "one"))
    headers = {"authorization": f"Bearer {made['secret']}", "x-request-id": made["secret"]}
    async with httpx.AsyncClient(base_url=f"http://{house.served.sidecar.http_address}") as client:
        for model in ("sql", f"sql@{made['secret']}", made["secret"]):
            answer = await client.post("/v1/completions", json={"model": model, "prompt": PROMPT}, headers=headers)
            assert answer.status_code == (200 if model == "sql" else 404), answer.text
        for header in ("x-lora-class", "x-lora-tenant"):
            body = {"model": "sql", "prompt": PROMPT}
            answer = await client.post("/v1/completions", json=body, headers=headers | {header: made["secret"]})
            assert answer.status_code in (400, 403), answer.text
    data = house.file.parents[1]
    (segment,) = (data / "journal").glob("*.jsonl")
    await until(lambda: f'"sql@lsk_{made["id"]}_(hidden)"' in segment.read_text())
    assert house.served.sidecar.access.audit.log.flush()
    kept = [file for file in data.rglob("*") if file.is_file() and made["secret"].encode() in file.read_bytes()]
    assert kept == []


async def test_a_client_without_a_credential_and_the_line_have_one_id(house: House) -> None:
    """In each protocol and on each listener, with the action that was asked for and the address in one form."""
    sidecar, served = house.served.sidecar, house.served
    data: Any = service_pb2_grpc.GRPCInferenceServiceStub(served.channel)
    whoami = admin_pb2_grpc.AccessStub(served.admin_channel).WhoAmI
    scheme = (("authorization", "Basic abc"),)
    ids = []
    calls = (
        (lambda: served.gateway.Generate(_generate("sql")).read(), "infer", ""),
        (lambda: data.ModelMetadata(service_pb2.ModelMetadataRequest(name="m")), "show", "ModelMetadata"),
        (lambda: whoami(pb.WhoAmIRequest(), metadata=scheme), "show", "Access.WhoAmI"),
    )
    for call, _, _ in calls:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call()
        assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
        ids.append(dict(raised.value.trailing_metadata())["x-request-id"])
    async with httpx.AsyncClient(base_url=f"http://{sidecar.http_address}") as client:
        answers = [
            await client.get("/v1/models"),
            await client.get("/v1/models/sql", headers={"authorization": "Bearer lsk_x", "x-request-id": "mine"}),
            await client.post("/v1/completions", headers={"authorization": "Bearer lsk_x"}),
        ]
    ids += [answer.headers["x-request-id"] for answer in answers]
    assert ids[4] == "mine"
    assert sidecar.access.audit.log.flush()
    lines = [json.loads(line) for line in sidecar.access.audit.read(0, kind="denial")]
    told = [(line["action"], line["verb"]) for line in lines]
    assert told == [(action, verb) for _, action, verb in calls] + [("list", ""), ("list", ""), ("infer", "")]
    assert [line["request_id"] for line in lines] == ids
    for line in lines:
        assert re.fullmatch(r"127\.0\.0\.1:[0-9]+", line["peer"])
        assert re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z", line["time"])


async def test_the_text_that_a_client_gets_has_the_id_of_the_line(house: House) -> None:
    made = (await house.cli("keys", "create", "--tenant", "acme", "--json")).json()
    drain = admin_pb2_grpc.BackendsStub(house.served.admin_channel).Drain
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await drain(pb.BackendRequest(backend="trt-0"), metadata=(("authorization", f"Bearer {made['secret']}"),))
    request_id = dict(raised.value.trailing_metadata())["x-request-id"]
    assert f'ask your operator with id "{request_id}"' in raised.value.details()
    assert house.served.sidecar.access.audit.log.flush()
    [line] = [json.loads(line) for line in house.served.sidecar.access.audit.read(0, kind="denial")]
    assert (line["request_id"], line["verb"]) == (request_id, "Backends.Drain")


def _generate(name: str) -> Any:
    from sidecar.proto import gateway_pb2

    return gateway_pb2.GenerateRequest(adapter=name, text=PROMPT, max_tokens=2)


def test_the_table_is_the_guard_s() -> None:
    """What this file takes for a change is what the table says."""
    assert {path for path in changing_rpcs() if path.startswith("/lora")} == {
        path for path in paths(pb) if VERBS[path].changes(getattr(pb, _message(path))())
    }


def _message(path: str) -> str:
    name: str = pb.DESCRIPTOR.services_by_name[_service(path)].methods_by_name[path.rpartition("/")[2]].input_type.name
    return name
