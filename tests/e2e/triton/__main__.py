"""`make triton`: a real Triton with the emulated engine as its models, on the usual ports, until it is told to stop."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from tests.e2e.foreground import serve
from tests.e2e.triton.repository import Repository
from tests.e2e.triton.server import TritonServer

DEMO_SEED = 20
"""The base model that the demo's adapters were trained on."""


def make(ports: tuple[int, int, int], folder: Path) -> tuple[TritonServer, str]:
    repository = Repository(engine={"seed": DEMO_SEED, "time_scale": 1.0}, texts=True)
    server = TritonServer(folder, repository, control="explicit", ports=ports)
    return server, f"tritonserver is ready: gRPC on {server.grpc_address}, metrics on {server.metrics_address}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--metrics-port", type=int, default=8002)
    given = parser.parse_args()
    serve("triton-", partial(make, (given.grpc_port, given.http_port, given.metrics_port)))
