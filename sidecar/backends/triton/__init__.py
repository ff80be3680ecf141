"""The backend kinds `triton` and `triton_llmapi`: TensorRT-LLM behind Triton."""
