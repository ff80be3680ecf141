"""Check that a vLLM server is reachable, recent enough, alive, lets us in, and serves the intended model."""

from __future__ import annotations

from http import HTTPStatus
from time import monotonic
from typing import Any

import grpc.aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from sidecar.backends.checks.finding import Finding, failed, milliseconds, ok, warning
from sidecar.backends.checks.port import (
    CONNECT_S,
    GRPC_PORT,
    HTTP,
    certificate_of,
    no_connection,
    not_vllm,
    unasked_tls,
    with_tls,
)
from sidecar.backends.credentials import open_channel
from sidecar.backends.http_client import Reply, WireError
from sidecar.backends.vllm.api import OLDEST, is_too_old, version_of
from sidecar.backends.vllm.checks.look import VllmLook

GRPC_S = 2.0
OLDEST_WORDS = ".".join(map(str, OLDEST))


async def reachable(look: VllmLook) -> Finding:
    """Check that a vLLM answers HTTP at the address; say what answers instead."""
    began = monotonic()
    address = look.target.address
    try:
        reply = await look.client.get("/version", CONNECT_S)
        took_s = monotonic() - began
        version = version_of(reply.body)
        if version is None:
            return failed(*await not_vllm(look.client, address))
        look.version = version
    except WireError as error:
        return failed(*(await _obstacle(look) or _mute(address, error)))
    return ok(f"{look.version} at {address}, {milliseconds(took_s)}")


async def _obstacle(look: VllmLook) -> tuple[str, str] | None:
    """Return why HTTP is not answered, and what to change; None if nothing was found."""
    address, tls = look.target.address, look.target.tls
    found = await no_connection(address, HTTP)
    if found is not None:
        return found
    found = await (unasked_tls(address, HTTP) if tls is None else with_tls(address, tls, HTTP))
    if found is None and await _is_triton(look):
        return (
            f"{address} is Triton's gRPC port, and is looked at as a vLLM",
            f"config.yaml: url: triton://{address}   (its --grpc-port, by default {GRPC_PORT})",
        )
    return found


def _mute(address: str, error: Exception) -> tuple[str, str]:
    return (
        f"{address} takes connections and does not answer HTTP: {error}",
        "config.yaml: url: vllm://HOST:PORT of vLLM's --port, by default 8000",
    )


async def _is_triton(look: VllmLook) -> bool:
    channel = open_channel(look.target.address, look.target.tls)
    try:
        stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        reply = await stub.ServerMetadata(service_pb2.ServerMetadataRequest(), timeout=GRPC_S)
    except grpc.aio.AioRpcError:
        return False
    finally:
        await channel.close(None)
    return bool(reply.name == "triton")


async def version(look: VllmLook) -> Finding:
    """Check that a load under traffic leaves other adapters' answers alone."""
    number = look.version.number
    if not is_too_old(number):
        return ok(f"{number}, and {OLDEST_WORDS} is needed")
    text = (
        f"{number} can answer with another adapter's weights while one is loaded (vllm#47724), and is "
        f"{'used all the same' if look.target.old_versions else 'refused'}"
    )
    upgrade = f"pip install -U 'vllm>={OLDEST_WORDS}', or an image of vllm/vllm-openai:v{OLDEST_WORDS}.0 or newer"
    if look.target.old_versions:
        return warning(f"{text}: old_versions is true", upgrade)
    return failed(text, upgrade, "or config.yaml: old_versions: true   (if adapters are never loaded under traffic)")


async def health(look: VllmLook) -> Finding:
    """Check that the engine behind the API server lives."""
    status = (await look.client.get("/health", CONNECT_S)).status
    if status == HTTPStatus.OK:
        return ok("the engine lives")
    return failed(
        f"/health answers {status}: the engine behind the API server is dead or still starts",
        "read the end of vLLM's log for what ended it, and start it again",
    )


async def encrypted(look: VllmLook) -> Finding:
    """Check the TLS in use, and until when the server's certificate is valid."""
    return await certificate_of(look.target, HTTP)


async def api_key(look: VllmLook) -> Finding:
    """Check that our key is accepted, and that no one is let in without one."""
    has_one = look.target.api_key_file is not None
    status = (await look.client.get("/v1/models", CONNECT_S)).status
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        text = f"the server does not accept the key in {look.target.api_key_file}" if has_one else "it wants an API key"
        return failed(
            f"{text}: /v1/models answers {status}",
            "config.yaml: api_key_file: a file with the key of vllm serve --api-key (or VLLM_API_KEY)"
            "   (or --api-key-file)",
        )
    if status != HTTPStatus.OK:
        return failed(f"/v1/models answers {status}: a proxy in between, or no vLLM", "config.yaml: set url right")
    if not has_one:
        return ok("none is wanted, none is configured: whoever reaches the server can use it")
    without = await look.client.get("/v1/models", CONNECT_S, {"authorization": ""})
    if without.is_ok:
        return warning(
            "one is configured, and the server answers without it",
            "vllm serve --api-key KEY   (or VLLM_API_KEY), or take api_key_file out of config.yaml",
        )
    return ok("accepted, and nobody is let in without it")


async def model(look: VllmLook) -> Finding:
    """Check that the served base model is the declared one, and how long its sequences may be."""
    served = await look.api.models()
    look.base, look.adapters = served.base, served.adapters
    names = _names(await look.client.get("/v1/models", CONNECT_S))
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


def _names(reply: Reply) -> list[str]:
    """Return the base model's names: those it is served by, and where it was read from."""
    bases = [entry for entry in reply.json()["data"] if not entry.get("parent")]
    found = [str(entry["id"]) for entry in bases] + [str(entry["root"]) for entry in bases if entry.get("root")]
    return list(dict.fromkeys(found))
