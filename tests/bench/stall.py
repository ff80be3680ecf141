"""What others feel of a 300 MB adapter: it is registered, packed and loaded while streams run on another engine."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc.aio

from sidecar.proto import admin_pb2, admin_pb2_grpc
from tests.bench import clients
from tests.bench.figures import Figure, middle, percentile
from tests.bench.large import THREE_HUNDRED_MB, PlainSender, engine_options
from tests.bench.processes import SidecarProcess, backend_of
from tests.emulated import EngineProcess
from tests.peft_files import QV, write_adapter
from sidecar.emulator.shape import LLAMA_31_8B

STREAMS, TOKENS, ROUNDS = 8, 200, 5
STALL_GOAL_MS, GAP_GOAL = 20.0, 1.5
NAME = "huge"
