"""What the shell completes: commands, and names that the running sidecar knows."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sidecar.cli import run
from sidecar.cli.endpoint import ADMIN_VARIABLE, TOKEN_FILE_VARIABLE
from sidecar.fronts.admin.auth import TokenInterceptor
from tests.kit.cli_runs import runner
from tests.kit.cli_served import serve_here
from tests.kit.forked import python

TOKEN = "s3cret"


@dataclass
class Shell:
    """Presses Tab at the end of a line, as bash does."""

    address: str
    monkeypatch: pytest.MonkeyPatch
    capfd: pytest.CaptureFixture[str]

    async def tab(self, *words: str) -> list[str]:
        """Return what is offered for the last word, here and now. Nothing but the offers may be printed."""
        for name, value in line(words).items():
            self.monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit, match="0"):
            await asyncio.to_thread(run, [])
        captured = self.capfd.readouterr()
        assert captured.err == ""
        return captured.out.split()


def line(words: tuple[str, ...]) -> dict[str, str]:
    """Return what bash says of a line."""
    return {
        "_SIDECAR_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(("sidecar", *words)),
        "COMP_CWORD": str(len(words)),
    }


@pytest.fixture
async def shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> AsyncIterator[Shell]:
    """A shell whose environment says where a sidecar with two adapters is, and which token it wants."""
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    async for served in serve_here(tmp_path, runner(capfd), (TokenInterceptor(tmp_path / "token"),)):
        await served.register("sql", tmp_path)
        await served.register("support", tmp_path)
        monkeypatch.setenv(ADMIN_VARIABLE, served.address)
        monkeypatch.setenv(TOKEN_FILE_VARIABLE, str(tmp_path / "token"))
        monkeypatch.setenv("GRPC_VERBOSITY", "ERROR")
        yield Shell(served.address, monkeypatch, capfd)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("adapters", "pr"), ["promote", "prefetch"]),
        (("adapters", "un"), ["unregister", "unpin"]),
        (("adapters", "show", ""), ["sql", "support"]),
        (("adapters", "evict", "su"), ["support"]),
        (("adapters", "promote", "sql@"), ["sql@v1"]),
        (("adapters", "prefetch", "sql", "--backend", ""), ["trt-0", "trt-1"]),
        (("adapters", "verify", "sql", "--backend", "x"), []),
        (("backends", "drain", "trt"), ["trt-0", "trt-1"]),
        (("queue", "--adapter", "s"), ["sql", "support"]),
        (("queue", "--backend", "trt-1"), ["trt-1"]),
        (("generate", ""), ["sql", "support", "base"]),
        (("adapters", "show", "--admin", "127.0.0.1:1", ""), []),
        (("adapters", "show", "--token-file", "/nowhere", ""), []),
    ],
    ids=" ".join,
)
async def test_tab_offers_names(words: tuple[str, ...], offered: list[str], shell: Shell) -> None:
    """Where a name is wanted those of the running sidecar are offered; without an answer none are, silently."""
    assert await shell.tab(*words) == offered


async def test_tab_by_options_alone(shell: Shell, tmp_path: Path) -> None:
    """Options say where the sidecar is as well as the environment does."""
    shell.monkeypatch.delenv(TOKEN_FILE_VARIABLE)
    shell.monkeypatch.delenv(ADMIN_VARIABLE)
    connection = ("--admin", shell.address, "--token-file", str(tmp_path / "token"))
    assert await shell.tab("backends", "show", *connection, "") == ["trt-0", "trt-1"]
    assert await shell.tab("backends", "show", *connection[:2], "") == []


@pytest.mark.parametrize(("port", "offered"), [(None, b"sql\nsupport\n"), (1, b"\n")], ids=["there", "nobody"])
async def test_a_process_prints_the_offers_alone(port: int | None, offered: bytes, shell: Shell) -> None:
    """What a real shell gets: neither gRPC nor Python says anything beside the offers."""
    address = shell.address if port is None else f"127.0.0.1:{port}"
    process = await python(
        "-m",
        "sidecar",
        env={**os.environ, **line(("adapters", "show", "--admin", address, ""))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert await process.communicate() == (offered, b"")
    assert process.returncode == 0


async def test_tab_does_not_wait_for_long(shell: Shell) -> None:
    """A listener that takes connections and never answers holds the shell up for a second."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with asyncio.timeout(20):
            assert await shell.tab("adapters", "show", "--admin", f"127.0.0.1:{silent.getsockname()[1]}", "") == []
