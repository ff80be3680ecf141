"""What restarts one engine: a command and its end, a pod and the API server's answer."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from sidecar.config.restart import Restart
from sidecar.kubernetes.access import Access
from sidecar.serve.restarters import delete_pod, run_command
from tests.kit.kubernetes_api import Fault
from tests.kit.kubernetes_cluster import Cluster, cluster

PATIENCE_S = 60.0


def shell(program: str, *arguments: str, timeout_s: float = PATIENCE_S) -> Restart:
    return Restart(command=("sh", "-c", program, *arguments), timeout_s=timeout_s)


async def test_a_command_is_told_of_its_engine(tmp_path: Path) -> None:
    """It gets its arguments as they are, this process's environment, and the engine's names in addition."""
    said = tmp_path / "said"
    restart = shell('printf "%s|%s|%s" "$0" "$ENGINE_ID" "$PATH" > "$1"', "a b *", str(said))
    assert await run_command(restart, {"ENGINE_ID": "gpu 1"}) == ""
    assert said.read_text() == f"a b *|gpu 1|{os.environ['PATH']}"


async def test_a_command_that_fails_is_quoted() -> None:
    """By its status and the end of what it said, in one line."""
    error = await run_command(shell("seq 1 1000; echo no such unit >&2; exit 5"), {})
    assert error.startswith("sh ended with 5 (")
    assert error.endswith("999 1000 no such unit)")
    assert len(error) < 400


async def test_a_program_that_is_not_there() -> None:
    error = await run_command(Restart(command=("/no/such/program",)), {})
    assert error == "/no/such/program cannot be run (No such file or directory); see restart.command"


async def test_a_command_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    restart = shell('sleep 1000 & echo $! > "$0.new"; mv "$0.new" "$0"; wait', str(child), timeout_s=2.0)
    error = await run_command(restart, {})
    assert "did not end within 2 s and was killed" in error
    assert "restart.timeout_s" in error
    pid = int(child.read_text())
    async with asyncio.timeout(PATIENCE_S):
        while _runs(pid):
            await asyncio.sleep(0.01)


def _runs(pid: int) -> bool:
    """Return True if a process has not ended; one that nobody has waited for is a zombie."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


async def test_an_engine_that_the_command_leaves_running_does_not_hold_it_up(tmp_path: Path) -> None:
    """It has the command's output open for as long as it runs."""
    child = tmp_path / "child"
    async with asyncio.timeout(PATIENCE_S):
        assert await run_command(shell('sleep 1000 & echo $! > "$0"', str(child), timeout_s=1000.0), {}) == ""
    os.kill(int(child.read_text()), 9)


async def deleted(home: Cluster, pod: str) -> str:
    return await delete_pod(lambda: home.access, None, pod)


async def with_pod(home: Cluster, name: str) -> None:
    await home.create(
        "pods",
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name},
            "spec": {"containers": [{"name": "engine", "image": "engine"}]},
        },
    )


async def test_a_pod_is_deleted() -> None:
    """Only that one; one that is gone already is no error."""
    async with cluster() as home:
        await with_pod(home, "engine-0")
        await with_pod(home, "engine-1")
        assert await deleted(home, "engine-0") == ""
        assert [pod["metadata"]["name"] for pod in await home.list("pods")] == ["engine-1"]
        assert await deleted(home, "engine-0") == ""


@pytest.mark.parametrize(
    ("status", "words"), [(403, "a Role must allow it to delete pods there"), (500, "the API server says 500")]
)
async def test_a_pod_that_must_not_be_deleted(status: int, words: str) -> None:
    async with cluster() as home:
        await with_pod(home, "engine-0")
        home.fake.faults.append(Fault("delete", "pods", status))
        assert words in await deleted(home, "engine-0")
        assert len(await home.list("pods")) == 1


async def test_an_api_server_that_is_away() -> None:
    error = await delete_pod(lambda: Access("http://127.0.0.1:1", "lora"), None, "engine-0")
    assert "no answer from the API server" in error
