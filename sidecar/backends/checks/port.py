"""Find out what answers at an address instead of the engine (nothing, another port, another engine, TLS or none), and
how long a server's certificate is valid.

Each result is for people: what was found, and the line to change.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sidecar.backends.checks.finding import Finding, Target, ok, warning
from sidecar.backends.credentials import tls_context
from sidecar.backends.http_client import HttpClient, Reply, WireError

CONNECT_S = 3.0
EXPIRES_SOON_DAYS = 14
GRPC_PORT, METRICS_PORT = 8001, 8002
"""Triton's default ports."""
GRPC, HTTP = "h2", "http/1.1"
"""Protocol names of TLS (ALPN)."""
TRITON = ("triton", "tritonserver --grpc-address=0.0.0.0 --grpc-port={port}   (docker run -p {port}:{port})")
"""The scheme of a URL, and the command that makes an engine listen there."""


def host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


async def what_answers(address: str, tls: Mapping[str, str] | None) -> tuple[str, str] | None:
    """Return what prevents gRPC at an address, and the line to change; None if nothing was found."""
    found = await no_connection(address, TRITON)
    if found is not None:
        return found
    return await (_without_tls(address) if tls is None else with_tls(address, tls, GRPC, "triton"))


async def no_connection(address: str, listen: tuple[str, str]) -> tuple[str, str] | None:
    """Return why no connection to an address can be opened, and the line to change; None if one can.

    `listen` is the scheme of a URL, and the command that makes an engine listen there.
    """
    host, port = host_and_port(address)
    scheme, command = listen
    try:
        async with asyncio.timeout(CONNECT_S):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return (
            f"{host}:{port} does not take connections within {CONNECT_S:g} s",
            "open the port in the firewall or network policy between this machine and the engine's, or set url right",
        )
    except socket.gaierror as error:
        return f'there is no host "{host}" ({error.strerror})', f"config.yaml: url: {scheme}://HOST:{port}"
    except OSError as error:
        return (
            f"nothing listens at {host}:{port} ({os.strerror(error.errno) if error.errno else error})",
            command.format(port=port),
        )
    writer.close()
    return None


async def _without_tls(address: str) -> tuple[str, str] | None:
    host = address.rpartition(":")[0]
    right = f"config.yaml: url: triton://{host}:{GRPC_PORT}   (the port of --grpc-port, by default {GRPC_PORT})"
    async with HttpClient(address) as client:
        server = await _get(client, "/v2")
        if server is not None and _is_triton(server):
            return f"{address} is Triton's HTTP port, and gRPC is spoken to the engine", right
        metrics = None if server is None else await _get(client, "/metrics")
        if metrics is not None and "# TYPE nv_" in metrics.text:
            return f"{address} is Triton's metrics port, and gRPC is spoken to the engine", right
        if metrics is not None and "vllm:" in metrics.text:
            return f"{address} is a vLLM's, and is looked at as a Triton", f"config.yaml: url: vllm://{address}"
    if server is not None:
        return f"{address} is an HTTP server (it answers {server.status} to /v2), not Triton's gRPC port", right
    return await unasked_tls(address, GRPC, "triton")


async def triton_instead(client: HttpClient, address: str, title: str) -> tuple[str, str] | None:
    """Describe a Triton where another server is expected, with the line to change; None if it is none."""
    host = address.rpartition(":")[0]
    triton = f"config.yaml: url: triton://{host}:{GRPC_PORT}   (the port of --grpc-port, by default {GRPC_PORT})"
    server, metrics = await _get(client, "/v2"), await _get(client, "/metrics")
    if server is not None and _is_triton(server):
        return f"{address} is Triton's HTTP port, and is looked at as a {title}", triton
    if metrics is not None and "# TYPE nv_" in metrics.text:
        return f"{address} is Triton's metrics port, and is looked at as a {title}", triton
    return None


async def unasked_tls(address: str, protocol: str, scheme: str) -> tuple[str, str] | None:
    """Describe a server that speaks TLS although none is configured; None if it does not."""
    if await _handshake(address, _unverified(protocol), waits=False) is not None:
        return None
    by_url = "" if protocol == GRPC else f", or url: {scheme}s://{address} where this machine knows that CA"
    return (
        f"{address} speaks TLS, and no TLS is configured for this backend",
        f"config.yaml: tls: {{ca: PEM file of the CA that signed the server's certificate}}{by_url}",
    )


async def with_tls(address: str, tls: Mapping[str, str], protocol: str, scheme: str) -> tuple[str, str] | None:
    """Return what is wrong with TLS at an address, and the line to change; None if nothing is."""
    problem = await _handshake(address, tls_context(tls, protocol))
    if isinstance(problem, ssl.SSLCertVerificationError):
        against = tls.get("ca") or "this machine's own CAs"
        return (
            f"its certificate is not accepted: {problem.verify_message} (checked against {against})",
            "config.yaml: tls: {ca: PEM file of the CA that signed it}, and a url with a name that the certificate has",
        )
    if problem is None or isinstance(problem, TimeoutError):
        return None
    if isinstance(problem, ConnectionResetError) or "ALERT" in str(problem):
        given = "the one that is configured is not accepted" if "certificate" in tls else "none is configured"
        return (
            f"its certificate is accepted, and it wants one of ours that its CA signed: {given}",
            "config.yaml: tls: {ca: …, certificate: PEM file of ours, key: PEM file of its key}",
        )
    return (
        f"{address} does not speak TLS ({_describe(problem)})",
        f"config.yaml: take tls out of this backend's entry{'' if protocol == GRPC else f', and url: {scheme}://'}",
    )


def _describe(problem: Exception) -> str:
    reason = getattr(problem, "reason", None) or str(problem) or type(problem).__name__
    return str(reason).lower().replace("_", " ")


def _unverified(protocol: str) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([protocol])
    return context


async def _handshake(address: str, context: ssl.SSLContext, waits: bool = True) -> Exception | None:
    """Shake hands and wait for a gRPC server's first bytes; return what went wrong.

    With TLS 1.3 only these tell a client that its certificate is missing or refused. An HTTP server sends nothing
    first, so waiting for it ends with TimeoutError.
    """
    host, port = host_and_port(address)
    try:
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=host)
            try:
                if waits and not await reader.read(1):
                    return ConnectionResetError("it ends the connection")
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        return error
    return None


async def _get(client: HttpClient, path: str) -> Reply | None:
    try:
        return await client.get(path, CONNECT_S)
    except WireError:
        return None


def _is_triton(reply: Reply) -> bool:
    try:
        record = reply.json()
    except ValueError:
        return False
    return isinstance(record, dict) and record.get("name") == "triton"


async def certificate_of(target: Target, protocol: str) -> Finding:
    """Check the certificate of a server that speaks this protocol."""
    tls = target.tls
    if tls is None:
        return ok("none, as configured: whoever sees the network sees prompts")
    host, port = host_and_port(target.address)
    try:
        async with asyncio.timeout(CONNECT_S):
            _, writer = await asyncio.open_connection(host, port, ssl=tls_context(tls, protocol), server_hostname=host)
    except (OSError, TimeoutError) as error:
        return warning(f"in use, but the server's certificate could not be looked at: {error or 'no answer in time'}")
    certificate = writer.get_extra_info("peercert")
    version = writer.get_extra_info("ssl_object").version()
    writer.close()
    return certificate_finding(certificate, version, "certificate" in tls, datetime.now(UTC))


def certificate_finding(certificate: Any, version: str, ours_too: bool, now: datetime) -> Finding:
    """Judge a server's certificate in the form of Python's ssl."""
    ends = datetime.fromtimestamp(ssl.cert_time_to_seconds(certificate["notAfter"]), UTC)
    days = (ends - now).days
    text = f"{version}{', with a certificate of ours' if ours_too else ''}; the server's is valid until {ends:%Y-%m-%d}"
    if days < EXPIRES_SOON_DAYS:
        return warning(f"{text}, {days} more days", "renew the server's certificate before then")
    return ok(text)
