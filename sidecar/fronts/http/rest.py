"""KServe's REST paths, which the sidecar does not serve: each says so, and where gRPC is.

The paths and their methods are those of Triton's HTTP server, so that a wrong one is told as such.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

PREFIX = "/v2"
READS, WRITES = ("GET", "HEAD"), ("POST",)
_MODEL = r"/models/[^/]+(/versions/[^/]+)?"
_REGIONS = r"/(system|cuda)sharedmemory(/region/[^/]+)?"
_PATHS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"/?", READS),
    (r"/health/(live|ready)", READS),
    (rf"{_MODEL}(/(ready|config|stats))?", READS),
    (r"/models/stats", READS),
    (rf"{_MODEL}/(infer|generate|generate_stream)", WRITES),
    (r"/repository/(index|models/[^/]+/(load|unload))", WRITES),
    (rf"{_REGIONS}/status", READS),
    (rf"{_REGIONS}/(register|unregister)", WRITES),
    (rf"({_MODEL})?/trace/setting", READS + WRITES),
    (r"/logging", READS + WRITES),
)
_KNOWN = tuple((re.compile(pattern), methods) for pattern, methods in _PATHS)
_WILDCARDS = ("0.0.0.0", "[::]", "")


@dataclass(frozen=True)
class RestAnswer:
    """The status, the JSON body as Triton's errors have it, and the methods that the path has where that was wrong."""

    status: int
    body: bytes
    allow: str = ""


def is_rest(path: str) -> bool:
    return path == PREFIX or path.startswith(f"{PREFIX}/")


def rest_answer(method: str, path: str, grpc_address: str) -> RestAnswer:
    """Answer a request for a path below /v2: 501, 405 for a wrong method, 404 for a path that Triton has not either."""
    methods = next((methods for known, methods in _KNOWN if known.fullmatch(path.removeprefix(PREFIX))), None)
    instead = f"use gRPC, {_place(grpc_address)}"
    if methods is None:
        return _error(404, f"KServe's REST API has no such path, and the sidecar does not serve REST: {instead}")
    if method not in methods:
        return _error(405, f"{method} is not for this path; it takes {', '.join(methods)}", ", ".join(methods))
    return _error(501, f"the sidecar does not serve KServe's REST API: {instead} (inference.GRPCInferenceService)")


def _place(grpc_address: str) -> str:
    """Say where a client finds the data listener. A wildcard is no address to connect to."""
    host, _, port = grpc_address.rpartition(":")
    return f"port {port} of this host" if host in _WILDCARDS else grpc_address


def _error(status: int, message: str, allow: str = "") -> RestAnswer:
    return RestAnswer(status, json.dumps({"error": message}).encode(), allow)
