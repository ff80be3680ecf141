"""What answers at an address that does not answer as Triton's gRPC: nobody, its HTTP or metrics port, TLS, or none.

Each answer is for people: what is there, and the line to change.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Mapping

import httpx

from sidecar.errors import Misused, Reason

CONNECT_S = 3.0
GRPC_PORT, HTTP_PORT, METRICS_PORT = 8001, 8000, 8002
"""Triton's defaults."""


def host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


async def what_answers(address: str, tls: Mapping[str, str] | None) -> tuple[str, str] | None:
    """Return what stands in the way of gRPC at an address, and the line that would change it; None if nothing does."""
    host, port = host_and_port(address)
    nobody = await _nobody(host, port)
    if nobody is not None:
        return nobody
    return await (_without_tls(address) if tls is None else _with_tls(address, tls))


async def _nobody(host: str, port: int) -> tuple[str, str] | None:
    try:
        async with asyncio.timeout(CONNECT_S):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return (
            f"{host}:{port} does not take connections within {CONNECT_S:g} s",
            "open the port in the firewall or network policy between this machine and the engine's, or set url right",
        )
    except socket.gaierror as error:
        return f'there is no host "{host}" ({error.strerror})', f"config.yaml: url: triton://HOST:{port}"
    except OSError as error:
        return (
            f"nothing listens at {host}:{port} ({_words_of(error)})",
            f"tritonserver --grpc-address=0.0.0.0 --grpc-port={port}   (docker run -p {port}:{port})",
        )
    writer.close()
    return None


async def _without_tls(address: str) -> tuple[str, str] | None:
    host = address.rpartition(":")[0]
    right = f"config.yaml: url: triton://{host}:{GRPC_PORT}   (the port of --grpc-port, by default {GRPC_PORT})"
    async with httpx.AsyncClient(timeout=CONNECT_S, trust_env=False, verify=False) as client:
        server = await _get(client, f"http://{address}/v2")
        if server is not None and _is_triton(server):
            return f"{address} is Triton's HTTP port, and gRPC is spoken to the engine", right
        metrics = None if server is None else await _get(client, f"http://{address}/metrics")
        if metrics is not None and "# TYPE nv_" in metrics.text:
            return f"{address} is Triton's metrics port, and gRPC is spoken to the engine", right
    if server is not None:
        return f"{address} is an HTTP server (it answers {server.status_code} to /v2), not Triton's gRPC port", right
    if await _handshake(address, _unverified()) is None:
        return (
            f"{address} speaks TLS, and no TLS is configured for this backend",
            "config.yaml: tls: {ca: PEM file of the CA that signed the server's certificate}",
        )
    return None


async def _with_tls(address: str, tls: Mapping[str, str]) -> tuple[str, str] | None:
    problem = await _handshake(address, context_of(tls))
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
    return f"{address} does not speak TLS ({_words(problem)})", "config.yaml: take tls out of this backend's entry"


def _words_of(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def _words(problem: Exception) -> str:
    reason = getattr(problem, "reason", None) or str(problem) or type(problem).__name__
    return str(reason).lower().replace("_", " ")


def context_of(tls: Mapping[str, str]) -> ssl.SSLContext:
    """Return a client's TLS context from PEM files. Raises Misused with the file that cannot be read."""
    try:
        context = ssl.create_default_context(cafile=tls.get("ca"))
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC: the server's own certificate will do as its CA
        if "certificate" in tls:
            context.load_cert_chain(tls["certificate"], tls.get("key"))
    except (OSError, ssl.SSLError) as error:
        names = ", ".join(f"{name} {path}" for name, path in sorted(tls.items()))
        raise Misused(Reason.CONFIG_INVALID, f"the TLS files cannot be used ({names}): {error}") from error
    context.set_alpn_protocols(["h2"])
    return context


def _unverified() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


async def _handshake(address: str, context: ssl.SSLContext) -> Exception | None:
    """Shake hands and wait for what a gRPC server says first; return what went wrong.

    With TLS 1.3 a client is told only then that its certificate is missing or not accepted.
    """
    host, port = host_and_port(address)
    try:
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=host)
            try:
                if not await reader.read(1):
                    return ConnectionResetError("it ends the connection")
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        return error
    return None


async def _get(client: httpx.AsyncClient, url: str) -> httpx.Response | None:
    try:
        return await client.get(url)
    except (httpx.HTTPError, httpx.InvalidURL):
        return None


def _is_triton(reply: httpx.Response) -> bool:
    try:
        record = reply.json()
    except ValueError:
        return False
    return isinstance(record, dict) and record.get("name") == "triton"
