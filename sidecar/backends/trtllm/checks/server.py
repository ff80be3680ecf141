"""Check that a trtllm-serve is reachable, whole and alive, and what its metrics say."""

from __future__ import annotations

from http import HTTPStatus
from time import monotonic

from sidecar.backends.checks.finding import BUSY_FIX, RUN_S, Finding, failed, milliseconds, ok, warning
from sidecar.backends.checks.port import HTTP, certificate_of, no_connection, unasked_tls, with_tls
from sidecar.backends.http_client import TimedOut, WireError
from sidecar.backends.trtllm.api import Measures
from sidecar.backends.trtllm.checks.look import TrtllmLook
from sidecar.backends.trtllm.probe import PROMPTS
from sidecar.errors import Misused

LISTEN = ("trtllm", "trtllm-serve MODEL --host 0.0.0.0 --port {port}   (docker run -p {port}:{port})")
URL_FIX = "config.yaml: url: trtllm://HOST:PORT of trtllm-serve's --port, by default 8000"
LOG_FIX = "read the end of trtllm-serve's log for what ended the engine, and start it again"
STATISTICS_FIX = "the file of trtllm-serve's --extra_llm_api_options: enable_iter_perf_stats: true"


async def reachable(look: TrtllmLook) -> Finding:
    """Check that a trtllm-serve answers HTTP at the address; say what answers instead."""
    began, address, tls = monotonic(), look.target.address, look.target.tls
    try:
        model = await look.api.model()
    except Misused as other:
        return failed(other.message, URL_FIX)
    except WireError as error:
        found = await no_connection(address, HTTP, LISTEN)
        if found is None:
            found = await (unasked_tls(address, HTTP) if tls is None else with_tls(address, tls, HTTP))
        cause = str(error)
        return failed(*(found or (f"{address} takes connections and does not answer HTTP: {cause}", URL_FIX)))
    took_s = monotonic() - began
    version = await look.api.version()
    return ok(f"trtllm-serve {version} at {address} serves {model}, {milliseconds(took_s)}")


async def health(look: TrtllmLook) -> Finding:
    """Check that the server does not say that its engine is gone."""
    try:
        await look.api.healthy()
    except Misused as gone:
        return failed(gone.message, LOG_FIX)
    return ok("it says it is well, which 1.2.1 says of a dead engine, too")


async def encrypted(look: TrtllmLook) -> Finding:
    """Check the TLS in use, and until when the server's certificate is valid."""
    return await certificate_of(look.target, HTTP)


async def whole(look: TrtllmLook) -> Finding:
    """Check that the server computes prompts and answers both."""
    try:
        look.seats = await look.api.seats()
    except Misused as part:
        return failed(part.message, "trtllm-serve MODEL   (without disaggregated)")
    return ok("one server for prompts and answers")


async def base(look: TrtllmLook) -> Finding:
    """Check that the engine answers a token without an adapter: the only proof that it lives."""
    began = monotonic()
    try:
        status, text = await look.api.ask(PROMPTS[0], 1, RUN_S)
    except TimedOut:
        return failed(f"no token within {RUN_S:g} s: its engine is dead, or all its seats are taken", BUSY_FIX, LOG_FIX)
    if status != HTTPStatus.OK:
        return failed(f"it refuses a request of one token: {text}", LOG_FIX)
    return ok(f"one token in {milliseconds(monotonic() - began)}")


async def metrics(look: TrtllmLook) -> Finding:
    """Check that the engine's steps are published, and that nobody else takes them away."""
    found = await look.api.measures()
    if found == Measures():
        return warning(
            "/metrics is empty: steps and KV size are not known, so an engine that hangs is noticed by its silence "
            f"alone (progress_timeout_s, {look.entry.progress_timeout_s:g} s)",
            STATISTICS_FIX,
            "and let nothing else read /metrics, for reading empties it (a scraper can take /prometheus/metrics)",
        )
    look.has_statistics = True
    return ok(f"{found.kv_tokens} KV tokens, {found.steps} steps; reading /metrics empties it, so nothing else may")
