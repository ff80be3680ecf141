"""What the shell completes: commands, and names that the running sidecar knows."""

from __future__ import annotations

import asyncio
import os
import pty
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from sidecar.cli import run
from sidecar.cli.listener import ADMIN_VARIABLE, TOKEN_FILE_VARIABLE
from tests.kit.cli_runs import runner
from tests.kit.cli_served import serve_here
from tests.kit.forked import ROOT, python

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
        "COMP_WORDS": "\n".join(("sidecar", *words)),
        "COMP_CWORD": str(len(words)),
    }


@pytest.fixture
async def shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> AsyncIterator[Shell]:
    """A shell whose environment says where a sidecar with two adapters is, and which token it wants."""
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    async for served in serve_here(tmp_path, runner(capfd), tmp_path / "token"):
        await served.register("sql", tmp_path)
        await served.register("support", tmp_path)
        monkeypatch.setenv(ADMIN_VARIABLE, served.address)
        monkeypatch.setenv(TOKEN_FILE_VARIABLE, str(tmp_path / "token"))
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
        (("adapters", "show", "--admin", "", ""), []),
        (("adapters", "show", "--admin", "127.0.0.1", ":", "1", ""), []),
        (("queue", "--adapter", "="), ["sql", "support"]),
        (("queue", "--adapter", "=", "s"), ["sql", "support"]),
        (("adapters", "promote", "sql", "@"), ["@v1"]),
        (("adapters", "promote", "sql", "@", "v"), ["@v1"]),
        (("adapters", "promote", "sql", "@", ""), []),
        (("adapters", "prefetch", "sql", "@", "v1", "--backend", ""), ["trt-0", "trt-1"]),
        (("adapters", "prefetch", "sql", "@", "v1", "--backend", "=", "trt-1"), ["trt-1"]),
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


SIDECAR = """\
#!/bin/sh
test -n "$_SIDECAR_COMPLETE$SAY" && exec {python} -m sidecar "$@"
printf '%s\\n' "$@" > ran
"""
"""A `sidecar` that completes, and that writes its arguments down when the line is run."""
TABS_MAX = 10
"""On a busy machine a Tab may get no answer within its second."""


@pytest.mark.parametrize(
    ("typed", "ran"),
    [
        ("backends show 127.0.0.1:19", "backends show 127.0.0.1:19000"),
        ("backends show 127.0.0.1:", "backends show 127.0.0.1:19000"),
        ("backends show 12", "backends show 127.0.0.1:19000"),
        ("backends show '127.0.0.1:1", "backends show 127.0.0.1:19000"),
        ("queue --backend=127.0.0.1:19", "queue --backend=127.0.0.1:19000"),
        ("queue --backend 127.0.0.1:19", "queue --backend 127.0.0.1:19000"),
        ("generate sql@", "generate sql@v1"),
        ("generate sql@v", "generate sql@v1"),
        ("generate sq", "generate sql"),
        ("adapters prefetch sql@v1 --backend 127.0.0.1:19", "adapters prefetch sql@v1 --backend 127.0.0.1:19000"),
    ],
)
async def test_tab_in_a_real_bash(
    typed: str, ran: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What bash runs after Tab and Enter, although it breaks words at ":", "@" and "="."""
    program = tmp_path / "sidecar"
    program.write_text(SIDECAR.format(python=sys.executable))
    program.chmod(0o755)
    (tmp_path / "rc").write_text('PS1="ready> "\neval "$(SAY=1 sidecar --show-completion bash)"\n')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    async for served in serve_here(tmp_path, runner(capfd), ids=("127.0.0.1:19000", "10.0.0.1:19000")):
        await served.register("sql", tmp_path)
        monkeypatch.setenv(ADMIN_VARIABLE, served.address)
        for _ in range(TABS_MAX):
            await asyncio.to_thread(in_bash, f"sidecar {typed}\t\nexit\n", tmp_path)
            if (tmp_path / "ran").read_text().split() == ran.split():
                break
    assert (tmp_path / "ran").read_text().split() == ran.split()


def in_bash(keys: str, folder: Path) -> None:
    """Press keys in an interactive bash that has read `folder`'s rc, and wait for its end."""
    ours, its = pty.openpty()
    environment = os.environ | {"TERM": "dumb", "INPUTRC": os.devnull, "HISTFILE": "", "PYTHONPATH": str(ROOT)}
    streams = {"stdin": its, "stdout": its, "stderr": its}
    with subprocess.Popen(
        ["bash", "--rcfile", "rc", "-i"], cwd=folder, env=environment, start_new_session=True, **streams
    ) as bash:
        os.close(its)
        shown = b""
        while b"ready> " not in shown:
            shown += os.read(ours, 4096)
        os.write(ours, keys.encode())
        with suppress(OSError):  # the end of bash
            while os.read(ours, 4096):
                pass
        os.close(ours)
        bash.wait(20)


@pytest.mark.parametrize(
    ("port", "options", "offered"),
    [
        (None, (), b"sql\nsupport\n"),
        (1, (), b"\n"),
        (1, ("--ca", "/etc/hostname"), b"\n"),
        (None, ("--ca", "/etc/hostname"), b"\n"),
    ],
    ids=["there", "nobody", "nobody, no CA", "no CA"],
)
async def test_a_process_prints_the_offers_alone(
    port: int | None, options: tuple[str, ...], offered: bytes, shell: Shell
) -> None:
    """What a real shell gets: neither gRPC nor Python says anything beside the offers."""
    address = shell.address if port is None else f"127.0.0.1:{port}"
    process = await python(
        "-m",
        "sidecar",
        env={**os.environ, **line(("adapters", "show", "--admin", address, *options, ""))},
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
