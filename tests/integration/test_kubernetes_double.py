"""The tests' own API server answers as a real one does; each test asks the real one too, if KUBECONFIG names one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sidecar.kubernetes.access import from_kubeconfig
from sidecar.kubernetes.declarations import Source
from sidecar.kubernetes.reporting import event_of
from sidecar.kubernetes.standings import Phase, Standing
from tests.kit.kubernetes_cluster import Cluster, client_of, cluster, needs_faults, on_clusters

MAPS, LORAS, EVENTS = "configmaps", "loraadapters", "events"
Object = dict[str, Any]
LONG = "x" * 254


def a_map(**metadata: Any) -> Object:
    return {"metadata": metadata, "data": {"v": "1"}}


def a_lora(name: str = "sql", /, **spec: Any) -> Object:
    made = {"apiVersion": "lora-sidecar.io/v1alpha1", "kind": "LoraAdapter", "metadata": {"name": name}}
    return made | {"spec": {"source": "/l"} | spec}


def an_event(**fields: Any) -> Object:
    """Return an event as the API describes it."""
    return {
        "metadata": {"generateName": "sql-"},
        "eventTime": "2026-12-01T10:00:00.123456Z",
        "reportingController": "lora-sidecar.io/lora-sidecar",
        "reportingInstance": "pool-0",
        "action": "Ready",
        "reason": "Registered",
        "type": "Normal",
        "note": "sql stands for v1",
        "regarding": {"apiVersion": "v1", "kind": "ConfigMap", "namespace": "NAMESPACE", "name": "more"},
    } | fields


async def code(home: Cluster, method: str, plural: str, name: str = "", body: Object | None = None) -> int:
    """Send a request as it is; return the status of the answer."""
    path = home.collection(plural).path + (f"/{name}" if name else "")
    kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
    content = json.dumps(body).replace("NAMESPACE", home.namespace)
    answer = await home.client.request(method, path, content=content, headers={"content-type": kind})
    if answer.is_error:
        assert answer.json()["code"] == answer.status_code
    return answer.status_code


CREATED: list[tuple[str, Object, int]] = [
    (MAPS, a_map(name="sql.v2"), 201),
    *((MAPS, a_map(name=name), 422) for name in ("a_b", "A", "a.", "-a", "a..b", LONG, "")),
    (MAPS, a_map(), 422),
    *((MAPS, a_map(generateName=begun), 201) for begun in ("sql-", "sql", "a.b-", f"{LONG[:200]}-")),
    *((MAPS, a_map(generateName=begun), 422) for begun in ("sql.", "sql_", "SQL-")),
    (MAPS, a_map(name=5), 400),
    (MAPS, a_map(name="a", namespace="elsewhere"), 400),
    (MAPS, a_map(name="a", labels={"a": "b", "a.b/c": ""}), 201),
    *((MAPS, a_map(name="b", labels=labels), 422) for labels in ({"a b": "c"}, {"a": "b c"}, {"a": "x" * 64})),
    (MAPS, a_map(name="b", labels={"a": 1}), 400),
    (MAPS, a_map(name="b", annotations={"a b": ""}), 422),
    (MAPS, a_map(name="c", annotations={"a.b/c": "any text"}), 201),
    (MAPS, a_map(name="d", finalizers=["mine"]), 422),
    (MAPS, {"metadata": {"name": "d"}, "data": {"v": 1}}, 400),
    (MAPS, {"metadata": {"name": "d"}, "data": ["v"]}, 400),
    (MAPS, {"metadata": {"name": "d"}, "data": {"a b": ""}}, 422),
    (MAPS, {"metadata": {"name": "d"}, "data": None}, 201),
    (MAPS, {"metadata": {"name": "e"}, "apiVersion": "v2", "kind": "ConfigMap"}, 400),
    ("services", {"metadata": {"name": "1a"}, "spec": {"ports": [{"port": 80}]}}, 422),
    ("services", {"metadata": {"name": "a"}, "spec": {"ports": []}}, 422),
    ("services", {"metadata": {"name": "a"}, "spec": {"ports": [{"port": 70000}]}}, 422),
    ("services", {"metadata": {"name": "a"}, "spec": {"ports": [{"port": "80"}]}}, 400),
    ("services", {"metadata": {"name": "a"}, "spec": {"ports": [{"port": 80}]}}, 201),
    ("pods", {"metadata": {"name": "a"}}, 422),
    ("pods", {"metadata": {"name": "a"}, "spec": {"containers": [{"name": "a"}]}}, 422),
    (LORAS, a_lora(), 201),
    (LORAS, a_lora(), 409),
    *((LORAS, a_lora("a", **spec), 422) for spec in (
        {"source": None}, {"source": ""}, {"source": 5}, {"digest": "12"}, {"pinned": "yes"}, {"tenants": "acme"},
        {"tenants": ["a", "a"]}, {"tenants": [""]}, {"tenants": [None]}, {"removal": {"graceSeconds": -1}},
        {"removal": {"graceSeconds": 1.5}}, {"rev": 7}, {"name": "-a"},
    )),
    (LORAS, a_lora("b", pinned=None, removal=None, unknown=1), 201),
    (LORAS, {"metadata": {"name": "c"}, "spec": {"source": "/l"}}, 400),
    (LORAS, a_lora("c") | {"kind": "Adapter"}, 422),
    (LORAS, a_lora("c") | {"spec": None}, 422),
    (LORAS, a_lora("C"), 422),
    (LORAS, {**a_lora("c"), "metadata": {"name": "c", "labels": {"a": 5}}}, 400),
    (EVENTS, an_event(), 201),
    (EVENTS, an_event(note="", metadata={"name": "sql.17"}), 201),
    *((EVENTS, an_event(**fields), 422) for fields in (
        {"metadata": {"generateName": "sql."}}, {"eventTime": None}, {"reportingController": ""},
        {"reportingController": "a b"}, {"reportingInstance": ""}, {"reportingInstance": "x" * 129}, {"action": ""},
        {"action": "x" * 129}, {"reason": ""}, {"reason": "x" * 129}, {"type": "Bad"}, {"type": None},
        {"regarding": None}, {"regarding": {"name": "more"}}, {"note": "x" * 1025}, {"note": "ä" * 513},
    )),
    *((EVENTS, an_event(**fields), 400) for fields in (
        {"note": 5}, {"eventTime": "yesterday"}, {"eventTime": "2026-12-01T10:00:00Z"}, {"kind": "Events"},
    )),
]  # fmt: skip


@on_clusters
async def test_what_is_created_is_checked(kind: str) -> None:
    """Names, generated names, types, what is required, and a LoraAdapter's schema."""
    async with cluster(kind) as home:
        found = [(plural, made, await code(home, "POST", plural, body=made)) for plural, made, _ in CREATED]
        assert found == CREATED
        names = [each["metadata"]["name"] for each in await home.list(MAPS)]
        assert sorted(len(name) for name in names if name.startswith("x")) == [63]
        stored = {each["metadata"]["name"]: each["spec"] for each in await home.list(LORAS)}
        assert stored == {"sql": {"source": "/l"}, "b": {"source": "/l"}}
        await home.create(LORAS, a_lora("graceful", removal={"graceSeconds": None, "odd": 1}))
        assert (await home.get(LORAS, "graceful"))["spec"]["removal"] == {"graceSeconds": 30}


@on_clusters
@pytest.mark.parametrize("text", ["x", "ä", "\N{GRINNING FACE}"])
async def test_our_events_are_taken(kind: str, text: str) -> None:
    """Whatever an adapter, a replica and a message are called: the server counts bytes."""
    async with cluster(kind) as home:
        for name in ("a", "a.b-c", "x" * 253, f"{'x' * 199}.y", f"{'x' * 57}.y"):
            source = Source("LoraAdapter", home.namespace, name)
            event = event_of(source, text * 2000, Standing(Phase.FAILED, "NameTaken", ""), text * 200)
            assert await code(home, "POST", EVENTS, body=event) == 201
        for event in await home.list(EVENTS):
            assert event["note"] == text * (1024 // len(text.encode()))
            assert event["reportingInstance"] == text * (128 // len(text.encode()))


def a_condition(**fields: Any) -> Object:
    condition = {"type": "Ready", "status": "True", "reason": "Registered", "message": ""}
    return {"conditions": [condition | {"lastTransitionTime": "2026-12-01T10:00:00Z"} | fields]}


PATCHED: list[tuple[str, Object, int]] = [
    ("sql/status", {"status": {"phase": "Ready", "ready": 1, "residentOn": ["a"]} | a_condition()}, 200),
    *(("sql/status", {"status": status}, 422) for status in (
        {"phase": "Odd"}, {"desired": -1}, {"desired": "1"}, {"message": 5}, a_condition(reason=""),
        a_condition(reason="a b"), a_condition(message=None), a_condition(status="Maybe"),
        a_condition(lastTransitionTime="now"),
    )),
    ("sql/status", {"status": {"phase": None}}, 200),
    ("sql/status", {"status": {"phase": "Ready"}, "spec": {"source": "/other"}}, 200),
    ("sql/status", {"status": {"phase": "Ready"}, "metadata": {"resourceVersion": "1"}}, 409),
    ("none/status", {"status": {"phase": "Ready"}}, 404),
    ("sql", {"spec": {"source": None}}, 422),
    ("sql", {"spec": {"source": 5}}, 422),
    ("sql", {"metadata": {"name": "other"}}, 400),
    ("sql", {"metadata": {"annotations": {"a": 5}}}, 422),
    ("sql", {"metadata": {"annotations": {"a": "b"}}, "status": {"phase": "Failed"}}, 200),
]  # fmt: skip


@on_clusters
async def test_what_is_changed_is_checked(kind: str) -> None:
    """A status by its schema, and apart from the rest; a change of nothing has no new resource version."""
    async with cluster(kind) as home:
        await home.create(LORAS, a_lora())
        assert [(name, patch, await code(home, "PATCH", LORAS, name, patch)) for name, patch, _ in PATCHED] == PATCHED
        found = await home.get(LORAS, "sql")
        assert (found["spec"], found["status"]["phase"], found["metadata"]["generation"]) == (
            {"source": "/l"},
            "Ready",
            1,
        )
        await home.patch(LORAS, "sql", {"metadata": {"annotations": {"a": "b"}}})
        assert (await home.get(LORAS, "sql"))["metadata"]["resourceVersion"] == found["metadata"]["resourceVersion"]
        await home.create(MAPS, a_map(name="a"))
        assert await code(home, "PATCH", MAPS, "a/status", {"data": {}}) == 404
        answer = await home.client.patch(f"{home.collection(MAPS).path}/a", json={"data": {"v": "2"}})
        assert answer.status_code == 415


@on_clusters
async def test_a_role_permits_what_it_names(kind: str, tmp_path: Path) -> None:
    """The chart's account may read and report, and nothing else, here or elsewhere."""
    async with cluster(kind) as home:
        await home.create(LORAS, a_lora())
        await home.create(MAPS, a_map(name="a"))
        async with client_of(from_kubeconfig(await home.kubeconfig(tmp_path))) as client:
            bound = Cluster(home.access, client)
            for plural in (LORAS, MAPS, "endpointslices"):
                assert await code(bound, "GET", plural) == 200
            assert await code(bound, "GET", LORAS, "sql") == 200
            assert await code(bound, "PATCH", LORAS, "sql/status", {"status": {"phase": "Ready"}}) == 200
            assert await code(bound, "POST", EVENTS, body=an_event()) == 201
            assert await code(bound, "DELETE", "pods", "none") == 404
            for method, plural, name in (
                ("GET", "secrets", ""), ("GET", "pods", ""), ("GET", EVENTS, ""), ("PATCH", LORAS, "sql"),
                ("DELETE", LORAS, "sql"), ("POST", LORAS, ""), ("PATCH", MAPS, "a"), ("POST", "secrets", ""),
            ):  # fmt: skip
                assert await code(bound, method, plural, name, {}) == 403
            elsewhere = home.collection(MAPS).path.replace(home.namespace, "default")
            assert (await client.get(elsewhere)).status_code == 403


@asynccontextmanager
async def watching(home: Cluster, plural: str, **query: str) -> AsyncIterator[AsyncIterator[tuple[str, str]]]:
    """Watch as a client may; yield the kinds of events with the names of their objects."""
    path = home.collection(plural).path
    async with home.client.stream("GET", path, params={"watch": "1"} | query, timeout=60) as answer:

        async def events() -> AsyncIterator[tuple[str, str]]:
            async for line in answer.aiter_lines():
                event = json.loads(line)
                name = event["object"]["metadata"].get("name", "")
                if not name.startswith("kube-root"):
                    yield event["type"], name or event["object"]["metadata"]["resourceVersion"]

        yield events()


@on_clusters
async def test_a_watch_ends_in_its_time(kind: str) -> None:
    """The answer is whole then, and the connection goes on; it has no bookmark that nobody asked for."""
    async with cluster(kind) as home:
        version = (await home.create(MAPS, a_map(name="a")))["metadata"]["resourceVersion"]
        async with watching(home, MAPS, resourceVersion=version, timeoutSeconds="1") as events:
            await home.create(MAPS, a_map(name="b"))
            await home.create(MAPS, a_map(name="c"))
            assert [event async for event in events] == [("ADDED", "b"), ("ADDED", "c")]


@on_clusters
async def test_a_watch_that_ends_says_where_it_was(kind: str) -> None:
    """A bookmark comes before the end to who wants it: at the last change of these objects, or after it."""
    async with cluster(kind) as home:
        version = (await home.create(MAPS, a_map(name="a")))["metadata"]["resourceVersion"]
        options = {"resourceVersion": version, "timeoutSeconds": "4", "allowWatchBookmarks": "true"}
        async with watching(home, MAPS, **options) as events:
            last = (await home.create(MAPS, a_map(name="b")))["metadata"]["resourceVersion"]
            told = [event async for event in events]
        assert told[0] == ("ADDED", "b")
        assert told[1:]
        assert all(kind == "BOOKMARK" and int(position) >= int(last) for kind, position in told[1:])


@needs_faults
async def test_bookmarks_come_from_time_to_time(kind: str) -> None:
    """A real server sends one a minute."""
    query = {"resourceVersion": "1000", "allowWatchBookmarks": "true"}
    async with cluster(kind, bookmark_s=0.1) as home, watching(home, MAPS, **query) as events:
        assert [(await anext(events))[0] for _ in range(3)] == ["BOOKMARK"] * 3
        await home.create(MAPS, a_map(name="a"))
        while (told := await anext(events)) != ("ADDED", "a"):
            assert told[0] == "BOOKMARK"


@on_clusters
@pytest.mark.parametrize("position", ["", "0"])
async def test_a_watch_without_a_position_begins_with_what_is_there(kind: str, position: str) -> None:
    async with cluster(kind) as home:
        for name in ("a", "b"):
            await home.create(MAPS, a_map(name=name, labels={"its": name}))
        query = {"resourceVersion": position} if position else {}
        async with watching(home, MAPS, **query) as events:
            assert {await anext(events) for _ in range(2)} == {("ADDED", "a"), ("ADDED", "b")}
            await home.delete(MAPS, "a")
            assert await anext(events) == ("DELETED", "a")
        async with watching(home, MAPS, labelSelector="its=b", **query) as events:
            assert await anext(events) == ("ADDED", "b")
            await home.patch(MAPS, "b", {"metadata": {"labels": {"its": "a"}}})
            assert await anext(events) == ("DELETED", "b")


@on_clusters
async def test_all_pages_are_of_one_moment(kind: str) -> None:
    """Of that of the first page: what is made between two of them is in none, and the position does not move."""
    async with cluster(kind) as home:
        path = home.collection("secrets").path
        for name in "acegi":
            await home.create("secrets", {"metadata": {"name": name}})
        pages: list[Object] = []
        token = ""
        while token or not pages:
            query = {"limit": "2"} | ({"continue": token} if token else {})
            pages.append((await home.client.get(path, params=query)).json())
            token = pages[-1]["metadata"].get("continue", "")
            await home.create("secrets", {"metadata": {"name": f"y{len(pages)}"}})
        assert [item["metadata"]["name"] for page in pages for item in page["items"]] == list("acegi")
        assert len({page["metadata"]["resourceVersion"] for page in pages}) == 1


@on_clusters
async def test_a_finalizer_holds_what_is_deleted(kind: str) -> None:
    """It is marked and stays, which is a change; it goes with its last finalizer, and cannot get another."""
    async with cluster(kind) as home:
        await home.create(LORAS, a_lora() | {"metadata": {"name": "sql", "finalizers": ["a.b/c"]}})
        async with watching(home, LORAS) as events:
            assert await anext(events) == ("ADDED", "sql")
            for _ in range(2):
                await home.delete(LORAS, "sql")
            found = (await home.get(LORAS, "sql"))["metadata"]
            assert (bool(found["deletionTimestamp"]), found["generation"]) == (True, 2)
            assert await code(home, "PATCH", LORAS, "sql", {"metadata": {"finalizers": ["a.b/c", "a.b/d"]}}) == 422
            assert await code(home, "PATCH", LORAS, "sql/status", {"status": {"phase": "Ready"}}) == 200
            await home.patch(LORAS, "sql", {"metadata": {"finalizers": None}})
            told = [await anext(events) for _ in range(3)]
            assert told == [("MODIFIED", "sql"), ("MODIFIED", "sql"), ("DELETED", "sql")]
        assert await code(home, "GET", LORAS, "sql") == 404
