"""Ask a real trtllm-serve and the emulated one the same questions, and print what differs.

The emulator rests on facts read in TensorRT-LLM's source. This is how somebody who has the server checks them:

    make record URL=http://host:8000 ADAPTER=/shared/my-adapter MODEL_CONFIG=/models/llama/config.json

Answers are compared by their form: statuses, keys and their order, which values are null, events and how they end, the
texts of errors without names and numbers. What an adapter changes is compared as facts ("a number keeps its first
content"), each of them found by comparing answers of the same server.
"""
