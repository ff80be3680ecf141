"""The API client and what follows a collection, against a server that goes wrong in every way that the real one may."""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar.discovery.found import Found
from sidecar.errors import Misused
from sidecar.kubernetes.access import Access, find_access, from_kubeconfig
from sidecar.kubernetes.api import Api
from sidecar.kubernetes.endpoint_slices import EndpointSlices
from sidecar.kubernetes.failures import ApiError
from sidecar.kubernetes.mirror import Mirror
from sidecar.kubernetes.pauses import Pauses
from sidecar.kubernetes.services import problem_of, problems
from tests.authority import NEEDS_OPENSSL, Authority
from tests.kubernetes_api import Fault, fake_server, write_kubeconfig
from tests.kubernetes_cluster import Cluster, cluster, needs_faults, on_clusters
from tests.serving import until

MAPS = "configmaps"


@dataclass
class Seen:
    """What a mirror has yielded: each snapshot as the values of its objects by name."""

    snapshots: list[dict[str, str]] = field(default_factory=list)

    @property
    def last(self) -> dict[str, str] | None:
        return self.snapshots[-1] if self.snapshots else None


@asynccontextmanager
async def mirrored(home: Cluster) -> AsyncIterator[Seen]:
    """Follow a cluster's ConfigMaps that the test has made."""
    api, seen = Api(home.access), Seen()

    async def follow() -> None:
        collection = home.collection(MAPS)
        async with aclosing(Mirror(api, collection, Pauses(0.01, 0.05), Pauses(0.01, 0.05)).watch()) as snapshots:
            async for objects in snapshots:
                seen.snapshots.append({name: each["data"]["v"] for name, each in objects.items() if "data" in each})

    task = asyncio.create_task(follow())
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await api.close()


def a_map(name: str, value: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"v": value}}


def own(seen: Seen) -> dict[str, str]:
    """Return what a mirror saw last, without what a real cluster puts into every namespace."""
    return {name: value for name, value in (seen.last or {}).items() if not name.startswith("kube-root")}


@on_clusters
async def test_a_mirror_follows(kind: str) -> None:
    """What is there, what comes, what changes, what goes."""
    async with cluster(kind) as home:
        await home.create(MAPS, a_map("a", "1"))
        async with mirrored(home) as seen:
            await until(lambda: own(seen) == {"a": "1"})
            await home.create(MAPS, a_map("b", "1"))
            await home.patch(MAPS, "a", {"data": {"v": "2"}})
            await until(lambda: own(seen) == {"a": "2", "b": "1"})
            await home.delete(MAPS, "b")
            await until(lambda: own(seen) == {"a": "2"})


@on_clusters
async def test_a_long_list_comes_in_pages(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is yielded before the last page is there."""
    monkeypatch.setattr("sidecar.kubernetes.api.PAGE_MAX", 3)
    async with cluster(kind) as home:
        for number in range(8):
            await home.create(MAPS, a_map(f"m{number}", "1"))
        async with mirrored(home) as seen:
            await until(lambda: bool(seen.snapshots))
            assert len(own(seen)) == 8
            assert len({frozenset(snapshot) for snapshot in seen.snapshots}) == 1


@needs_faults
async def test_pages_that_expire_are_listed_anew(kind: str) -> None:
    """A continue token that is forgotten (410) begins the list over: half a list is never taken for all."""
    async with cluster(kind, page_max=2) as home:
        for number in range(5):
            await home.create(MAPS, a_map(f"m{number}", "1"))
        api = Api(home.access)
        try:
            listed = home.fake._page

            def forgetful(asked: Any) -> Any:
                if asked.query.get("continue") and home.fake.count("list") == 2:
                    home.fake.forget_pages()
                return listed(asked)

            home.fake._page = forgetful  # type: ignore[method-assign]
            listing = await api.list(home.collection(MAPS))
            assert [item["metadata"]["name"] for item in listing.items] == [f"m{n}" for n in range(5)]
            assert home.fake.count("list") == 2 + 3
        finally:
            await api.close()


@needs_faults
@pytest.mark.parametrize("gone_as", ["status", "event"])
async def test_a_history_that_is_forgotten_is_listed_anew(kind: str, gone_as: str) -> None:
    """410, as an answer or as an event of the watch: what has happened meanwhile is seen all the same."""
    async with cluster(kind, gone_as=gone_as) as home:
        await home.create(MAPS, a_map("a", "1"))
        await home.create(MAPS, a_map("b", "1"))
        async with mirrored(home) as seen:
            await until(lambda: home.fake.watching(MAPS))
            await home.fake.stop()
            home.fake.objects.delete(("", "ml", MAPS), "a")
            home.fake.objects.create(("", "ml", MAPS), a_map("c", "1"))
            home.fake.objects.forget()
            await home.fake.start()
            await until(lambda: own(seen) == {"b": "1", "c": "1"})
            assert all("b" in snapshot for snapshot in seen.snapshots)
            assert home.fake.count("list", MAPS) == 2


@needs_faults
async def test_a_server_that_lost_its_history_is_listed_anew(kind: str) -> None:
    """After a restore it counts from an earlier number on: positions that were seen are from a time that never was."""
    async with cluster(kind) as home:
        for value in range(20):
            await home.create(MAPS, a_map(f"m{value}", "1"))
        async with mirrored(home) as seen:
            await until(lambda: len(own(seen)) == 20)
            await home.fake.stop()
            home.fake.objects.lose(15)
            await home.fake.start()
            await home.patch(MAPS, "m3", {"data": {"v": "2"}})
            await until(lambda: own(seen).get("m3") == "2")
            assert len(own(seen)) == 20


@needs_faults
async def test_a_bookmark_moves_a_watch_on(kind: str) -> None:
    """After one, a history that is forgotten up to there costs no new list."""
    async with cluster(kind) as home, mirrored(home) as seen:
        await until(lambda: home.fake.watching(MAPS))
        await home.create(MAPS, a_map("a", "1"))
        await until(lambda: own(seen) == {"a": "1"})
        await home.fake.bookmark()
        home.fake.objects.forget()
        watches = home.fake.count("watch")
        home.fake.cut_in_an_event()
        await until(lambda: home.fake.count("watch") > watches and home.fake.watching(MAPS))
        await home.create(MAPS, a_map("b", "1"))
        await until(lambda: own(seen) == {"a": "1", "b": "1"})
        assert home.fake.count("list", MAPS) == 1


@needs_faults
async def test_an_event_that_is_cut_off_never_happened(kind: str) -> None:
    """The watch goes on from the last whole one; nothing is listed anew, nothing that was not is seen."""
    async with cluster(kind) as home, mirrored(home) as seen:
        for number in range(10):
            await until(lambda: home.fake.watching(MAPS))
            home.fake.cut_in_an_event()
            await home.create(MAPS, a_map(f"m{number}", "1"))
            await until(lambda count=number + 1: len(own(seen)) == count)  # type: ignore[misc]
        assert not any("never-was" in snapshot for snapshot in seen.snapshots)
        assert home.fake.count("list", MAPS) == 1


@needs_faults
async def test_no_failure_takes_anything_away(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """403, 429, 500, half an answer, nobody there: what was seen stays, and each trouble is logged once."""
    async with cluster(kind) as home:
        await home.create(MAPS, a_map("a", "1"))
        async with mirrored(home) as seen:
            await until(lambda: home.fake.watching(MAPS))
            for status in (403, 429, 500, 504):
                home.fake.faults.append(Fault("watch", MAPS, status=status, times=8))
                home.fake.faults.append(Fault("list", MAPS, status=status, times=2))
                home.fake.cut()
                await until(lambda: not home.fake.faults and home.fake.watching(MAPS))
            home.fake.faults += [Fault("watch", MAPS, status=500, times=8), Fault("list", MAPS, cut=True, times=2)]
            home.fake.cut()
            await until(lambda: not home.fake.faults and home.fake.watching(MAPS))
            await home.fake.stop()
            await home.fake.start()
            await home.create(MAPS, a_map("b", "1"))
            await until(lambda: own(seen) == {"a": "1", "b": "1"})
            assert all("a" in snapshot for snapshot in seen.snapshots)
        told = [line.getMessage() for line in caplog.records if "403" in line.getMessage()]
        assert len(told) == 2  # of the watch, and of the list
        assert "Role" in told[0]


@needs_faults
async def test_a_busy_server_says_when_to_come_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """429 with Retry-After: it is not asked before that."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async with cluster(kind) as home:
        home.fake.faults.append(Fault("list", MAPS, status=429, retry_after="7"))
        api = Api(home.access)
        mirror = Mirror(api, home.collection(MAPS), Pauses(0.01, 0.05))
        with monkeypatch.context() as patched:
            patched.setattr("sidecar.kubernetes.mirror.asyncio.sleep", sleep)
            async with aclosing(mirror.watch()) as snapshots:
                assert await anext(snapshots) == {}
        await api.close()
        assert slept == [7.0]


@needs_faults
async def test_a_slow_server_is_given_up_and_asked_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that does not come is a failure like others."""
    async with cluster(kind) as home:
        await home.create(MAPS, a_map("a", "1"))
        home.fake.faults.append(Fault("list", MAPS, stall=True))
        monkeypatch.setattr("sidecar.kubernetes.api.TIMEOUT", 0.2)
        api = Api(home.access)
        monkeypatch.undo()
        with pytest.raises(ApiError, match="no answer"):
            await api.list(home.collection(MAPS))
        assert len((await api.list(home.collection(MAPS))).items) == 1
        await api.close()


# Engines of a Service.


@asynccontextmanager
async def finding(home: Cluster, service: str, port: str | int) -> AsyncIterator[list[frozenset[Found]]]:
    """Follow a Service's engines; what is given grows with each set that was found."""
    sets: list[frozenset[Found]] = []

    async def follow() -> None:
        async with aclosing(EndpointSlices(home.access, home.namespace, service, port).watch()) as found:
            async for each in found:
                sets.append(each)  # noqa: PERF401 — it never ends

    task = asyncio.create_task(follow())
    try:
        yield sets
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@on_clusters
async def test_engines_come_and_go_with_their_slices(kind: str) -> None:
    """All slices of the Service together, none of another one's; a set is told of once."""
    async with cluster(kind) as home:
        await home.add_slice("t-1", "triton", ["10.1.0.1", "10.1.0.2"])
        await home.add_slice("o-1", "other", ["10.1.0.9"])
        async with finding(home, "triton", "grpc") as sets:
            await until(lambda: bool(sets))
            assert {each.address for each in sets[-1]} == {"10.1.0.1:8001", "10.1.0.2:8001"}
            await home.add_slice("t-2", "triton", ["10.1.0.3"])
            await until(lambda: len(sets[-1]) == 3)
            leaving = {"addresses": ["10.1.0.3"], "conditions": {"ready": False, "serving": True, "terminating": True}}
            await home.patch("endpointslices", "t-2", {"endpoints": [leaving]})
            await until(lambda: Found("10.1.0.3", "10.1.0.3:8001", False, True) in sets[-1])
            await home.patch("endpointslices", "t-2", {"metadata": {"labels": {"x": "y"}}})
            await home.delete("endpointslices", "t-2")
            await until(lambda: len(sets[-1]) == 2)
            assert len(sets) == 4


@needs_faults
async def test_a_server_that_is_away_takes_no_engine(kind: str) -> None:
    """Nothing is yielded while it cannot be asked; what has changed meanwhile is found after."""
    async with cluster(kind) as home:
        await home.add_slice("t-1", "triton", ["10.1.0.1"])
        async with finding(home, "triton", 8001) as sets:
            await until(lambda: home.fake.watching("endpointslices"))
            await home.fake.stop()
            await home.fake.start()
            await home.add_slice("t-2", "triton", ["10.1.0.2"])
            await until(lambda: len(sets[-1]) == 2)
            assert [len(each) for each in sets] == [1, 2]


@on_clusters
async def test_a_service_that_is_not_there_is_told(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """No slice is the truth about it, and most often a wrong name; a wrong port is told with those there are."""
    async with cluster(kind) as home:
        await home.add_slice("t-1", "triton", ["10.1.0.1"])
        async with finding(home, "tritan", 8001) as misspelt, finding(home, "triton", 9) as elsewhere:
            await until(lambda: bool(misspelt) and bool(elsewhere))
        assert misspelt[0] == elsewhere[0] == frozenset()
        assert "tritan in" in caplog.text
        assert "no port 9; it has grpc (8001)" in caplog.text


@on_clusters
async def test_a_service_of_several_engines_is_no_backend(kind: str) -> None:
    """Behind its one address DNS shows one; its slices show how many there are, and the message what to write."""
    async with cluster(kind) as home:
        ports = [{"name": "grpc", "port": 80, "targetPort": 8001}]
        metadata = {"name": "triton"}
        await home.create(
            "services", {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"ports": ports}}
        )
        await home.add_slice("t-1", "triton", ["10.1.0.1"])
        api = Api(home.access)
        try:
            assert await problem_of(api, "triton", 80) is None
            await home.add_slice("t-2", "triton", ["10.1.0.2"])
            problem = await problem_of(api, f"triton.{home.namespace}.svc", 80)
            assert problem is not None
            assert "2 endpoints (10.1.0.1:8001, 10.1.0.2:8001)" in problem
            assert f"{{service: triton, namespace: {home.namespace}, port: grpc}}" in problem
            for host, port in (("nothing", 80), ("triton", 81), ("10.1.0.1", 80)):
                assert await problem_of(api, host, port) is None
        finally:
            await api.close()


@needs_faults
async def test_a_configuration_is_checked_against_the_cluster(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each place that is several engines is told of; one that may not be looked at, and no cluster, are no problem."""
    async with cluster(kind) as home:
        spec = {"ports": [{"port": 8001}]}
        for name in ("one", "two"):
            await home.create("services", {"kind": "Service", "metadata": {"name": name}, "spec": spec})
        await home.add_slice("one-1", "one", ["10.1.0.1"], ports=[{"port": 8001}])
        await home.add_slice("two-1", "two", ["10.1.0.2", "10.1.0.3"], ports=[{"port": 8001}])
        places = {"0": "one:8001", "1": "two.ml:8001", "2": "gpu-1.example.com:8001"}
        monkeypatch.setenv("KUBECONFIG", str(write_kubeconfig(tmp_path / "config", home.fake.address)))
        found = await asyncio.to_thread(problems, places)
        assert set(found) == {"1"}
        assert "port: 8001" in found["1"]
        home.fake.faults.append(Fault("get", "services", status=403, times=9))
        assert await asyncio.to_thread(problems, places) == {}
    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert await asyncio.to_thread(problems, places) == {}


# As whom it is asked.


async def test_a_token_that_is_replaced_is_read_again(tmp_path: Path) -> None:
    """A service account's token is, every hour; a request with the old one would be refused."""
    account = tmp_path / "account"
    account.mkdir()
    (account / "token").write_text("first\n")
    (account / "namespace").write_text("ml")
    async with fake_server(token="first") as server:
        access = from_kubeconfig(_kubeconfig(tmp_path, server.address, {"tokenFile": str(account / "token")}))
        api = Api(access)
        await api.list(_maps())
        (account / "token").write_text("second\n")
        server.token = "second"
        await api.list(_maps())
        await api.close()
        assert [asked.token for asked in server.asked] == ["Bearer first", "Bearer second"]


@NEEDS_OPENSSL
async def test_a_kubeconfig_with_a_client_certificate(tmp_path: Path) -> None:
    """Server and client know each other by the cluster's CA, its files named or inline."""
    authority = Authority(tmp_path)
    await authority.found()
    server_key, server_certificate = await authority.sign("localhost", "IP:127.0.0.1")
    key, certificate = await authority.sign("me")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(authority.ca))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(server_certificate, server_key)
    async with fake_server() as server:
        await server.stop()
        server.tls = context
        await server.start()
        by_name = {"client-certificate": certificate.name, "client-key": key.name}
        inline = {
            f"{name}-data": base64.b64encode((tmp_path / path).read_bytes()).decode() for name, path in by_name.items()
        }
        for user in (by_name, inline):
            path = _kubeconfig(tmp_path, server.address, user, {"certificate-authority": "ca.pem"}, "https")
            api = Api(from_kubeconfig(path))
            assert not (await api.list(_maps())).items
            await api.close()
        stranger = Api(from_kubeconfig(_kubeconfig(tmp_path, server.address, {}, {}, "https")))
        with pytest.raises(ApiError, match="certificate"):
            await stranger.list(_maps())
        await stranger.close()


def test_a_pod_finds_its_cluster(tmp_path: Path) -> None:
    """By the service account that is mounted; without one the way out is named."""
    environment = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}
    with pytest.raises(Misused, match="automountServiceAccountToken"):
        find_access(environment, tmp_path)
    with pytest.raises(Misused, match="KUBECONFIG"):
        find_access({}, tmp_path)
    (tmp_path / "token").write_text("t")
    (tmp_path / "namespace").write_text("ml\n")
    (tmp_path / "ca.crt").write_bytes(Path(ssl.get_default_verify_paths().cafile or "").read_bytes())
    access = find_access(environment, tmp_path)
    assert (access.url, access.namespace, access.token()) == ("https://[fd00::1]:6443", "ml", "t")
    assert "t'" not in repr(access)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("- no", "current-context"),
        ({"current-context": "x"}, "no context called x"),
        ({"current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "k"}}]}, "no cluster called k"),
        ("{", "cannot be read"),
    ],
)
def test_a_kubeconfig_that_cannot_be_used(tmp_path: Path, record: Any, said: str) -> None:
    """It is named with what is missing."""
    path = tmp_path / "config"
    path.write_text(record if isinstance(record, str) else yaml.safe_dump(record))
    with pytest.raises(Misused, match=said):
        find_access({"KUBECONFIG": str(path)})


def test_a_kubeconfig_that_wants_another_program(tmp_path: Path) -> None:
    """No program is run for a credential."""
    with pytest.raises(Misused, match="another program"):
        from_kubeconfig(_kubeconfig(tmp_path, "h:1", {"exec": {"command": "aws"}}))


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _maps() -> Any:
    return Cluster(Access("", "ml"), None).collection(MAPS)  # type: ignore[arg-type]


def _kubeconfig(
    folder: Path, address: str, user: dict[str, Any], cluster: dict[str, Any] | None = None, scheme: str = "http"
) -> Path:
    record = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u", "namespace": "ml"}}],
        "clusters": [{"name": "k", "cluster": {"server": f"{scheme}://{address}"} | (cluster or {})}],
        "users": [{"name": "u", "user": user}],
    }
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(record))
    return path
