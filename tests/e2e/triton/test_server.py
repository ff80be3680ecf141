"""The launcher: what it starts, how that ends, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path

import pytest
from tritonclient.grpc import service_pb2

from tests.e2e.installed import ROOT, NotInstalled
from tests.e2e.processes import state_of
from tests.e2e.server import StartFailed
from tests.e2e.triton.installed import TritonInstalled
from tests.e2e.triton.repository import Repository
from tests.e2e.triton.server import TritonServer
from tests.kit.emulated import channel_to, core_request, stream_answers, tokens_of
from tests.kit.serving import until

pytestmark = pytest.mark.nightly

PLAIN = Repository(engine={"compute": "none"})


def _leftovers(server: TritonServer) -> list[str]:
    return [path.name for path in Path("/dev/shm").glob(f"{server.region_prefix}*")]


async def _answers(server: TritonServer) -> bool:
    async with channel_to(server.grpc_address) as stub:
        return bool(tokens_of(await stream_answers(stub, core_request(tokens=2, streaming=True))))


@pytest.mark.parametrize("way", ["stop", "kill"])
async def test_a_server_comes_back_on_its_ports(tmp_path: Path, way: str) -> None:
    """Stopped or killed, nothing of it stays, and it starts again where clients look for it."""
    async with TritonServer(tmp_path, PLAIN) as server:
        address, pids = server.grpc_address, [server.pid, *server.stub_pids()]
        assert len(pids) == 2
        assert _leftovers(server)
        assert await _answers(server)
        await (server.stop() if way == "stop" else server.kill())
        assert {state_of(pid) for pid in pids} <= {"X", "Z"}
        assert not _leftovers(server)
        await server.start()
        assert server.grpc_address == address
        assert await _answers(server)
    assert len(server.served) == 2


async def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    """The error has the end of the log; nothing stays."""
    server = TritonServer(tmp_path, Repository(engine={"lora_host_bytes": 1}))
    with pytest.raises(StartFailed, match="failed to load all models") as failure:
        await server.start()
    assert "Not enough space allocated to host LoRA cache" in server.log_path.read_text()
    assert "tensorrt_llm" in str(failure.value)
    assert not server.is_running
    assert not _leftovers(server)


async def test_a_port_of_somebody_else_is_not_taken_for_ours(tmp_path: Path) -> None:
    """A second server on the same ports fails, though somebody answers ready there."""
    async with TritonServer(tmp_path / "first", PLAIN) as first:
        second = TritonServer(tmp_path / "second", PLAIN)
        second.use_ports_of(first)
        with pytest.raises(StartFailed, match="already in use"):
            await second.start()
        assert await _answers(first)


async def test_frozen_it_is_silent_and_goes_on_when_thawed(tmp_path: Path) -> None:
    """The connection stays; the answer comes after the thaw."""
    async with TritonServer(tmp_path, PLAIN) as server, channel_to(server.grpc_address) as stub:
        assert await _answers(server)
        server.freeze()
        answering = asyncio.create_task(stream_answers(stub, core_request(tokens=2, streaming=True)))
        await until(lambda: {state_of(pid) for pid in (server.pid, *server.stub_pids())} == {"T"})
        assert not answering.done()
        server.thaw()
        assert tokens_of(await answering)


async def test_a_killed_stub_leaves_the_server_ready(tmp_path: Path) -> None:
    """Triton calls the model ready, and what runs stays silent; what comes next is told, and no stub is started."""
    server = TritonServer(tmp_path, Repository(engine={"compute": "none", "time_scale": 1.0}))
    async with server, channel_to(server.grpc_address) as stub:
        (pid,) = server.stub_pids("tensorrt_llm")
        call = stub.ModelStreamInfer(iter([core_request(tokens=5000, streaming=True)]))
        await call.read()
        assert server.kill_stub("tensorrt_llm") == [pid]
        await until(lambda: state_of(pid) in "XZ")
        for _ in range(2):
            (answer,) = await stream_answers(stub, core_request(tokens=1))
            assert answer.error_message == "Stub process 'tensorrt_llm_0_0' is not healthy."
        assert (await stub.ModelReady(service_pb2.ModelReadyRequest(name="tensorrt_llm"))).ready
        assert server.stub_pids() == []
        call.cancel()


async def test_nothing_outlives_tests_that_are_killed(tmp_path: Path) -> None:
    """The server is ended though nobody was left to do it."""
    code = (
        "import asyncio, pathlib, sys\n"
        "from tests.e2e.triton.server import TritonServer\n"
        "async def main():\n"
        "    server = TritonServer(pathlib.Path(sys.argv[1]))\n"
        "    await server.start()\n"
        "    print(server.pid, *server.stub_pids(), server.region_prefix, flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    tests = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, str(tmp_path), cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert tests.stdout is not None
    *pids, prefix = (await tests.stdout.readline()).decode().split()
    assert len(pids) == 2
    tests.kill()
    await tests.wait()
    await until(lambda: all(state_of(int(pid)) in "XZ" for pid in pids))
    await until(lambda: not list(Path("/dev/shm").glob(f"{prefix}*")))


def test_environments_that_give_wrong_results_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No environment, Python 3.13, no server, NumPy 2: each with its reason."""
    monkeypatch.setenv("TRITON_VENV", str(tmp_path))
    with pytest.raises(NotInstalled, match=r"make \.venv-triton"):
        TritonInstalled.find()
    packages = tmp_path / "lib" / "python3.13" / "site-packages"
    packages.mkdir(parents=True)
    with pytest.raises(NotInstalled, match=r"Python 3\.13"):
        TritonInstalled.find()
    packages = (tmp_path / "lib" / "python3.13").rename(tmp_path / "lib" / "python3.11") / "site-packages"
    with pytest.raises(NotInstalled, match="no nvidia-pytriton"):
        TritonInstalled.find()
    (packages / "pytriton" / "tritonserver" / "bin").mkdir(parents=True)
    (packages / "pytriton" / "tritonserver" / "bin" / "tritonserver").touch()
    (packages / "numpy-2.4.6.dist-info").mkdir()
    with pytest.raises(NotInstalled, match=r"NumPy 2\.4\.6"):
        TritonInstalled.find()
    (packages / "numpy-2.4.6.dist-info").rename(packages / "numpy-1.26.4.dist-info")
    assert TritonInstalled.find().venv == tmp_path


async def test_ports_are_free_after_the_end(tmp_path: Path) -> None:
    """All three can be bound at once."""
    async with TritonServer(tmp_path, PLAIN) as server:
        addresses = (server.grpc_address, server.http_address, server.metrics_address)
    for address in addresses:
        host, _, port = address.partition(":")
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((host, int(port)))
