"""Engines: run requests on them, load adapters into them, and watch whether they live."""
