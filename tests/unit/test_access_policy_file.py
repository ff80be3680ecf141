"""A file of Cedar policies that changes while it decides: whatever becomes of it, the last good policies decide."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("cedarpy", reason="needs the extra cedar")


from sidecar.access import policy_file
from sidecar.access.configured import policy_of
from sidecar.access.deciding import CachedPolicy
from sidecar.access.policy_file import FILE_BYTES_MAX, FilePolicy
from sidecar.access.principal import Action, Principal, Proof, Resource, Sort
from sidecar.config.access import Policies
from sidecar.errors import Misused, needs_extra

ANN, BOB = Principal("ann", Proof.KEY), Principal("bob", Proof.KEY)
SQL = Resource(Sort.ADAPTER, "sql")


def permit(tenant: str) -> str:
    return f'permit(principal == Tenant::"{tenant}", action, resource);\n'


def who(policy: CachedPolicy) -> set[str]:
    return {each.tenant for each in (ANN, BOB) if policy.decide(each, Action.INFER, SQL).allowed}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "policies.cedar"
    path.write_text(permit("ann"))
    return path


@pytest.fixture
def policy(path: Path) -> FilePolicy:
    made = policy_of(Policies(cedar=str(path)))
    assert isinstance(made, FilePolicy)
    return made


async def settle(policy: FilePolicy) -> None:
    """Look twice, so that what is there counts."""
    await policy.look()
    await policy.look()


def put(path: Path, text: str) -> None:
    """Replace the file in one step, as editors and Kubernetes do."""
    new = path.with_name("new")
    new.write_text(text)
    new.replace(path)


async def test_a_changed_file_decides_without_a_restart(policy: FilePolicy, path: Path) -> None:
    assert who(policy) == {"ann"}
    assert await policy.visible(BOB, [SQL], 1) == set()
    epoch = policy.epoch
    put(path, permit("bob"))
    await settle(policy)
    assert (who(policy), policy.epoch, policy.fault) == ({"bob"}, epoch + 1, "")
    assert await policy.visible(BOB, [SQL], 1) == {"sql"}
    await settle(policy)
    assert policy.epoch == epoch + 1, "nothing changed since"


def remove(path: Path) -> None:
    path.unlink()


def mend(path: Path, text: str) -> None:
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    path.write_text(text)


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(4096) + b"\xff")


def unfinished(path: Path) -> None:
    path.write_text(permit("bob") + "permit(")


def emptied(path: Path) -> None:
    path.write_text("")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.write_bytes(b" " * (FILE_BYTES_MAX + 1))


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def of_another_schema(path: Path) -> None:
    path.write_text('permit(principal == User::"bob", action, resource);')


BROKEN: list[tuple[Callable[[Path], None], str]] = [
    (remove, "cannot be read: No such file"),
    (garbage, "no UTF-8 text"),
    (unfinished, "line 2: unexpected end"),
    (emptied, "no policy"),
    (folder, "Is a directory"),
    (pipe, "no file"),
    (endless, "larger than 4 MiB"),
    (dangling, "No such file"),
    (of_another_schema, "line 1: .*User"),
]


@pytest.mark.parametrize(("breaks", "words"), BROKEN)
async def test_a_faulty_file_keeps_what_was_read_and_says_so_once(
    policy: FilePolicy,
    path: Path,
    breaks: Callable[[Path], None],
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    epoch = policy.epoch
    breaks(path)
    with caplog.at_level(logging.ERROR):
        await settle(policy)
        await settle(policy)
    assert (who(policy), policy.epoch) == ({"ann"}, epoch)
    (line,) = caplog.messages
    assert str(path) in line
    assert policy.fault in line
    with pytest.raises(Misused, match=words) as refused:  # and a sidecar that starts now says the same
        policy_of(Policies(cedar=str(path)))
    assert policy.fault in refused.value.message
    mend(path, permit("bob"))
    await settle(policy)
    assert (who(policy), policy.epoch, policy.fault) == ({"bob"}, epoch + 1, "")


async def test_the_same_text_again_ends_a_fault_and_no_epoch(policy: FilePolicy, path: Path) -> None:
    epoch = policy.epoch
    remove(path)
    await settle(policy)
    assert policy.fault
    mend(path, permit("ann"))
    await settle(policy)
    assert (policy.fault, policy.epoch, who(policy)) == ("", epoch, {"ann"})


async def test_a_mounted_config_map_is_followed(tmp_path: Path) -> None:
    """Kubernetes writes a folder for each change, and replaces the link to it."""
    for name, tenant in (("old", "ann"), ("new", "bob")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "policies.cedar").write_text(permit(tenant))
    data, path = tmp_path / "..data", tmp_path / "policies.cedar"
    data.symlink_to("old")
    path.symlink_to("..data/policies.cedar")
    policy = policy_of(Policies(cedar=str(path)))
    assert isinstance(policy, FilePolicy)
    (tmp_path / "link").symlink_to("new")
    (tmp_path / "link").rename(data)
    await settle(policy)
    assert who(policy) == {"bob"}


async def test_a_file_that_is_written_in_place_is_waited_for(policy: FilePolicy, path: Path) -> None:
    with path.open("w") as file:
        file.write("permit(principal, action, resource);\n")
        file.flush()
        await policy.look()
        assert who(policy) == {"ann"}
        file.write('forbid(principal == Tenant::"ann", action, resource);\n')
        file.flush()
        await policy.look()
        assert who(policy) == {"ann"}
    await policy.look()
    assert who(policy) == {"bob"}


async def test_a_file_that_is_replaced_while_it_is_read_is_read_whole(policy: FilePolicy, path: Path) -> None:
    stop = threading.Event()
    texts = [permit("ann") * 50 + permit("bob"), permit("ann") * 200, permit("bob")]

    def replace() -> None:
        while not stop.is_set():
            for text in texts:
                put(path, text)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        for _ in range(30):
            policy._seen = policy_file._stamp(path)  # as if it were settled
            await policy.look()
            assert (policy._text in (permit("ann"), *texts), policy.fault) == (True, "")
    finally:
        stop.set()
        writer.join()
    await settle(policy)
    assert (policy._text, who(policy)) == (texts[-1], {"bob"})


async def test_a_task_watches_the_file(policy: FilePolicy, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_file, "LOOK_EVERY_S", 0.001)
    watch = asyncio.create_task(policy.watch())
    put(path, permit("bob"))
    async with asyncio.timeout(30):
        while who(policy) != {"bob"}:
            await asyncio.sleep(0.001)
    watch.cancel()
    await asyncio.wait([watch])
    assert watch.cancelled()


async def test_a_ready_set_needs_no_watch() -> None:
    policy = policy_of(Policies(ready="roles"))
    await policy.watch()
    assert (policy.source, policy.fault) == ("roles", "")


def test_without_the_extra_it_says_what_to_install(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sidecar.access.policy_file", "sidecar.access.policy_file", "sidecar.access.cedar_text"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "cedarpy", None)
    with pytest.raises(Misused, match=re.escape(needs_extra("access.policies.cedar", "cedar"))):
        policy_of(Policies(cedar=str(path)))
