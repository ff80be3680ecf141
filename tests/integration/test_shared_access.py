"""A Redis that is not ours to use: another schema, a wrong password, another authority. The right ones are let in."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sidecar.errors import Misused, Reason
from tests.kit.authority import NEEDS_OPENSSL, Authority
from tests.kit.redis_servers import Server, running
from tests.kit.registries import record, shared_registry

META = "{lora-sidecar}:meta"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with running(tmp_path / "server") as server:
        yield server


async def test_another_schema_is_refused(server: Server) -> None:
    """Neither a newer nor an older state is touched; the message says which it is and the way out."""
    async with server.client() as client:
        for schema in ("0", "2"):
            await client.hset(META, "schema", schema)
            with pytest.raises(Misused, match=f"has schema {schema} and this sidecar works with schema 1") as caught:
                async with shared_registry(server.url):
                    pass
            assert caught.value.reason is Reason.STATE_INCOMPATIBLE
            assert await client.hgetall(META) == {"schema": schema}


async def test_passwords_are_read_from_a_file_or_a_pipe_and_never_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A user of an access list with the right password is let in; with a wrong one it is told, not the password."""
    rules = ("--user", "sidecar", "on", ">right-s3cret", "~{lora-sidecar}:*", "+@all", "--user", "default", "off")
    password = tmp_path / "password"
    async with running(tmp_path / "server", "redis-server", *rules) as server:
        url = server.url.replace("://", "://sidecar@")
        password.write_text("wrong-s3cret\n")
        with pytest.raises(Misused, match="rejects the connection") as caught:
            async with shared_registry(url, password_file=password):
                pass
        assert caught.value.reason is Reason.CONFIG_INVALID
        assert "s3cret" not in caught.value.message
        password.write_text("right-s3cret\n")
        async with shared_registry(url, password_file=password) as registry:
            await registry.put(record("a"), None)
        reading, writing = os.pipe()  # as a shell does for <(…)
        os.write(writing, b"right-s3cret\n")
        os.close(writing)
        piped = Path(f"/dev/fd/{reading}")
        async with shared_registry(url, password_file=piped), shared_registry(url, password_file=piped) as registry:
            await registry.put(record("b"), None)
        os.close(reading)
        assert "redis.credentials" not in {each.name for each in caplog.records}


@NEEDS_OPENSSL
async def test_tls(tmp_path: Path) -> None:
    """With our certificate and the server's authority we are let in; a server of another authority is refused."""
    authority, other = Authority(tmp_path / "ca"), Authority(tmp_path / "other")
    for each in (authority, other):
        each.folder.mkdir()
        await each.found()
    key, certificate = await authority.sign("server", "IP:127.0.0.1")
    files = ("--tls-key-file", str(key), "--tls-cert-file", str(certificate), "--tls-ca-cert-file", str(authority.ca))
    our_key, our_certificate = await authority.sign("sidecar")
    ours = {"certificate": our_certificate, "key": our_key}
    async with running(tmp_path / "server", "redis-server", "--port", "0", "--tls-port", "PORT", *files) as server:
        url = server.url.replace("redis://", "rediss://")
        async with shared_registry(url, ca=authority.ca, **ours) as registry:
            await registry.put(record("a"), None)
        with pytest.raises(Misused, match="rejects the connection"):
            async with shared_registry(url, ca=other.ca, **ours):
                pass
