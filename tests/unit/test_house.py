"""The rooms of the product keep to their number, their order, and what a serving process may reach."""

from __future__ import annotations

import pytest

from tools.house import Module, circles_of, closure, floors_of, graph_of, read, room_of, serve_module

ROOMS_MAX, FLOORS_MAX = 32, 12


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    return read()


def test_rooms_floors_and_circles(modules: dict[str, Module]) -> None:
    graph = graph_of(modules)
    assert len({room_of(name) for name in modules}) <= ROOMS_MAX
    assert len(floors_of(graph)) <= FLOORS_MAX
    assert circles_of(graph) == []


def test_serve_reaches_nothing_of_the_lab(modules: dict[str, Module]) -> None:
    """Function-level imports and names of modules in strings count too."""
    reached = closure(modules, [serve_module()])
    assert "sidecar.serve.app" in reached
    assert [name for name in reached if name.startswith("sidecar.lab")] == []


@pytest.mark.parametrize(("arrows", "circle"), [({"a": {"b"}, "b": {"a"}}, True), ({"a": {"b"}, "b": set()}, False)])
def test_a_circle_is_found(arrows: dict[str, set[str]], circle: bool) -> None:
    assert bool(circles_of(arrows)) == circle
