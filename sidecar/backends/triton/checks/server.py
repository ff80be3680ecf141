"""Check that the server is reachable and ready, and has the model."""

from __future__ import annotations

import difflib
from time import monotonic
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2

from sidecar.backends.checks.finding import Finding, failed, milliseconds, ok, warning
from sidecar.backends.checks.port import GRPC, certificate_of, what_answers
from sidecar.backends.triton.checks.engine import facts_from
from sidecar.backends.triton.checks.look import Look
from sidecar.backends.wire import describe

ANSWER_S = 4.0
MODELS_NAMED = 8


async def reachable(look: Look) -> Finding:
    """Check that a Triton server answers gRPC at the address; say what answers instead."""
    began = monotonic()
    try:
        reply = await _metadata(look)
    except grpc.aio.AioRpcError as error:
        judged = await _unreachable(look, error)
        if judged is not None:
            return judged
        try:
            # Nothing prevents it, and a connection may fail on a busy machine.
            reply = await _metadata(look, patiently=True)
        except grpc.aio.AioRpcError as again:
            return failed(
                f"{look.target.address} takes connections and does not answer gRPC: {describe(again)}",
                "config.yaml: url: triton://HOST:PORT of tritonserver's --grpc-port",
            )
    look.server = f"{reply.name} {reply.version}".strip()
    return ok(
        f"{look.server or 'a server without a name'} at {look.target.address}, {milliseconds(monotonic() - began)}"
    )


async def _metadata(look: Look, patiently: bool = False) -> Any:
    request = service_pb2.ServerMetadataRequest()
    return await look.stub.ServerMetadata(request, timeout=ANSWER_S, wait_for_ready=patiently)


async def _unreachable(look: Look, error: grpc.aio.AioRpcError) -> Finding | None:
    """Return what prevents gRPC; None if nothing was found."""
    target = look.target
    if "http2 header with status" in (error.details() or ""):
        return failed(
            f"{target.address} answers HTTP/2 and not gRPC: a proxy or an ingress ({error.details()})",
            "config.yaml: url: triton://HOST:PORT of tritonserver's --grpc-port, or have the proxy pass gRPC on",
        )
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return failed(
            f"{target.address} is a gRPC server, but not Triton: it does not know {_service(error)}",
            "config.yaml: url: triton://HOST:PORT of tritonserver's --grpc-port",
        )
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        found = await what_answers(target.address, target.tls)
        return None if found is None else failed(*found)
    return failed(f"{target.address} answers with {describe(error)}")


def _service(error: grpc.aio.AioRpcError) -> str:
    return "KServe v2's ServerMetadata" + (f" ({error.details()})" if error.details() else "")


async def ready(look: Look) -> Finding:
    """Check that the server is live and ready."""
    live = (await look.stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=ANSWER_S)).live
    if not live:
        return failed("the server says that it is not live", "restart tritonserver and read the end of its log")
    if (await look.stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=ANSWER_S)).ready:
        return ok("live and ready")
    return warning(
        "the server is live and says that it is not ready: a model is still loading or could not be loaded",
        "read its log for the model; tritonserver --strict-readiness=false if it does not matter",
    )


async def model(look: Look) -> Finding:
    """Check that the model is present and READY; read its ModelConfig."""
    name = look.target.model
    states = await _states(look)
    others = sorted(other for other in states if other != name)
    if name not in states:
        return failed(
            f'there is no model "{name}"; there are {_listed(others)}' if others else "the server has no model at all",
            *_better_names(name, others),
        )
    if states[name] != "READY":
        return failed(
            f'the model "{name}" is {states[name]}',
            "read the server's log for why; with --model-control-mode=explicit load it: --load-model=" + name,
        )
    look.config = (await look.stub.ModelConfig(service_pb2.ModelConfigRequest(name=name), timeout=ANSWER_S)).config
    look.facts = facts_from(look.target, look.config)
    return ok(f"{name} is READY" + (f"; beside it: {_listed(others)}" if others else ""))


async def _states(look: Look) -> dict[str, str]:
    """Return the state of each model in the repository, with its reason if there is one."""
    index = await look.stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), timeout=ANSWER_S)
    states: dict[str, str] = {}
    for entry in index.models:
        state = entry.state or "UNAVAILABLE"
        if states.get(entry.name) != "READY":
            states[entry.name] = f"{state} ({entry.reason})" if entry.reason else state
    return states


def _better_names(name: str, others: list[str]) -> list[str]:
    near = difflib.get_close_matches(name, others, 1, 0.5)
    best = near[0] if near else "tensorrt_llm" if "tensorrt_llm" in others else ""
    return [f"config.yaml: model: {best}   (or --model {best})"] if best else []


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MODELS_NAMED} more" if len(names) > MODELS_NAMED else ""
    return ", ".join(names[:MODELS_NAMED]) + more


async def encrypted(look: Look) -> Finding:
    """Check the TLS in use, and until when the server's certificate is valid."""
    return await certificate_of(look.target, GRPC)
