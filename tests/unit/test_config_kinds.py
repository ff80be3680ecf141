"""Keys of a backend that are of one kind of engine only."""

from __future__ import annotations

from typing import Any

import pytest

from sidecar.backends.openai.vllm import VllmEntry
from sidecar.backends.registry import KINDS, entries_of, full_record
from sidecar.backends.triton.entry import TritonEntry
from sidecar.config import Config, parse
from sidecar.config.backends import Backend, Engine
from sidecar.errors import Misused
from tests.kit.entries import entries

OF_TRITON, OF_VLLM = VllmEntry.ELSEWHERE["triton://"], TritonEntry.ELSEWHERE["vllm://"]
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
    return entries(record)[0]


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
    """What is refused for one kind means something to the other."""
    backend(url, *keys)


def test_a_kind_that_nobody_knows_is_refused() -> None:
    with pytest.raises(Misused, match="must be of the form triton://HOST:PORT or vllm://HOST:PORT"):
        backend("mine://gpu:1")
    with pytest.raises(Misused, match=f'no kind of backend "mine"; there are {", ".join(KINDS)}, or'):
        backend("http://gpu:1", kind="mine")


def test_every_key_is_one() -> None:
    """The tables name keys that there are."""
    known = {*TritonEntry.model_fields, *VllmEntry.model_fields, *(f"engine.{name}" for name in Engine.model_fields)}
    assert {*OF_TRITON, *OF_VLLM} <= known
    assert set(OTHERS) == {*OF_TRITON, *OF_VLLM}


def test_a_configuration_that_is_printed_can_be_read_again() -> None:
    """With all defaults written out, those of the other kind's keys too."""
    config = Config(backends=({"url": "vllms://gpu:8000"}, {"url": "triton://gpu:8001"}))
    printed = full_record(config)
    assert entries_of(parse(printed, "again")) == entries_of(config)
    for one, other in ((0, 1), (1, 0)):
        printed["backends"][one] = (
            printed["backends"][other] | printed["backends"][one]
        )  # as an earlier release printed
    assert entries_of(parse(printed, "again")) == entries_of(config)


def test_tls_by_the_url() -> None:
    """`vllms` is vLLM by TLS; with files or without."""
    assert (backend("vllms://gpu:8000").kind_name, backend("vllms://gpu:8000").tls is None) == ("vllm", False)
    named = backend("vllms://gpu:8000", tls={"ca": "/ca.pem"})
    assert named.tls is not None
    assert named.tls.ca == "/ca.pem"
    assert backend("vllm://gpu:8000").tls is None


def test_one_engine_under_two_ids_is_refused() -> None:
    """Each entry would send as much as the engine takes. A Triton may have several core models."""
    with pytest.raises(Misused, match=r"a and b are one engine \(vllm://e:8000\); take one of them out"):
        entries_of(parse({"backends": [{"id": each, "url": "vllm://e:8000"} for each in "ab"]}, "the test"))
    for hosts in (("localhost", "127.0.0.1"), ("[::1]", "LOCALHOST"), ("GPU", "gpu."), ("[fe80::0:1]", "[fe80::1]")):
        urls = [f"vllm://{host}:8000" for host in hosts]
        backends = [{"id": each, "url": url} for each, url in zip("ab", urls, strict=True)]
        with pytest.raises(Misused, match="a and b are one engine") as error:
            entries_of(parse({"backends": backends}, "the test"))
        assert ", ".join(urls) in error.value.message
    apart = ("vllm://127.0.0.1:8000", "vllm://127.0.0.2:8000", "vllm://localhost:8001", "vllm://gpu:8000")
    assert len(entries_of(parse({"backends": [{"url": url} for url in apart]}, "the test"))) == 4
    models = [{"id": each, "url": "triton://e:8001", "model": f"model-{each}"} for each in "ab"]
    assert len(entries_of(parse({"backends": models}, "the test"))) == 2


def test_load_calls_without_a_root_are_refused() -> None:
    with pytest.raises(Misused, match=r"openai\.load_calls needs adapters\.roots"):
        parse({"openai": {"load_calls": True}, "listeners": {"http": {"address": "127.0.0.1:0"}}}, "the test")
