"""Serve clients and operators: one package for each protocol they speak."""
