"""The backend kind `vllm`: vLLM's OpenAI server."""
