"""Backends of trtllm-serve, TensorRT-LLM's OpenAI server on its PyTorch engine."""
