"""Backends over TLS: requests, loads and looks all go by the credentials that the configuration names."""

from __future__ import annotations

from pathlib import Path

from sidecar.config import parse
from sidecar.serve.app import Sidecar
from tests.kit.authority import NEEDS_OPENSSL, Authority
from tests.kit.emulated import running_engine
from tests.kit.serving import serving, until, write_adapters

DUMMY = {"compute": "none", "shape": "tiny"}


@NEEDS_OPENSSL
async def test_an_engine_that_asks_for_a_certificate(tmp_path: Path) -> None:
    """Mutual TLS to the engine, for the serving process and for the loader process alike."""
    authority = Authority(tmp_path)
    await authority.found()
    engine_key, engine_certificate = await authority.sign("engine", "IP:127.0.0.1")
    key, certificate = await authority.sign("sidecar")
    tls = {"ca": str(authority.ca), "key": str(key), "certificate": str(certificate)}
    write_adapters(tmp_path / "loras", 1)
    async with (
        running_engine(
            **DUMMY, tls_certificate=engine_certificate, tls_key=engine_key, tls_client_ca=authority.ca
        ) as engine,
        serving([engine], tmp_path / "loras", backend={"tls": tls}) as served,
    ):
        assert (await served.ask("a00", 4)).tokens == served.expected("a00", 4)


@NEEDS_OPENSSL
async def test_without_a_certificate_the_backend_is_down_and_says_why(tmp_path: Path) -> None:
    """A plain channel to a TLS engine: the operator reads that it does not answer."""
    authority = Authority(tmp_path)
    await authority.found()
    key, certificate = await authority.sign("engine", "IP:127.0.0.1")
    free = {"address": "127.0.0.1:0"}
    async with running_engine(**DUMMY, tls_certificate=certificate, tls_key=key) as engine:
        record = {
            "backends": [{"url": f"triton://{engine.grpc_address}", "id": "tls"}],
            "listeners": {"data": free, "admin": free, "http": free},
        }
        sidecar = await Sidecar.start(parse(record, "the test"))
        try:
            await until(lambda: "does not answer" in sidecar.gateway.backends["tls"].detail())
        finally:
            await sidecar.stop()
