"""The emulated TensorRT-LLM behind Triton, as a client sees it over KServe v2 gRPC.

`serve(Options())` starts one: a gRPC server over one engine model, a metrics port, and the task that drives both.
"""

from sidecar.lab.engine.kserve.options import Options
from sidecar.lab.engine.kserve.server import Server, serve

__all__ = ["Options", "Server", "serve"]
