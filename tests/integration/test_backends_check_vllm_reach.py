"""What `sidecar backends check vllm://…` finds where no vLLM, or not the right port, answers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from sidecar.backends.checking import names_of
from sidecar.backends.checks.finding import State, Target
from sidecar.core.facts import EngineFacts
from tests.kit.authority import NEEDS_OPENSSL, Authority
from tests.kit.emulated import running_engine
from tests.kit.looking import DUMMY, http_server, look, look_at_vllm, vllm_and_target, worse
from tests.kit.ports import free_port
from tests.kit.vllm_emulated import Client, VllmProcess


def target_at(address: str) -> Target:
    return Target("vllm-0", address, facts=EngineFacts(kind="vllm", reads_files=True))


async def test_a_port_where_nobody_listens() -> None:
    """One failure, its cause and what would listen there; everything else is skipped because of it."""
    found = await look_at_vllm(target_at(f"127.0.0.1:{free_port()}"))
    assert "nothing listens" in found["reachable"].text
    assert "vllm serve … --host 0.0.0.0" in found["reachable"].fix
    assert worse(found) == dict.fromkeys(names_of("vllm"), State.SKIPPED) | {"reachable": State.FAILED}


async def test_a_host_that_does_not_exist() -> None:
    """The name is what is wrong."""
    found = await look_at_vllm(target_at("no-such-host.invalid:8000"))
    assert 'no host "no-such-host.invalid"' in found["reachable"].text
    assert "url: vllm://HOST:8000" in found["reachable"].fix


@pytest.mark.parametrize(
    ("body", "words", "fix"),
    [
        (b'{"name":"triton","version":"","extensions":[]}', "is Triton's HTTP port", "triton://127.0.0.1:8001"),
        (b"# TYPE nv_inference_count counter\n", "is Triton's metrics port", "triton://127.0.0.1:8001"),
        (b"<html></html>", "answers 200 to /version: no vLLM", "vllm://HOST:PORT"),
        (b"[]", "answers 200 to /version: no vLLM", "vllm://HOST:PORT"),
    ],
)
async def test_another_http_server(body: bytes, words: str, fix: str) -> None:
    """Triton's ports are told apart from what is neither, and its right one is named."""
    async with http_server(body) as port:
        found = await look_at_vllm(target_at(f"127.0.0.1:{port}"))
        assert words in found["reachable"].text
        assert fix in found["reachable"].fix


async def test_tritons_grpc_port() -> None:
    """It does not answer HTTP, and says by gRPC who it is."""
    async with running_engine(**DUMMY) as engine:
        found = await look_at_vllm(target_at(engine.grpc_address))
        assert "is Triton's gRPC port" in found["reachable"].text
        assert f"url: triton://{engine.grpc_address}" in found["reachable"].fix


async def test_a_vllm_that_is_taken_for_a_triton(tmp_path: Path) -> None:
    """The other way round: the scheme of the URL is what is wrong."""
    async with vllm_and_target(tmp_path) as engine:
        found = await look(Target("trt-0", engine.target.address))
        assert "is a vLLM's, and is looked at as a Triton" in found["reachable"].text
        assert f"url: vllm://{engine.target.address}" in found["reachable"].fix


async def test_a_port_that_hangs_up() -> None:
    """Something listens and speaks nothing that is known."""
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        found = await look_at_vllm(target_at(f"127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        assert "takes connections and does not answer HTTP" in found["reachable"].text


@NEEDS_OPENSSL
async def test_tls(tmp_path: Path) -> None:
    """Each way in which TLS can be wrong is told from the others; when it is right an adapter is loaded through it."""
    authority = Authority(tmp_path)
    await authority.found()
    engine_key, engine_certificate = await authority.sign("engine", "IP:127.0.0.1")
    key, certificate = await authority.sign("sidecar")
    ours = {"ca": str(authority.ca), "key": str(key), "certificate": str(certificate)}
    files = {"tls_certificate": engine_certificate, "tls_key": engine_key}

    async with vllm_and_target(tmp_path, **files, tls_client_ca=authority.ca) as engine:
        found = await look_at_vllm(replace(engine.target, tls=ours))
        assert worse(found) == {"TLS": State.WARNING}  # the test's certificates are short-lived
        assert "with a certificate of ours" in found["TLS"].text
        unasked = await look_at_vllm(replace(engine.target, tls={"ca": ours["ca"]}))
        assert "it wants one of ours that its CA signed: none is configured" in unasked["reachable"].text
    async with vllm_and_target(tmp_path, **files) as engine:
        plain = await look_at_vllm(engine.target)
        assert "speaks TLS, and no TLS is configured" in plain["reachable"].text
        assert f"url: vllms://{engine.target.address}" in plain["reachable"].fix
        unknown = await look_at_vllm(replace(engine.target, tls={}))
        assert "its certificate is not accepted" in unknown["reachable"].text
        assert "this machine's own CAs" in unknown["reachable"].text
    async with vllm_and_target(tmp_path) as engine:
        plaintext = await look_at_vllm(replace(engine.target, tls={"ca": ours["ca"]}))
        assert "does not speak TLS" in plaintext["reachable"].text
        assert "take tls out" in plaintext["reachable"].fix


async def test_an_engine_that_dies_during_the_check(tmp_path: Path) -> None:
    """What it knew went with it, so the files go too."""
    async with vllm_and_target(tmp_path) as other, VllmProcess("--compute", "none", "--freeze-after", "2") as engine:
        looking = asyncio.create_task(look_at_vllm(replace(other.target, address=engine.http_address)))
        async with Client(engine.http_address) as client:
            while len(await client.models()) < 2:
                assert not looking.done()
        await engine.kill()
        found = await looking
        assert found["adapter"].state is State.FAILED
        assert "the server does not answer it" in found["adapter"].text
        assert list(other.shared.iterdir()) == []
