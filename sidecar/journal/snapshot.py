"""A copy of the core's state that another thread can write at leisure.

Turning ten thousand queued requests into JSON must not block the event loop. So the loop copies and a thread encodes.
Immutable values (numbers, strings, frozen dataclasses) are shared. The rest is copied by functions that are built once
from the types of the fields, so a new field of the core needs no line here.
"""

from __future__ import annotations

import gc
import types
from collections import deque
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from operator import attrgetter
from typing import Any, Union, get_args, get_origin, get_type_hints

from policies.id_queue import IdQueue
from sidecar.core.state import State

Copier = Callable[[Any], Any]

_ATOMS = (int, float, str, bool, type(None), None)


class PolicySnapshot:
    """Stands for a policy in a copied state, whose `snapshot()` was `held`. No dataclass, which would be a record."""

    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held


def snapshot_of(state: State) -> State:
    """Return a copy that later steps do not change. Call it between steps, on the loop that owns the core."""
    was_enabled = gc.isenabled()
    gc.disable()  # none of these thousands of new objects is garbage, and a collection costs more than the copy
    try:
        copied: State = _dataclass_copier(State)(state)
    finally:
        if was_enabled:
            gc.enable()
    return copied


def _copier(hint: Any) -> Copier | None:
    """Return the copier for values of a type; None if they can be shared."""
    if hint in _ATOMS or (isinstance(hint, type) and issubclass(hint, Enum)):
        return None
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _union_copier(arguments)
    if origin is tuple:
        assert all(_copier(argument) is None for argument in arguments if argument is not Ellipsis), hint
        return None
    if origin is list:
        return _list_copier(_copier(arguments[0]))
    if origin is dict:
        assert _copier(arguments[0]) is None, hint
        return _dict_copier(_copier(arguments[1]))
    if origin is deque:
        return _deque_copier(_copier(arguments[0]))
    if hint is IdQueue:
        return IdQueue
    assert is_dataclass(hint), f"the core's state holds a {hint}, for which there is no copier"
    cls: Any = hint
    return None if cls.__dataclass_params__.frozen else _dataclass_copier(cls)


def _union_copier(arguments: tuple[Any, ...]) -> Copier | None:
    copiers = [copier for argument in arguments if (copier := _copier(argument)) is not None]
    assert not copiers, f"one of {arguments} changes in place: a union cannot say which"
    return None


def _list_copier(item: Copier | None) -> Copier:
    return list if item is None else lambda held: [item(value) for value in held]


def _dict_copier(value: Copier | None) -> Copier:
    return dict if value is None else lambda held: {key: value(kept) for key, kept in held.items()}


def _deque_copier(item: Copier | None) -> Copier:
    if item is None:
        return lambda held: held.copy()
    return lambda held: deque((item(value) for value in held), maxlen=held.maxlen)


@cache
def _dataclass_copier(cls: Any) -> Copier:
    hints = get_type_hints(cls)
    names: list[str] = []
    copiers: list[tuple[int, Copier]] = []
    for field in fields(cls):
        if not field.init:
            assert field.metadata.get("derived"), f"{cls.__name__} cannot be made with its {field.name}"
            continue
        if field.metadata.get("policy"):
            copiers.append((len(names), lambda policy: PolicySnapshot(policy.snapshot())))
        elif field.metadata.get("derived"):
            copiers.append((len(names), lambda derived: type(derived)()))
        elif (copier := _copier(hints[field.name])) is not None:
            copiers.append((len(names), copier))
        names.append(field.name)
    assert len(names) > 1, f"{cls.__name__} has one field: attrgetter would return no tuple"
    values_of: Callable[[Any], tuple[Any, ...]] = attrgetter(*names)

    def copy(held: Any) -> Any:
        values = list(values_of(held))
        for index, copier in copiers:
            values[index] = copier(values[index])
        return cls(*values)

    return copy
