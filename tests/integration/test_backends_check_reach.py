"""What `sidecar backends check` finds where no engine, or not the right one, answers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from sidecar.backends.checks.finding import State, Target
from tests.kit.authority import NEEDS_OPENSSL, Authority
from tests.kit.looking import OF_TRITON, engine_and_target, http_server, look, worse
from tests.kit.ports import free_port


async def test_an_unknown_model(tmp_path: Path) -> None:
    """The others are listed and the nearest proposed; what rests on the model is skipped and says so."""
    async with engine_and_target(tmp_path) as (_, target):
        found = await look(replace(target, model="tensorrt_lm"))
        assert found["model"].state is State.FAILED
        assert "there are ensemble, postprocessing, preprocessing, tensorrt_llm" in found["model"].text
        assert "--model tensorrt_llm" in found["model"].fix
        assert found["unknown id"].text == 'not looked at, because of "model"'
        assert found["metrics"].state is not State.SKIPPED


async def test_the_text_model_is_not_the_one_to_load_through(tmp_path: Path) -> None:
    """`ensemble` has LoRA inputs too, and loads go to the core model."""
    async with engine_and_target(tmp_path) as (_, target):
        found = await look(replace(target, model="ensemble"))
        assert found["kind"].state is State.FAILED
        assert "model: tensorrt_llm" in found["kind"].fix


async def test_a_port_where_nobody_listens() -> None:
    """One failure, its cause, and everything else skipped because of it."""
    found = await look(Target("dead", f"127.0.0.1:{free_port()}"))
    assert "nothing listens" in found["reachable"].text
    assert worse(found) == dict.fromkeys(OF_TRITON, State.SKIPPED) | {"reachable": State.FAILED}


async def test_a_host_that_does_not_exist() -> None:
    """The name is what is wrong, not the port."""
    found = await look(Target("nowhere", "no-such-host.invalid:8001"))
    assert 'no host "no-such-host.invalid"' in found["reachable"].text


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"name":"triton","version":"2.51.0","extensions":[]}', "is Triton's HTTP port"),
        (b"# TYPE nv_inference_count counter\n", "is Triton's metrics port"),
        (b"<html></html>", "is an HTTP server"),
    ],
)
async def test_a_port_that_speaks_http(body: bytes, words: str) -> None:
    """The usual mistakes are told apart, and the right port is named."""
    async with http_server(body) as port:
        found = await look(Target("http", f"127.0.0.1:{port}"))
        assert words in found["reachable"].text
        assert "url: triton://127.0.0.1:8001" in found["reachable"].fix


async def test_a_port_that_hangs_up() -> None:
    """Something listens and speaks nothing that is known."""
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        found = await look(Target("mute", f"127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        assert "takes connections and does not answer gRPC" in found["reachable"].text


async def test_a_grpc_server_that_is_not_triton() -> None:
    """It answers gRPC and does not know KServe."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        found = await look(Target("other", f"127.0.0.1:{port}"))
        assert "a gRPC server, but not Triton" in found["reachable"].text
    finally:
        await server.stop(None)


@NEEDS_OPENSSL
async def test_tls(tmp_path: Path) -> None:
    """Each way in which TLS can be wrong is told from the others; when it is right its certificate is looked at."""
    authority = Authority(tmp_path)
    await authority.found()
    engine_key, engine_certificate = await authority.sign("engine", "IP:127.0.0.1")
    key, certificate = await authority.sign("sidecar")
    (tmp_path / "stranger").mkdir()
    stranger = Authority(tmp_path / "stranger")
    await stranger.found()
    ours = {"ca": str(authority.ca), "key": str(key), "certificate": str(certificate)}
    files = {"tls_certificate": engine_certificate, "tls_key": engine_key}

    async with engine_and_target(tmp_path, **files, tls_client_ca=authority.ca) as (_, target):
        found = await look(replace(target, tls=ours))
        assert worse(found) == {"TLS": State.WARNING}  # the test's certificates are short-lived
        assert "with a certificate of ours" in found["TLS"].text
        unasked = await look(replace(target, tls={"ca": ours["ca"]}))
        assert "it wants one of ours that its CA signed: none is configured" in unasked["reachable"].text
    async with engine_and_target(tmp_path, **files) as (_, target):
        plain = await look(target)
        assert "speaks TLS, and no TLS is configured" in plain["reachable"].text
        assert "tls: {ca:" in plain["reachable"].fix
        pinned = await look(replace(target, tls={"ca": str(engine_certificate)}))
        assert worse(pinned) == {"TLS": State.WARNING}  # gRPC takes the server's own certificate for a CA
        wrong = await look(replace(target, tls={"ca": str(stranger.ca)}))
        assert "its certificate is not accepted" in wrong["reachable"].text
    async with engine_and_target(tmp_path) as (_, target):
        plaintext = await look(replace(target, tls={"ca": ours["ca"]}))
        assert "does not speak TLS" in plaintext["reachable"].text
        assert "take tls out" in plaintext["reachable"].fix
