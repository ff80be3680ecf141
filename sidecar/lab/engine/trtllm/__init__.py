"""The emulated trtllm-serve: TensorRT-LLM's OpenAI server on its PyTorch backend, as a client sees it over HTTP.

`serve_trtllm(TrtllmOptions())` starts one. It rests on what TensorRT-LLM's source says: no real server was run. The
README lists what is read and what is inferred.
"""

from sidecar.lab.engine.trtllm.options import TrtllmOptions
from sidecar.lab.engine.trtllm.server import TrtllmServer, serve_trtllm

__all__ = ["TrtllmOptions", "TrtllmServer", "serve_trtllm"]
