"""Write the reference of the configuration's keys from its models."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sidecar.backends.kind import Kind
from sidecar.backends.registry import kinds
from sidecar.config import Config
from sidecar.config.backends import Backend

TITLE = "# Configuration keys"
INTRODUCTION = """
Every key of the configuration file, with its type, its bounds and its default.
[Configuration](configuration.md) explains how a file is read and has a commented example.

A key is written as the path of its sections: `store.memory_bytes` is `memory_bytes` in the section `store`.
`backends[]` is an entry of the list `backends`, and `NAME` stands for a name that you choose.
"""
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_TYPES = {str: "text", int: "integer", float: "number", bool: "true or false", types.NoneType: "null"}


MEANINGS = Path(__file__).with_name("configuration_meanings.yaml")


def page() -> str:
    """Return the page. Raises ValueError for a key without a meaning, and for a meaning without its key."""
    sections = _sections()
    known = dict(sections)
    parts = [TITLE, INTRODUCTION.strip()]
    for model, paths in sections:
        parts += [_heading(paths), *_where(paths), *_description(model), _table(model, known)]
        if model is Backend:
            parts += [_of_kind(kind, known) for kind in kinds()]
    _check_meanings(known)
    return "\n\n".join(parts) + "\n"


def _sections() -> list[tuple[type[BaseModel], list[str]]]:
    """Return every model of the configuration and its paths; models with several paths come last."""
    found: dict[type[BaseModel], list[str]] = {}
    _walk(Config, "", found)
    for kind in kinds():
        for name, field in kind.section.model_fields.items():
            for nested, suffix in _nested(field.annotation) if name not in Backend.model_fields else ():
                _walk(nested, f"backends[].{name}{suffix}", found)
    alone = [(model, paths) for model, paths in found.items() if len(paths) == 1]
    return alone + [(model, paths) for model, paths in found.items() if len(paths) > 1]


def _walk(model: type[BaseModel], path: str, found: dict[type[BaseModel], list[str]]) -> None:
    found.setdefault(model, []).append(path)
    for name, field in model.model_fields.items():
        if model is Config and name == "backends":  # raw there: their kinds read them
            _walk(Backend, "backends[]", found)
        for nested, suffix in _nested(field.annotation):
            _walk(nested, f"{path}.{name}{suffix}".lstrip("."), found)


def _of_kind(kind: Kind, sections: Mapping[type[BaseModel], list[str]]) -> str:
    """Return a kind's own section: the keys that only it has, and the common keys that it refuses."""
    others = sorted(key for keys in kind.section.ELSEWHERE.values() for key in keys)
    schemes = " or ".join(f"`{scheme}://HOST:PORT`" for scheme in kind.section.SCHEMES)
    parts = [f"### `backends[]` of kind `{kind.name}`", f"By {schemes}.", *_description(kind.section)]
    parts.append(_table(kind.section, sections, without=Backend))
    refused = [key for key in others if _is_common(key)]
    if refused:
        parts.append(f"Refused for this kind: {', '.join(f'`{key}`' for key in refused)}.")
    return "\n\n".join(parts)


def _is_common(key: str) -> bool:
    section, _, name = key.rpartition(".")
    return name in (Backend if not section else type(Backend.model_fields[section].default)).model_fields


@cache
def _meanings() -> dict[str, dict[str, str]]:
    return yaml.safe_load(MEANINGS.read_text())


def _check_meanings(sections: Mapping[type[BaseModel], list[str]]) -> None:
    has = {(_title(paths), name) for model, paths in sections.items() for name in model.model_fields}
    for kind in kinds():
        has |= {
            (f"backends[] {kind.name}", name) for name in kind.section.model_fields if name not in Backend.model_fields
        }
    told = {(section, name) for section, names in _meanings().items() for name in names}
    if has != told:
        differ = ", ".join(f"{section}: {name}" for section, name in sorted(has ^ told))
        raise ValueError(f"{MEANINGS.name} and the configuration's keys differ in {differ}")


def _nested(annotation: Any, suffix: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _nested(arguments[0], suffix)
    elif origin in (tuple, list):
        yield from _nested(arguments[0], f"{suffix}[]")
    elif origin is not None and issubclass(origin if isinstance(origin, type) else object, Mapping):
        yield from _nested(arguments[1], f"{suffix}.NAME")
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            yield from _nested(argument, suffix)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, suffix


def _heading(paths: list[str]) -> str:
    if paths == [""]:
        return "## The top level"
    return f"## `{_title(paths)}`"


def _title(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else paths[0].rpartition(".")[2]


def _where(paths: list[str]) -> Iterator[str]:
    if len(paths) > 1:
        yield f"In {', '.join(f'`{path}`' for path in paths)}."


def _description(model: type[BaseModel]) -> Iterator[str]:
    lines = (model.__doc__ or "").strip().splitlines()
    text = "\n".join(line.strip() for line in lines)
    if text:
        yield text


def _table(
    model: type[BaseModel], sections: Mapping[type[BaseModel], list[str]], without: type[BaseModel] | None = None
) -> str:
    """Return the table of a model's keys, except those in `without`."""
    title = _title(sections[model]) if without is None else f"backends[] {next(iter(model.SCHEMES))}"  # type: ignore[attr-defined]
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if without is None or name not in without.model_fields:
            meaning = _meanings().get(title, {}).get(name, "")
            rows.append(f"| `{name}` | {_type(field, sections)} | {_default(field)} | {meaning} |")
    return "\n".join(rows)


def _type(field: FieldInfo, sections: Mapping[type[BaseModel], list[str]]) -> str:
    bounds = []
    for constraint in field.metadata:
        bounds += [
            f"{sign} {getattr(constraint, name):,}" for name, sign in _BOUNDS.items() if hasattr(constraint, name)
        ]
    return ", ".join([_type_text(field.annotation, sections), *bounds])


def _type_text(annotation: Any, sections: Mapping[type[BaseModel], list[str]]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(arguments[0], sections)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple and arguments[1:] != (Ellipsis,):
        return f"[{', '.join(_type_text(argument, sections) for argument in arguments)}]"
    if origin in (tuple, list):
        return f"list of {_type_text(arguments[0], sections)}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"{{{_type_text(arguments[0], sections)}: {_type_text(arguments[1], sections)}}}"
    if origin in (Union, types.UnionType):
        return " or ".join(_type_text(argument, sections) for argument in arguments if argument is not types.NoneType)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        title = _title(sections[annotation])
        return f"[section](#{''.join(letter for letter in title.lower() if letter.isalnum() or letter in '_-')})"
    return _TYPES.get(annotation, "any")


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "required"
    if default is None or default == "" or isinstance(default, BaseModel):
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, (tuple, list)):
        return "`[]`" if not default else f"`[{', '.join(map(str, default))}]`"
    if isinstance(default, dict):
        return f"`{{{', '.join(f'{key}: …' for key in default)}}}`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"
