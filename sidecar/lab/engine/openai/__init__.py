"""The emulated vLLM behind its OpenAI API, as a client sees it over HTTP.

`serve_vllm(VllmOptions())` starts one: an HTTP server over one engine model of vLLM's kind, and the task that drives
it. Answers, refusals and failures follow vLLM 0.32.0 or 0.33.0, and the Rust front
end of that one. The text of answers comes from the emulator's own small Llama, or
from nothing but the adapter's content (`sidecar.lab.engine.openai.folder.content_id`).
"""

from sidecar.lab.engine.openai.options import VllmOptions
from sidecar.lab.engine.openai.server import VllmServer, serve_vllm

__all__ = ["VllmOptions", "VllmServer", "serve_vllm"]
