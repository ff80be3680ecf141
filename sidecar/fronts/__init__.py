"""Act for clients and operators: one module for each protocol they speak."""
