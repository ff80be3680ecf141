"""Check that a server is reachable, recent enough, alive, lets us in, and serves the intended model."""

from __future__ import annotations

from contextlib import suppress
from http import HTTPStatus
from time import monotonic
from typing import Any

import grpc.aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from sidecar.backends.checks.finding import BUSY_FIX, RUN_S, Finding, failed, milliseconds, ok, warning
from sidecar.backends.checks.port import (
    CONNECT_S,
    GRPC_PORT,
    HTTP,
    certificate_of,
    no_connection,
    triton_instead,
    unasked_tls,
    with_tls,
)
from sidecar.backends.credentials import open_channel
from sidecar.backends.http_client import TimedOut, WireError
from sidecar.backends.openai.checks.look import Look, log_fix
from sidecar.core.enums import Fault
from sidecar.errors import Misused

GRPC_S = 2.0


async def reachable(look: Look) -> Finding:
    """Check that the right server answers HTTP at the address; say what answers instead."""
    began = monotonic()
    address, scheme = look.target.address, look.dialect.model.name
    url_fix = f"config.yaml: url: {scheme}://HOST:PORT of {look.title}'s --port, by default {look.dialect.port}"
    try:
        look.version = await look.dialect.recognise(look.server)
    except Misused as other:
        found = await triton_instead(look.server.client, address, look.title)
        fix = other.details.get("fix") or url_fix
        return failed(*(found or (other.message.removeprefix(f"{look.target.id}: "), fix)))
    except WireError as error:
        mute = f"{address} takes connections and does not answer HTTP: {error}", url_fix
        return failed(*(await _obstacle(look) or mute))
    return ok(f"{look.version} at {address}, {milliseconds(monotonic() - began)}")


async def _obstacle(look: Look) -> tuple[str, str] | None:
    """Return why HTTP is not answered, and what to change; None if nothing was found."""
    address, tls, scheme = look.target.address, look.target.tls, look.dialect.model.name
    command = f"{look.dialect.start} --host 0.0.0.0 --port {{port}}   (docker run -p {{port}}:{{port}})"
    found = await no_connection(address, (scheme, command))
    if found is not None:
        return found
    found = await (unasked_tls(address, HTTP, scheme) if tls is None else with_tls(address, tls, HTTP, scheme))
    if found is None and await _is_triton(look):
        return (
            f"{address} is Triton's gRPC port, and is looked at as a {look.title}",
            f"config.yaml: url: triton://{address}   (its --grpc-port, by default {GRPC_PORT})",
        )
    return found


async def _is_triton(look: Look) -> bool:
    channel = open_channel(look.target.address, look.target.tls)
    try:
        stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        reply = await stub.ServerMetadata(service_pb2.ServerMetadataRequest(), timeout=GRPC_S)
    except grpc.aio.AioRpcError:
        return False
    finally:
        await channel.close(None)
    return bool(reply.name == "triton")


async def version(look: Look) -> Finding:
    """Check that this version can be used."""
    return look.dialect.judged_version(look.version, look.target.old_versions)


async def health(look: Look) -> Finding:
    """Check that the server does not say that its engine is gone."""
    try:
        await look.server.healthy(look.dialect.health_path)
    except Misused as gone:
        text = gone.message.removeprefix(f"{look.target.id}: ")
        return failed(f"{text}: the engine behind the API server is dead or still starts", log_fix(look))
    if look.dialect.trusts_health:
        return ok("the engine lives")
    return ok("it says that it is well, which it may say of a dead engine, too")


async def whole(look: Look) -> Finding:
    """Check that the server computes prompts and answers both."""
    try:
        look.found = await look.dialect.identify(look.server, look.entry)
    except Misused as part:
        text = part.message.removeprefix(f"{look.target.id}: ")
        return failed(text, f"{look.dialect.start}   (without disaggregated)")
    look.base = look.found.served.base
    return ok(f'one server for prompts and answers; it serves "{look.base}"')


async def base(look: Look) -> Finding:
    """Check that the engine answers one token as the base model."""
    try:
        reply = await look.answer(look.base, RUN_S)
    except TimedOut:
        lives = "though the server says that it lives: the engine is overloaded or hangs"
        return failed(f"no token within {RUN_S:g} s, {lives}", BUSY_FIX, log_fix(look))
    if reply.is_ok:
        return ok(f"one token in {milliseconds(reply.took_s)}")
    if look.dialect.fault_of(reply.status, reply.text) is Fault.LOST:
        return failed(f"the engine is dead: {reply.line}", log_fix(look))
    return failed(f"the engine refuses a request of one token: {reply.line}", log_fix(look))


async def encrypted(look: Look) -> Finding:
    """Check the TLS in use, and until when the server's certificate is valid."""
    return await certificate_of(look.target, HTTP)


async def api_key(look: Look) -> Finding:
    """Check that our key is accepted, and that no one is let in without one."""
    has_one, path = look.target.api_key_file is not None, look.dialect.models_path
    if not path:
        return ok("not looked at: it has no list of models that it could keep from us")
    status = (await look.server.get(path, CONNECT_S)).status
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        text = f"the server does not accept the key in {look.target.api_key_file}" if has_one else "it wants an API key"
        return failed(
            f"{text}: {path} answers {status}",
            f"config.yaml: api_key_file: a file with the key of {look.title}'s --api-key   (or --api-key-file)",
        )
    if status != HTTPStatus.OK:
        return failed(f"{path} answers {status}: a proxy in between, or no {look.title}", "config.yaml: set url right")
    if not has_one:
        return ok("none is wanted, none is configured: whoever reaches the server can use it")
    without = await look.server.client.get(path, CONNECT_S, {"authorization": ""})
    if without.is_ok and look.dialect.has_admin_key:
        return ok("one is configured for the calls that load adapters; whoever reaches the server can use the rest")
    if without.is_ok:
        return warning(
            "one is configured, and the server answers without it",
            f"{look.dialect.start} --api-key KEY, or take api_key_file out of config.yaml",
        )
    return ok("accepted, and nobody is let in without it")


async def model(look: Look) -> Finding:
    """Check that the served base model is the declared one, and how long its sequences may be."""
    if look.entry is not None:
        with suppress(Misused):  # what keeps it from being used is another check's
            look.found = await look.dialect.identify(look.server, look.entry)
    served = look.found.served
    if not served.base:  # without an entry it could not be identified
        served = await look.dialect.served(look.server)
        await look.server.paths()
    look.base, look.adapters = served.base, served.adapters or {}
    names = served.names or (served.base,)
    longest, declared = served.sequence_tokens_max, look.facts.base_models
    text = f'"{served.base}"' + (f", at most {longest} tokens a sequence" if longest else "")
    if not declared:
        return warning(
            f"{text}; the name that adapters were trained on is not declared, so adapters of other models are not "
            "refused",
            f"config.yaml: base_model: {{name: {names[-1]}}}   (what their adapter_config.json has as "
            "base_model_name_or_path)",
        )
    if not set(names) & set(declared):
        return warning(
            f'{text}; it is declared as "{declared[0]}": the same model under another name, or another engine',
            f"if it is the same, config.yaml: base_model: {{name: {declared[0]}, aliases: [{', '.join(names)}]}}",
        )
    limit = look.facts.sequence_tokens_max
    if limit is not None and longest is not None and limit > longest:
        return warning(
            f"{text}; engine.sequence_tokens_max is {limit}, so longer requests are sent and the engine refuses them",
            f"config.yaml: engine: {{sequence_tokens_max: {longest}}}   (or leave it out: it is asked)",
        )
    return ok(f"{text}, as declared")
