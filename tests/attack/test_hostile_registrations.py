"""What a caller of the admin API may put into its fields: each ends in a clear refusal, and nothing of it stays."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from sidecar.adapters.spool import digest_of_folder
from sidecar.proto import admin_pb2 as pb
from tests.integration.test_push import chunks_of, messages, start_of
from tests.kit.emulated import running_engine
from tests.kit.peft_files import write_adapter
from tests.kit.serving import Serving, serving

DUMMY = {"compute": "none", "shape": "tiny"}
LONG = "x" * 1_000_000
NAMES = (
    "", ".", "..", "a/../b", "/a", "a/", "a//b", "a\x00b", "a\nb", "é", "\u202eabc", "a@v1", "base", "7", "-a", "a b",
    "a" * 129, LONG, "v1@", "%2e%2e", "a\\b", "~", "CON:", "a;b", "$(id)", "{{a}}", "٣", "²",
)  # fmt: skip
PATHS = (
    "", "\x00", "a\x00b", "~nobody-is-called-so", "~nobody-is-called-so/a", "x" * 5000, "/" + "x/" * 3000, "/proc/self",
    "/dev/zero", "loop", "file:///etc", "FILE:///etc", "http://", "https://[::1", "hf://", "s3://", "gs:///", "a" * 300,
    "http://x:99999/", "http://x:abc/a", "https://user:pass@x/a", "push://" + "a" * 64, "\ud7ff", "..", "../../..",
    LONG,
)  # fmt: skip


def words_of(count: int, length: int = 3) -> list[str]:
    return [f"{number:0{length}}" for number in range(count)]


def register(**fields: Any) -> Callable[[Serving, str], Any]:
    return lambda served, path: served.adapters.Register(pb.RegisterRequest(**{"name": "sql", "path": path} | fields))


FIELDS: dict[str, Callable[[Serving, str], Any]] = {
    "labels without end": register(labels=dict.fromkeys(words_of(20_000), "x")),
    "a label of a megabyte": register(labels={"a": LONG}),
    "a label's name of a megabyte": register(labels={LONG: "a"}),
    "tenants without end": register(allow=words_of(50_000)),
    "a tenant of a megabyte": register(allow=[LONG]),
    "a tenant with a line break": register(allow=["a\nb"]),
    "a base of a megabyte": register(base=LONG),
    "a base with a line break": register(base="a\nb"),
}
VERSIONS = ("²", "v²", "v٣", "v" + "9" * 5000, "9" * 5000, LONG, "v-1", "v0", "v", "\x00", "v1 ", "deadbeef")


async def refused(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is not grpc.StatusCode.UNKNOWN, caught.value.details()
    words = caught.value.details() or ""
    assert "Unexpected" not in words
    assert len(words) < 2100
    return words


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roots")
    write_adapter(folder / "sql")
    (folder / "loop").symlink_to(folder / "loop")
    return folder


async def test_odd_names_paths_fields_and_versions(roots: Path, tmp_path: Path) -> None:
    """Each is refused with a reason; afterwards the registry is empty, and a proper registration goes through."""
    good = str(roots / "sql")
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], roots=[roots], data_directory=str(tmp_path)) as served,
    ):
        for name in NAMES:
            await refused(served.adapters.Register(pb.RegisterRequest(name=name, path=good)))
            await refused(
                served.adapters.Push(_messages(messages(start_of(roots / "sql", name), chunks_of(roots / "sql"))))
            )
            for method in ("Get", "Pin", "Unpin", "Evict", "Release"):
                await refused(getattr(served.adapters, method)(pb.AdapterRequest(name=name)))
            await refused(served.adapters.Unregister(pb.UnregisterRequest(name=name)))
        for path in (*PATHS, str(roots / "loop"), str(roots / "loop" / "a")):
            await refused(served.adapters.Register(pb.RegisterRequest(name="sql", path=path)))
        for make in FIELDS.values():
            await refused(make(served, good))
        assert not served.state.names
        await served.adapters.Register(pb.RegisterRequest(name="sql", path=good, labels={"team": "a"}, allow=["acme"]))
        for version in VERSIONS:
            await refused(served.adapters.Promote(pb.PromoteRequest(name="sql", version=version)))
            await refused(served.adapters.Refresh(pb.RefreshRequest(name="sql", version=version)))
        await refused(served.adapters.Promote(pb.PromoteRequest(name="sql", version="v1", weight=2**32 - 1)))
        for token in ("²", "٣", "9" * 5000, LONG, "-1", "x"):
            await refused(anext(aiter(served.adapters.Watch(pb.WatchRequest(token=token)))))
        (known,) = served.state.names.values()
        assert list(known.versions) == [1]


async def _messages(requests: list[Any]) -> Any:
    for request in requests:
        yield request


async def test_a_long_name_costs_no_more_than_a_short_one(roots: Path) -> None:
    """A name is measured before it is compared with those that there are: a million characters cost like ten."""
    async with running_engine(**DUMMY) as engine, serving([engine], roots=[roots]) as served:
        for number in range(30):
            await served.adapters.Register(pb.RegisterRequest(name=f"sql-{number}", path=str(roots / "sql")))
        costs = []
        for name in ("sql-unknown", "s" * 1_000_000):
            begun = time.process_time()
            for _ in range(10):
                await refused(served.adapters.Get(pb.AdapterRequest(name=name)))
            costs.append(time.process_time() - begun)
        assert costs[1] < 20 * costs[0]


def before_opening(monkeypatch: pytest.MonkeyPatch, name: str, exchange: Callable[[], object]) -> list[str]:
    """Exchange something right before a file of this name is opened for the first time; return the list of that."""
    opening, done = os.open, []

    def exchanged(path: Any, *args: Any, **kwargs: Any) -> int:
        if os.fspath(path).endswith(name) and not done:
            done.append(name)
            exchange()
        return opening(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", exchanged)
    return done


async def test_a_config_that_becomes_a_pipe_before_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is replaced at the worst moment: the open must not wait for a writer."""
    folder = write_adapter(tmp_path / "sql")
    config = folder / "adapter_config.json"

    def exchange() -> None:
        config.unlink()
        os.mkfifo(config)

    async with running_engine(**DUMMY) as engine, serving([engine], roots=[tmp_path]) as served:
        done = before_opening(monkeypatch, config.name, exchange)
        words = await refused(served.adapters.Register(pb.RegisterRequest(name="sql", path=str(folder)), timeout=20))
        assert "not a regular file" in words
        assert done


@pytest.mark.parametrize("opened", ["sql", "adapter_model.safetensors"])
async def test_a_folder_that_is_replaced_by_a_link_out_of_the_roots(
    opened: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is opened, or before one of its files is: what lies outside is not registered."""
    roots, outside = tmp_path / "roots", write_adapter(tmp_path / "outside", seed=2)
    folder = write_adapter(roots / "sql", seed=1)
    own = digest_of_folder(folder)

    def exchange() -> None:
        folder.rename(roots / "old")
        folder.symlink_to(outside)

    async with running_engine(**DUMMY) as engine, serving([engine], roots=[roots]) as served:
        done = before_opening(monkeypatch, opened, exchange)
        registering = served.adapters.Register(pb.RegisterRequest(name="sql", path=str(folder)), timeout=20)
        if opened == "sql":
            assert "is not a folder" in await refused(registering)
            assert not served.state.names
        else:
            assert (await registering).adapter.digest == own
        assert done
