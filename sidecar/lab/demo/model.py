"""The base model of the demo: the emulator's tiny Llama with the weights of one seed."""

from __future__ import annotations

from pathlib import Path

from sidecar.lab.engine.shape import TINY
from sidecar.lab.engine.weights import Weights, seeded_weights

SHAPE = TINY
SEED = 20
MAX_TOKENS = 48
"""Longest answer in the demo, end token included."""

DATA = Path(__file__).parent / "data"
ADAPTERS = DATA / "adapters"
ANSWERS = DATA / "demo.json"


def base_weights(dtype: str = "float16") -> Weights:
    """Return the base weights as float32 arrays, rounded to the engine's dtype."""
    return seeded_weights(SHAPE, SEED, dtype)
