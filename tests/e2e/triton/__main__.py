"""`make triton`: a real Triton with the emulated engine as its models, on the usual ports, until it is told to stop."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.foreground import serve
from tests.e2e.triton.repository import Repository
from tests.e2e.triton.server import TritonServer

PORTS = (8001, 8000, 8002)
DEMO_SEED = 20
"""The base model that the demo's adapters were trained on."""


def make(folder: Path) -> tuple[TritonServer, str]:
    repository = Repository(engine={"seed": DEMO_SEED, "time_scale": 1.0}, texts=True)
    server = TritonServer(folder, repository, control="explicit", ports=PORTS)
    return server, f"tritonserver is ready: gRPC on {server.grpc_address}, metrics on {server.metrics_address}"


if __name__ == "__main__":
    serve("triton-", make)
