"""Folders that are exchanged while they are read, and what a tenant is told of paths that it may not register."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from sidecar.adapters.entries import Files
from sidecar.adapters.folder import Folder
from sidecar.adapters.spool import digest_of_folder
from sidecar.adapters.staging import Staging
from sidecar.errors import Invalid
from sidecar.proto import admin_pb2 as pb
from tests.attack.test_asked_again_at_the_write import Publisher, enforced
from tests.integration.test_load_calls import VLLM, trained
from tests.kit.emulated import running_engine
from tests.kit.peft_files import write_adapter
from tests.kit.serving import Serving, serving
from tests.kit.vllm_emulated import running_vllm

DUMMY = {"compute": "none", "shape": "tiny"}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
REGISTRATIONS = 200


def confined(folder: Path) -> dict[str, Any]:
    """Return a configuration in which each tenant has its own folders and names."""
    return enforced(folder) | {"access": {"policies": {"ready": "tenant_prefix"}}}


@asynccontextmanager
async def house(folder: Path) -> AsyncIterator[tuple[Serving, Publisher]]:
    """Run a sidecar with two tenants' folders; return it and one of them."""
    write_adapter(folder / "acme" / "mine", seed=1)
    write_adapter(folder / "blue" / "secret", seed=2)
    async with running_engine(**DUMMY) as engine, serving([engine], roots=[folder], **confined(folder)) as served:
        yield served, await Publisher.of(served, "acme")


SWAP = """
import os, sys
link, *targets = sys.argv[1:]
number = 0
while True:
    os.symlink(targets[number % len(targets)], link + ".beside")
    os.rename(link + ".beside", link)
    number += 1
    if number == 1:
        print("begun", flush=True)
"""


@contextmanager
def swapping(link: Path, *targets: Path) -> Iterator[None]:
    """Point a link at one target after the other, in a process of its own: a thread would wait for ours."""
    command = [sys.executable, "-c", SWAP, str(link), *map(str, targets)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        try:
            yield
        finally:
            process.kill()


async def told(call: Any) -> tuple[str, str]:
    """Return a call's status and words."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or ""
    return "OK", ""


@pytest.mark.parametrize("linked", ["folder", "weights"])
async def test_a_link_that_is_swapped_gives_nobody_anothers_weights(tmp_path: Path, linked: str) -> None:
    """Each registration reads the tenant's own folder, or none."""
    async with house(tmp_path) as (served, acme):
        own, secret, folder = tmp_path / "acme" / "mine", tmp_path / "blue" / "secret", tmp_path / "acme" / "x"
        link, targets = folder, (own, secret)
        if linked == "weights":
            write_adapter(folder, seed=1)
            link = folder / WEIGHTS
            link.rename(folder / "weights")
            targets = folder / "weights", secret / WEIGHTS
        seen = set()
        with swapping(link, *targets):
            for number in range(REGISTRATIONS):
                wanted = pb.RegisterRequest(name=f"acme/{number}", path=str(folder))
                seen.add((await told(served.adapters.Register(wanted, metadata=acme.metadata)))[0])
        digests = {record.adapter.digest for record in served.sidecar.registry.all()}
        assert digests == {digest_of_folder(own)}
        assert seen == {"OK", "PERMISSION_DENIED" if linked == "folder" else "NOT_FOUND"}


def test_a_link_that_becomes_a_file_while_it_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file := tmp_path / "weights").write_text("x")
    (tmp_path / WEIGHTS).symlink_to("weights")
    follow = os.readlink
    monkeypatch.setattr("os.readlink", lambda path: follow(file.replace(path)))
    with Folder(tmp_path, "sql") as folder, pytest.raises(Invalid, match="changed while it was read; try again"):
        folder.open(WEIGHTS, "sql")


class Swapping(Files):
    """Exchanges a folder for another one when staging begins to write."""

    def __init__(self, folder: Path, other: Path) -> None:
        self._folder = folder
        self._other = other

    def make_directory(self, path: Path) -> None:
        super().make_directory(path)
        if not self._folder.is_symlink():
            self._folder.rename(self._folder.with_name("moved"))
            self._folder.symlink_to(self._other)


def test_what_is_staged_for_engines_is_what_was_hashed(tmp_path: Path) -> None:
    """Its folder is exchanged after it was hashed, and before it is copied."""
    own, secret = write_adapter(tmp_path / "own", seed=1), write_adapter(tmp_path / "secret", seed=2)
    (tmp_path / "shared").mkdir()
    digest = digest_of_folder(own)
    staging = Staging(tmp_path / "shared" / "adapters", Swapping(own, secret))
    staging.open()
    try:
        assert digest_of_folder(staging.stage(own, "key", digest)) == digest
    finally:
        staging.close()


async def test_a_refused_path_tells_nothing_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is there, is a link, is another's or lies outside: a tenant hears the same, and ~ is nobody's home."""
    monkeypatch.setenv("HOME", str(tmp_path / "acme"))
    async with house(tmp_path) as (served, acme):
        outside = tmp_path.with_name(f"{tmp_path.name}-outside")
        write_adapter(outside / "there")
        (tmp_path / "acme" / "out").symlink_to(outside / "there")
        (tmp_path / "acme" / "dangling").symlink_to(outside / "gone")
        (tmp_path / "acme" / "loop").symlink_to("loop")
        (tmp_path / "acme" / "file").write_text("x")
        own = ("gone", "out", "dangling", "loop", "file", "mine/../../blue/secret", "by", "back", "mine/../mine")
        monkeypatch.chdir(tmp_path / "acme")
        (tmp_path / "acme" / "by").symlink_to("/proc/self/cwd/mine")
        (tmp_path / "acme" / "back").symlink_to(f"out/../../{tmp_path.name}/acme/mine")
        paths = [
            *(tmp_path / "acme" / name for name in own),
            f"{tmp_path}/acme/out/../../{tmp_path.name}/acme/mine",
            tmp_path / "blue" / "secret", tmp_path / "blue" / "gone", outside / "there", outside / "gone", "/etc",
            "/gone", "relative", "mine", "/proc/self/cwd/mine", "~/mine", "~root", "~nobody-is-called-so/a", "a\0b",
        ]  # fmt: skip
        heard = set()
        for path in paths:
            wanted = pb.RegisterRequest(name="acme/sql", path=str(path))
            code, words = await told(served.adapters.Register(wanted, metadata=acme.metadata))
            heard.add((code, words.partition(" is no folder")[2]))
            assert str(tmp_path) not in words.replace(str(path), "")
        ((code, words),) = heard
        assert (code, 'tenant "acme"' in words) == ("PERMISSION_DENIED", True), words
        assert not served.sidecar.registry.all()


async def test_a_tenant_may_name_a_root_as_it_is_configured(tmp_path: Path) -> None:
    """A root that is a link, and a link that stays in the tenant's folder."""
    (tmp_path / "there").mkdir()
    (root := tmp_path / "root").symlink_to("there")
    async with house(root) as (served, acme):
        (root / "acme" / "far").symlink_to(root / "acme" / "mine")
        for path in (root / "acme" / "mine", tmp_path / "there" / "acme" / "far"):
            wanted = pb.RegisterRequest(name="acme/sql", path=str(path))
            reply = await served.adapters.Register(wanted, metadata=acme.metadata)
            assert reply.adapter.path == str(tmp_path / "there" / "acme" / "mine")


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
async def test_a_link_in_a_folder_tells_nothing_of_the_host(tmp_path: Path, file: str) -> None:
    """Whether there is something where it leads is not told either."""
    async with house(tmp_path) as (served, acme):
        folder, heard = write_adapter(tmp_path / "acme" / "sql"), set()
        for target in ("/etc/passwd", "/etc/gone", str(tmp_path / "blue" / "secret" / file), "../gone", "/etc"):
            (folder / file).unlink()
            (folder / file).symlink_to(target)
            wanted = pb.RegisterRequest(name="acme/sql", path=str(folder))
            heard.add(await told(served.adapters.Register(wanted, metadata=acme.metadata)))
        assert len(heard) == 1, heard


async def test_a_load_call_for_a_path_that_is_not_allowed_is_forbidden(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not a fault of the sidecar, and the same answer whatever is there; the tenant's own folder is loaded."""
    steps = tmp_path / "steps"
    write_adapter(steps / "acme" / "mine", seed=1)
    write_adapter(steps / "blue" / "secret", seed=2)
    async with running_vllm(**VLLM) as (engine, _), trained([engine], tmp_path, **confined(tmp_path)) as trainer:
        acme = await Publisher.of(trainer.served, "acme")
        trainer.client.http.headers.update(dict(acme.metadata))
        bodies = set()
        for path in (steps / "blue" / "secret", steps / "blue" / "gone", "/etc", "/gone", steps / "acme" / "gone"):
            reply = await trainer.load(path, "acme/sql")
            assert reply.status_code == 403, reply.text
            bodies.add(reply.json()["error"]["message"].partition(" is no folder")[2])
        assert len(bodies) == 1
        assert "broke" not in caplog.text
        reply = await trainer.load(steps / "acme" / "mine", "acme/sql")
        assert (reply.status_code, reply.headers["x-lora-version"]) == (200, "acme/sql@v1")


async def test_the_causes_of_a_refused_load_are_of_the_callers_own_folder(tmp_path: Path) -> None:
    """What a config says is told only of a folder that the caller may load, whatever its path leads to by then."""
    steps = tmp_path / "steps"
    write_adapter(steps / "acme" / "bad", seed=1, use_dora=True)
    async with running_vllm(**VLLM) as (engine, _), trained([engine], tmp_path, **confined(tmp_path)) as trainer:
        acme = await Publisher.of(trainer.served, "acme")
        trainer.client.http.headers.update(dict(acme.metadata))
        reply = await trainer.load(steps / "acme" / "bad", "acme/sql")
        assert (reply.status_code, "DoRA" in reply.text) == (500, True)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_refused_folders_leave_no_descriptor_open(tmp_path: Path) -> None:
    async with house(tmp_path) as (served, acme):
        write_adapter(tmp_path / "acme" / "bad", use_dora=True)
        before = 0
        for number in range(40):
            for folder in ("bad", "gone", "mine"):
                wanted = pb.RegisterRequest(name="acme/sql", path=str(tmp_path / "acme" / folder))
                await told(served.adapters.Register(wanted, metadata=acme.metadata))
            await asyncio.sleep(0)
            before = before or (descriptors() if number == 5 else 0)
        assert descriptors() <= before + 5
