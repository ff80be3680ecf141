"""What outlives the process: which names stand for which adapters, and who may write that down."""
