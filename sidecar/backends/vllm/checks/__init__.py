"""What is asked of a live vLLM before it is trusted, in the form of the checks beside it."""
