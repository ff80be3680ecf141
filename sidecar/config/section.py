"""The base class of configuration sections, and the messages for problems in them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from sidecar.config.redis_address import without_users


class Section(BaseModel):
    """A part of the configuration: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Tls(Section):
    """PEM files. A listener needs certificate and key; `ca` makes it ask its clients for theirs."""

    certificate: str | None = None
    key: str | None = None
    ca: str | None = None


def changed(section: Section) -> set[str]:
    """Return the keys that are not at their defaults."""
    return {name for name, field in type(section).model_fields.items() if getattr(section, name) != field.default}


def problems(error: ValidationError, model: type[BaseModel], within: Sequence[str] = ()) -> Iterator[str]:
    """Yield each problem as "key: what is wrong", with the nearest known key for an unknown one.

    `within` is the section's path in the configuration.
    """
    for problem in error.errors():
        key = ".".join(str(part) for part in (*within, *problem["loc"]))
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(problem["loc"][-1]), sorted(_keys(model)), n=1)
            yield f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")
        else:
            given = without_users(repr(problem["input"]))
            yield f"{key}: {problem['msg'].removeprefix('Value error, ')} (it is {given:.80})"


def _keys(model: type[BaseModel]) -> set[str]:
    """Return the keys of a section and of all sections in it."""
    found: set[str] = set()
    for name, field in model.model_fields.items():
        found.add(name)
        for section in _sections_in(field.annotation):
            found |= _keys(section)
    return found


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_in(part)
