"""Discover the engines of a pool that are not listed one by one in the configuration."""
