"""The backend kind `triton`: TensorRT-LLM's core model or its LLM-API model, behind Triton."""
