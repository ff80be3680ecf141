"""Commands before a listener that speaks TLS, and before one that does not: the error says which and what to give."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc.aio
import pytest

from tests.kit.authority import NEEDS_OPENSSL, Authority
from tests.kit.cli_runs import Ended, runner


@NEEDS_OPENSSL
async def test_tls_that_does_not_come_about(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    authority, stranger = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    for each in (authority, stranger):
        each.folder.mkdir()
        await each.found()
    key, certificate = await authority.sign("server", "DNS:sidecar.example")
    server, sidecar = grpc.aio.server(), runner(capfd)
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    secure = server.add_secure_port("127.0.0.1:0", credentials)
    bare = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def told(port: int, *options: str) -> str:
        ended: Ended = await asyncio.to_thread(sidecar, "queue", "--admin", f"127.0.0.1:{port}", *options)
        assert ended.code == 4
        return ended.err

    assert "it may speak TLS; give the CA that signed it with --ca" in await told(secure)
    assert "its certificate does not name 127.0.0.1" in await told(secure, "--ca", str(authority.ca))
    assert "the CA of --ca did not sign its certificate" in await told(secure, "--ca", str(stranger.ca))
    assert "or it does not speak TLS" in await told(bare, "--ca", str(authority.ca))
    await server.stop(None)
