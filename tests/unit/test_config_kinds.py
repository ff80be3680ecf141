"""Keys of a backend that are of one kind of engine only."""

from __future__ import annotations

from typing import Any

import pytest

from sidecar.config import Backend, Config, Engine, parse
from sidecar.config.kinds import OF_TRITON, OF_VLLM
from sidecar.errors import Misused

OTHERS = {
    "model": "llama",
    "text_model": "text",
    "models": ("a",),
    "metrics": "http://gpu:8002/metrics",
    "weights_transport": "grpc",
    "api_key_file": "/key",
    "old_versions": True,
    "engine.config": "/engine/config.json",
    "engine.modules": {"attn_q": (64, 64)},
    "engine.rank_multiple": 8,
    "engine.tp": 2,
    "engine.heads": 4,
    "engine.kv_heads": 2,
    "engine.head_size": 16,
}
"""A value for each key that is not its default."""


def backend(url: str, *keys: str, **fields: Any) -> Backend:
    """Return a backend with some of the keys set."""
    record: dict[str, Any] = {"url": url, **fields}
    for key in keys:
        section, _, name = key.rpartition(".")
        (record.setdefault(section, {}) if section else record)[name] = OTHERS[key]
    return parse({"backends": [record]}, "the test").backends[0]


@pytest.mark.parametrize(("url", "keys"), [("vllm://gpu:8000", OF_TRITON), ("triton://gpu:8001", OF_VLLM)])
def test_keys_of_another_kind_are_refused(url: str, keys: dict[str, str]) -> None:
    """Each by name, with the reason; all that are wrong are told at once."""
    for key in keys:
        with pytest.raises(Misused, match=rf"{key} is for \w+:// backends only: .*; take it out"):
            backend(url, key)
    with pytest.raises(Misused) as refused:
        backend(url, *keys)
    assert all(f"{key} is for" in refused.value.message for key in keys)


@pytest.mark.parametrize(("url", "keys"), [("triton://gpu:8001", OF_TRITON), ("vllm://gpu:8000", OF_VLLM)])
def test_keys_of_its_own_kind_are_taken(url: str, keys: dict[str, str]) -> None:
    """What is refused for one kind means something to the other; a plug-in may use all."""
    backend(url, *keys)
    backend("mine://gpu:1", *OTHERS)
    backend("http://gpu:1", *OTHERS, kind="mine")


def test_every_key_is_one() -> None:
    """The tables name keys that there are."""
    known = {*Backend.model_fields, *(f"engine.{name}" for name in Engine.model_fields)}
    assert {*OF_TRITON, *OF_VLLM} <= known
    assert set(OTHERS) == {*OF_TRITON, *OF_VLLM}


def test_a_configuration_that_is_printed_can_be_read_again() -> None:
    """With all defaults written out, those of the other kind's keys too."""
    config = Config(backends=(backend("vllms://gpu:8000"), backend("triton://gpu:8001")))
    assert parse(config.model_dump(mode="json"), "again") == config


def test_tls_by_the_url() -> None:
    """`vllms` is vLLM by TLS; with files or without."""
    assert (backend("vllms://gpu:8000").scheme, backend("vllms://gpu:8000").tls is None) == ("vllm", False)
    named = backend("vllms://gpu:8000", tls={"ca": "/ca.pem"})
    assert named.tls is not None
    assert named.tls.ca == "/ca.pem"
    assert backend("vllm://gpu:8000").tls is None
