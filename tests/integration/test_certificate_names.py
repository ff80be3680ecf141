"""The names in a client's certificate, as real servers of both protocols tell them."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest

from sidecar.access.certificates import names_of_grpc, names_of_tls, principal_of
from sidecar.access.principal import Principal, Proof
from sidecar.errors import Misused
from tests.kit.authority import NEEDS_OPENSSL, Authority

pytestmark = NEEDS_OPENSSL
CLIENT = "spiffe://cluster.local/ns/acme/sa/client"
OTHER = "spiffe://cluster.local/ns/globex/sa/client"
PATTERN = "spiffe://cluster.local/ns/{tenant}/sa/*"
NAMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "spiffe": (f"URI:{CLIENT}", (CLIENT,)),
    "mixed": (f"DNS:lyft.com,URI:{CLIENT},DNS:www.lyft.com", ("lyft.com", CLIENT, "www.lyft.com")),
    "hosts": ("DNS:b.acme.com,DNS:a.acme.com", ("b.acme.com", "a.acme.com")),
    "web": ("URI:https://acme.com/x,DNS:acme.com", ("https://acme.com/x", "acme.com")),
    "mail": ("email:zoe@acme.com", ("zoe@acme.com",)),
    "common": ("", ("common",)),
    "several": (f"URI:{CLIENT},URI:{OTHER}", (CLIENT, OTHER)),
}


@asynccontextmanager
async def tls_server(authority: Authority) -> AsyncIterator[tuple[int, list[tuple[str, ...]]]]:
    """Serve TLS and note the names of each client."""
    seen: list[tuple[str, ...]] = []
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority.ca)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.load_cert_chain(authority.folder / "localhost.pem", authority.folder / "localhost.key")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(names_of_tls(writer.get_extra_info("ssl_object").getpeercert()))
        writer.write(b"seen")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1], seen


@asynccontextmanager
async def grpc_server(authority: Authority, *, ask: bool = True) -> AsyncIterator[tuple[int, list[tuple[str, ...]]]]:
    """Serve gRPC and note the names of each client; its certificate is wanted if `ask`."""
    seen: list[tuple[str, ...]] = []

    async def call(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        seen.append(names_of_grpc(context.auth_context()))
        return request

    handler = grpc.unary_unary_rpc_method_handler(call)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", {"Call": handler}),))
    pair = tuple((authority.folder / f"localhost.{end}").read_bytes() for end in ("key", "pem"))
    credentials = grpc.ssl_server_credentials([pair], authority.ca.read_bytes() if ask else None, ask)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield port, seen
    finally:
        await server.stop(None)


async def ask_tls(authority: Authority, port: int, name: str | None) -> None:
    context = ssl.create_default_context(cafile=authority.ca)
    if name is not None:
        context.load_cert_chain(authority.folder / f"{name}.pem", authority.folder / f"{name}.key")
    reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
    assert await reader.read() == b"seen"
    writer.close()


async def ask_grpc(authority: Authority, port: int, name: str | None) -> None:
    pair = [None if name is None else (authority.folder / f"{name}.{end}").read_bytes() for end in ("key", "pem")]
    credentials = grpc.ssl_channel_credentials(authority.ca.read_bytes(), *pair)
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
        assert await channel.unary_unary("/test.Test/Call")(b"x", timeout=60) == b"x"


async def test_both_protocols_tell_the_same_names_in_the_same_order(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    await authority.found()
    await authority.sign("localhost", "DNS:localhost")
    async with tls_server(authority) as (tls_port, by_tls), grpc_server(authority) as (grpc_port, by_grpc):
        for name, (alternative, names) in NAMES.items():
            await authority.sign(name, alternative)
            await ask_tls(authority, tls_port, name)
            await ask_grpc(authority, grpc_port, name)
            assert by_tls[-1] == by_grpc[-1] == names


async def test_who_shows_no_certificate_has_no_name(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    await authority.found()
    await authority.sign("localhost", "DNS:localhost")
    async with tls_server(authority) as (tls_port, by_tls), grpc_server(authority, ask=False) as (grpc_port, by_grpc):
        await ask_tls(authority, tls_port, None)
        await ask_grpc(authority, grpc_port, None)
    assert by_tls == by_grpc == [()]


def test_the_tenant_comes_out_of_the_spiffe_id_or_else_the_first_name() -> None:
    for names in ((CLIENT, "lyft.com"), ("lyft.com", CLIENT), (CLIENT,)):
        found = principal_of(names, PATTERN, Proof.CERTIFICATE)
        assert found == Principal(tenant="acme", proof=Proof.CERTIFICATE, subject=CLIENT)
    assert principal_of(("b.acme.com", "a.acme.com"), None, Proof.CERTIFICATE).tenant == "b.acme.com"
    assert principal_of(("acme",), None, Proof.FORWARDED).tenant == "acme"
    assert (
        principal_of(("acme.clients.example.com",), "{tenant}.clients.example.com", Proof.CERTIFICATE).tenant == "acme"
    )


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("lyft.com",),
        ("spiffe://cluster.local/ns//sa/client",),
        ("spiffe://cluster.local/ns/acme/sa/client/more",),
        ("spiffe://cluster.local/ns/acme/other/sa/client",),
        ("xspiffe://cluster.local/ns/acme/sa/client",),
        ("spiffe://cluster-local/ns/acme/sa/client",),
        ("SPIFFE://cluster.local/ns/acme/sa/client",),
        ("spiffe://cluster.local/ns/acme\n/sa/client",),
        ("spiffe://cluster.local/ns/acme/sa/cli\x00ent",),
        (f"spiffe://cluster.local/ns/acme/sa/{'x' * 600}",),
        (CLIENT, OTHER),
        ("lyft.com", CLIENT, "www.lyft.com", OTHER),
    ],
)
def test_a_name_beside_the_pattern_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(Misused, match="the client's certificate is refused") as caught:
        principal_of(names, PATTERN, Proof.CERTIFICATE)
    assert caught.value.message.isprintable()
