"""The base class of configuration sections, and the messages for problems in them."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from ipaddress import ip_address
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_core import ErrorDetails

from sidecar.config.redis_address import without_users

OF_A_KEY = "[key]"
"""The last part of a problem's location if it is about the key and not about its value."""
SHOWN_CHARACTERS_MAX = 80
LISTED_MAX = 6
"""Of a section with so few keys they are listed where one is unknown."""
_SECRET = re.compile(r"(^|_)(key|password|secret|token)(_file)?$")
"""Keys that hold secrets, or files of secrets, in whose place a secret may be written by mistake."""
_SHOULD = re.compile(r"^\w+ should ")
_KEYS, _WHOLE, _NUMBER, _BOOL = "keys with their values", "a whole number", "a number", "true or false"
_WANTED = {
    "model_type": _KEYS,
    "dict_type": _KEYS,
    "tuple_type": "a list",
    "string_type": "text",
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_from_float": _WHOLE,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": "a finite number",
    "bool_type": _BOOL,
    "bool_parsing": _BOOL,
}
"""What is expected, by pydantic's type of error."""


LOOPBACK = ("localhost", "127.0.0.1", "::1")
NUMBER_MAX = 1e12
"""Largest number with a fraction: as a duration 30,000 years. It is multiplied, and must stay finite."""
_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[^\s:/@?#\[\]]+):([0-9]{1,5})")


def is_address(text: str, port_min: int = 1) -> bool:
    """Return True for HOST:PORT, where an IPv6 address is in brackets."""
    found = _ADDRESS.fullmatch(text)
    return found is not None and port_min <= int(found[1]) < 1 << 16


def one_spelling(address: str) -> str:
    """Return HOST:PORT in one spelling: all names of this machine's loopback are one, and so are spellings of an IPv6.

    No name is looked up: what it means may change, and a check of a file must not wait for a name server.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]").lower().rstrip(".")
    with suppress(ValueError):
        host = str(ip_address(host))
    return f"{'localhost' if host in LOOPBACK else host}:{port}"


class Section(BaseModel):
    """A part of the configuration: immutable; unknown keys, infinity, NaN and numbers beyond `NUMBER_MAX` refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _is_no_immense_number(cls, value: Any) -> Any:
        for number in value.values() if isinstance(value, dict) else (value,):
            if isinstance(number, float) and number > NUMBER_MAX:
                raise ValueError(f"{number:g} is more than {NUMBER_MAX:g}; write a smaller number")
        return value


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
        yield told(problem, model, within)


def told(problem: ErrorDetails, model: type[BaseModel], within: Sequence[str] = ()) -> str:
    """Return a problem in a section as "key: what is wrong". Of values, which may be secrets, only short ones are
    shown; of sections the keys.
    """
    loc = [str(part) for part in problem["loc"] if part != OF_A_KEY]
    key = ".".join((*within, *loc))
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        own = {name: name for name in _section_at(model, loc[:-1]).model_fields}
        if path := _near(loc[-1], own):
            return f"unknown key {key}; did you mean {path}?"
        if len(own) <= LISTED_MAX and len(loc) > 1:  # such a section is nothing that another one's key is meant for
            return f"unknown key {key}; {key.rpartition('.')[0]} has {', '.join(own)}"
        path = _near(loc[-1], dict(_paths(model)))
        return f"unknown key {key}" + (f"; did you mean {path}?" if path else "")
    what = f"{key} as a key" if OF_A_KEY in problem["loc"] else key
    shown = _shown(loc, problem)
    return f"{what}: {_wrong(problem)}{shown}{_written(model, loc, problem) if shown else ''}".removeprefix(": ")


def _wrong(problem: ErrorDetails) -> str:
    """Return what is wrong, without pydantic's words for Python's types."""
    wanted = _WANTED.get(problem["type"])
    if wanted is None:
        return _SHOULD.sub("it must ", problem["msg"].removeprefix("Value error, "))
    in_quotes = problem["type"] == "string_type" and isinstance(problem["input"], int | float)
    in_seconds = wanted is _NUMBER and re.search(r"_s(_max)?$", str(problem["loc"][-1])) is not None
    return f"it must be {wanted}{' of seconds' if in_seconds else ''}" + ("; put it into quotes" if in_quotes else "")


def _shown(loc: Sequence[str], problem: ErrorDetails) -> str:
    """Return the value in brackets: of a section its keys, and nothing of a list, of what is long or of a secret."""
    value = problem["input"]
    if problem["type"] == "missing" or (loc and _SECRET.search(loc[-1])):
        return ""
    if isinstance(value, dict):
        text = f"its keys are {', '.join(map(str, value))}" if value else "it has no keys"
    elif value is None or isinstance(value, str | int | float):
        text = f"it is {without_users(json.dumps(value, ensure_ascii=False))}"
    else:
        return ""
    return f" ({text})" if len(text) <= SHOWN_CHARACTERS_MAX else ""


def _written(model: type[BaseModel], loc: Sequence[str], problem: ErrorDetails) -> str:
    """Return how to write a text that stands where a section is expected, if one key of that is what it must be."""
    if problem["type"] not in ("model_type", "dict_type") or not isinstance(problem["input"], str) or not loc:
        return ""
    is_engine = len(loc) == 2 and loc[0] == "backends"  # these are read later, by their kinds
    known = ("url",) if is_engine else _section_at(model, loc).model_fields
    name = next((each for each in ("address", "url", "serve", "name") if each in known), None)
    if name is None:
        return ""
    section = f"{{{name}: {without_users(json.dumps(problem['input'], ensure_ascii=False))}}}"
    return f"; write {'- ' if is_engine else f'{loc[-1]}: '}{section}"


def _section_at(model: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    for part in path:
        if part in model.model_fields:  # not an index, or a name that the user chose
            model = next(_sections_in(model.model_fields[part].annotation), model)
    return model


def _near(key: str, known: Mapping[str, str]) -> str:
    """Return the path of the known key that is most like a key; "" if none is."""
    near = difflib.get_close_matches(key, known, n=1)
    return known[near[0]] if near else ""


def _paths(model: type[BaseModel], within: str = "") -> Iterator[tuple[str, str]]:
    """Yield each key of a section and of all sections in it, with its path; those of the section itself come last."""
    for name, field in model.model_fields.items():
        for section in _sections_in(field.annotation):
            yield from _paths(section, f"{within}{name}.")
    for name in model.model_fields:
        yield name, f"{within}{name}"


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_in(part)
