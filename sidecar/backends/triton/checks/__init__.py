"""What is asked of a live Triton before it is trusted."""
