"""What EndpointSlices say of a Service's engines, and which hosts may be Services."""

from __future__ import annotations

from typing import Any

import pytest

from sidecar.discovery.found import Found
from sidecar.kubernetes.endpoint_slices import found_in
from sidecar.kubernetes.services import service_of


def part(*endpoints: Any, family: str = "IPv4", ports: Any = None) -> dict[str, Any]:
    ports = [{"name": "grpc", "port": 8001}] if ports is None else ports
    return {"addressType": family, "ports": ports, "endpoints": list(endpoints)}


def endpoint(address: str, pod: str = "", **conditions: bool) -> dict[str, Any]:
    target = {"targetRef": {"kind": "Pod", "name": pod}} if pod else {}
    return {"addresses": [address], "conditions": conditions} | target


def test_all_slices_count() -> None:
    """A Service with many endpoints has several slices; a pod is called by its name, anything else by its address."""
    slices = [part(endpoint("10.0.0.1", "a"), endpoint("10.0.0.2")), part(endpoint("10.0.0.3", "c"))]
    found = {each.name: each.address for each in found_in(slices, "grpc")}
    assert found == {"a": "10.0.0.1:8001", "10.0.0.2": "10.0.0.2:8001", "c": "10.0.0.3:8001"}


def test_what_is_not_said_is_ready() -> None:
    """`ready` that is missing, or null, means yes; only false means no."""
    slices = [
        part(
            {"addresses": ["10.0.0.1"]},
            {"addresses": ["10.0.0.2"], "conditions": None},
            {"addresses": ["10.0.0.3"], "conditions": {"ready": None}},
            endpoint("10.0.0.4", ready=False),
            endpoint("10.0.0.5", ready=False, terminating=True),
        )
    ]
    found = {each.name[-1]: (each.ready, each.terminating) for each in found_in(slices, "grpc")}
    assert found == {
        "1": (True, False),
        "2": (True, False),
        "3": (True, False),
        "4": (False, False),
        "5": (False, True),
    }


def test_a_pod_of_both_families_is_one_engine() -> None:
    """It is taken at its IPv4 address, whichever slice comes first; one with IPv6 only is taken at that."""
    four, six = part(endpoint("10.0.0.1", "a")), part(endpoint("fd00::1", "a"), endpoint("fd00::2", "b"), family="IPv6")
    for slices in ([four, six], [six, four]):
        assert {each.address for each in found_in(slices, 8001)} == {"10.0.0.1:8001", "[fd00::2]:8001"}


def test_a_pod_that_moves_between_slices_is_one_engine() -> None:
    """For a moment it is in both: the one that says more is believed."""
    old, new = part(endpoint("10.0.0.1", "a", ready=False)), part(endpoint("10.0.0.1", "a", ready=True))
    assert found_in([old, new], "grpc") == found_in([new, old], "grpc") == {Found("a", "10.0.0.1:8001")}


@pytest.mark.parametrize(("port", "address"), [("grpc", "h:8001"), (8001, "h:8001"), ("http", "h:9"), (8002, None)])
def test_a_port_is_meant_by_name_or_number(port: str | int, address: str | None) -> None:
    """One that a slice does not have is no engine's."""
    slices = [part(endpoint("h"), ports=[{"name": "http", "port": 9}, {"name": "grpc", "port": 8001}])]
    assert {each.address for each in found_in(slices, port)} == ({address} if address else set())


def test_a_name_may_have_another_number_in_each_slice() -> None:
    """As in a rollout that changes a container's port; a slice with no port at all has no engine."""
    slices = [
        part(endpoint("a")),
        part(endpoint("b"), ports=[{"name": "grpc", "port": 8005}]),
        part(endpoint("c"), ports=[]),
        part(endpoint("d"), ports=[{"name": "grpc", "port": None}]),
        {"addressType": "IPv4", "ports": None, "endpoints": None},
    ]
    assert {each.address for each in found_in(slices, "grpc")} == {"a:8001", "b:8005"}


def test_a_port_without_a_name() -> None:
    """A Service with one port need not name it."""
    assert {each.address for each in found_in([part(endpoint("h"), ports=[{"port": 7}])], "")} == {"h:7"}


def test_names_instead_of_addresses_are_not_read() -> None:
    """Slices of type FQDN are deprecated, and name no engine of a pool."""
    assert not found_in([part(endpoint("gpu.example"), family="FQDN")], "grpc")


@pytest.mark.parametrize(
    ("host", "service"),
    [
        ("triton", ("triton", "own")),
        ("triton.ml", ("triton", "ml")),
        ("triton.ml.svc", ("triton", "ml")),
        ("Triton.ml.svc.cluster.local.", ("triton", "ml")),
        ("10.0.0.1", None),
        ("gpu-1.pool.example.com", None),
        ("fd00::1", None),
    ],
)
def test_hosts_that_may_be_services(host: str, service: tuple[str, str] | None) -> None:
    """By the forms that a cluster's DNS has."""
    assert service_of(host, "own") == service
