"""What the shell completes: commands, and names that the running sidecar knows."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sidecar.cli.endpoint import ADMIN_VARIABLE, TOKEN_FILE_VARIABLE
from sidecar.fronts.admin.auth import TokenInterceptor
from tests.kit.cli_runs import runner
from tests.kit.cli_served import serve_here

TOKEN = "s3cret"


@dataclass
class Shell:
    """Presses Tab at the end of a line, as bash does, in a process of its own."""

    address: str
    environment: dict[str, str]

    async def tab(self, *words: str) -> list[str]:
        """Return what is offered for the last word. Nothing but the offers may be printed."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sidecar"),
            env=self.environment
            | {
                "_SIDECAR_COMPLETE": "complete_bash",
                "COMP_WORDS": " ".join(("sidecar", *words)),
                "COMP_CWORD": str(len(words)),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, errors = await process.communicate()
        assert (process.returncode, errors) == (0, b"")
        return out.decode().split()


@pytest.fixture
async def shell(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> AsyncIterator[Shell]:
    """A shell whose environment says where a sidecar with two adapters is, and which token it wants."""
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    async for served in serve_here(tmp_path, runner(capfd), (TokenInterceptor(tmp_path / "token"),)):
        await served.register("sql", tmp_path)
        await served.register("support", tmp_path)
        variables = {ADMIN_VARIABLE: served.address, TOKEN_FILE_VARIABLE: str(tmp_path / "token")}
        yield Shell(served.address, {**os.environ, **variables})


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


async def test_tab_by_options_alone(shell: Shell) -> None:
    """Options say where the sidecar is as well as the environment does."""
    token_file = shell.environment.pop(TOKEN_FILE_VARIABLE)
    shell.environment.pop(ADMIN_VARIABLE)
    connection = ("--admin", shell.address, "--token-file", token_file)
    assert await shell.tab("backends", "show", *connection, "") == ["trt-0", "trt-1"]
    assert await shell.tab("backends", "show", *connection[:2], "") == []


async def test_tab_does_not_wait_for_long(shell: Shell) -> None:
    """A listener that takes connections and never answers holds the shell up for a second."""
    server = await asyncio.start_server(lambda reader, writer: asyncio.sleep(60), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, asyncio.timeout(20):
        assert await shell.tab("adapters", "show", "--admin", f"127.0.0.1:{port}", "") == []
