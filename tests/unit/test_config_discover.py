"""Entries whose engines are found: what they must say, and what each engine that is found becomes."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from sidecar.backends.registry import entries_of, full_record
from sidecar.config import Config, parse
from sidecar.config.backends import Backend
from sidecar.discovery import several
from sidecar.errors import Misused
from sidecar.serve.discovered import finder_of
from sidecar.serve.pool import facts_of, pools_of
from tests.kit.entries import entries

DNS = {"dns": "triton.ml.svc:8001"}


def pool(**record: Any) -> Backend:
    return entries({"kind": "triton", "discover": DNS, **record})[0]


def test_an_engine_that_is_found_has_all_that_its_pool_is_configured_to_have() -> None:
    entry = pool(id="gpu", metrics="http://{host}:9402/metrics", engine={"seats": 8}, base_model="llama")
    found = entry.at("triton-0", "10.0.0.7:8001")
    assert (found.identity, found.url, found.kind_name) == ("gpu-triton-0", "triton://10.0.0.7:8001", "triton")
    assert found.metrics == "http://10.0.0.7:9402/metrics"
    assert (found.engine, found.base_model, found.discover) == (entry.engine, entry.base_model, None)
    assert facts_of([found])["gpu-triton-0"] == pools_of([entry])["gpu"]


def test_ids_fit_metrics_and_shells() -> None:
    """Equal names give equal ids, so that all replicas call an engine the same."""
    entry = pool()
    assert entry.identity == "triton.ml.svc"
    assert entry.at("fd00::1", "[fd00::1]:8001").identity == "triton.ml.svc-fd00--1"
    assert entry.at("10.0.0.7", "10.0.0.7:8001").identity == "triton.ml.svc-10.0.0.7"


def test_a_vllm_with_tls_is_found_with_tls() -> None:
    found = pool(kind="vllm", tls={}).at("pod", "10.0.0.7:8000")
    assert (found.url, found.kind_name, found.tls is None) == ("vllms://10.0.0.7:8000", "vllm", False)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"discover": DNS}, "discover needs a kind: triton or vllm"),
        ({"discover": DNS, "kind": "triton", "url": "triton://gpu:8001"}, "it needs one of url and discover"),
        ({"kind": "triton"}, "it needs one of url and discover"),
        ({"discover": {}, "kind": "triton"}, "it needs one of dns and endpoint_slices"),
        (
            {"discover": {**DNS, "endpoint_slices": {"service": "a", "port": 1}}, "kind": "triton"},
            "it needs one of dns and endpoint_slices",
        ),
        ({"discover": {"dns": "triton.ml.svc"}, "kind": "triton"}, "it must be HOST:PORT"),
        ({"discover": {**DNS, "evry_s": 1}, "kind": "triton"}, "did you mean every_s?"),
        ({"discover": {**DNS, "every_s": 0}, "kind": "triton"}, "discover.every_s"),
        ({"discover": DNS, "kind": "triton", "metrics": "http://gpu:8002/metrics"}, "it needs {host}"),
        ({"discover": DNS, "kind": "vllm", "model": "other"}, "model is for triton:// backends only"),
    ],
)
def test_what_is_wrong_is_said(record: dict[str, Any], words: str) -> None:
    with pytest.raises(Misused) as raised:
        entries(record)
    assert words in raised.value.message


def test_no_entry_could_be_an_engine_of_a_pool() -> None:
    record = {"backends": [{"id": "gpu", "kind": "triton", "discover": DNS}, {"id": "gpu-1", "url": "triton://a:1"}]}
    with pytest.raises(Misused, match="gpu-1 could be an engine of the pool gpu; give one another id"):
        entries_of(parse(record, "the test"))


def test_a_configuration_that_is_printed_can_be_read_again() -> None:
    config = Config(backends=({"kind": "triton", "discover": DNS},))
    again = parse(full_record(config), "again")
    assert entries_of(again) == entries_of(config) == (pool(),)


async def test_a_finder_is_made_of_what_is_configured() -> None:
    discover = pool(discover={"dns": "localhost:8001", "every_s": 0.5}).discover
    assert discover is not None
    (found,) = await anext(aiter(finder_of(discover).watch()))
    assert found.address == "127.0.0.1:8001"


KNOWN = {
    "one": ["10.0.0.1"],
    "dual": ["10.0.0.1", "fd00::1"],
    "local": ["127.0.0.1", "::1"],
    "here": ["127.0.0.1", "127.0.1.1"],
    "headless": ["10.0.0.2", "10.0.0.1"],
    "six": [f"fd00::{number}" for number in range(1, 7)],
}


def ask(host: str) -> list[str]:
    if host not in KNOWN:
        raise OSError("no such host")
    return KNOWN[host]


def test_an_address_that_is_several_engines_is_told_with_the_way_out() -> None:
    """One address of each family is one machine, and so are all of this one's own."""
    places = {f"of {host}": f"{host}:8001" for host in (*KNOWN, "unknown")}
    wrong = several.problems(places, ask)
    assert list(wrong) == ["of headless", "of six"]
    assert wrong["of headless"] == (
        "headless has 2 addresses (10.0.0.1, 10.0.0.2), so each request and each load would reach another engine; "
        'write discover: {dns: "headless:8001"} and kind in place of url'
    )
    assert "six has 6 addresses (fd00::1, fd00::2, fd00::3, …)" in wrong["of six"]


def test_names_that_are_not_answered_in_time_are_no_problem() -> None:
    """The network of the machine that serves may know them."""
    never = threading.Event()

    def hang(host: str) -> list[str]:
        never.wait(60)
        return KNOWN["headless"]

    assert several.problems({"a": "headless:1"}, hang, patience_s=0.01) == {}
    never.set()


def test_addresses_are_no_names() -> None:
    assert several.problems({"a": "10.0.0.1:1", "b": "[fd00::1]:1", "c": "localhost:1"}) == {}
