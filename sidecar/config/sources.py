"""What is written of the configuration, as plain data: in a file, in the environment, in options.

A later setting overrides an earlier one. `source_of` finds where a value is written, for messages about it.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from sidecar.errors import Misused, Reason
from sidecar.files import DOCUMENT_BYTES_MAX, read_regular_or_piped

PREFIX = "LORA_SIDECAR_"
_SERVICE_LINK = re.compile(
    r"SERVICE_HOST|SERVICE_PORT(_[A-Z0-9]+)*|PORT|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?"
)
"""Variables that Kubernetes sets in every pod of a namespace for a Service named lora-sidecar."""
_TYPES = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


@dataclass(frozen=True)
class Setting:
    """A value at a path of keys, and where it is written: a file's path, a variable's name or an option."""

    path: tuple[str, ...]
    value: Any
    source: str


def in_file(path: Path) -> Setting:
    """Return what a file says. Raises Misused if it cannot be read or has no keys."""
    try:
        record = data_of(read_regular_or_piped(path, DOCUMENT_BYTES_MAX), str(path))
    except OSError as error:
        raise Misused(Reason.CONFIG_INVALID, f"configuration {path}: {error.strerror}") from error
    if not isinstance(record, dict | None):
        raise Misused(Reason.CONFIG_INVALID, f"{path}: the top level must be keys, as in store: …")
    return Setting((), record or {}, str(path))


def in_environment(environment: Mapping[str, str]) -> Iterator[Setting]:
    """Yield what the variables say, in the order of their names. `LORA_SIDECAR_STORE__MEMORY_BYTES` is
    store.memory_bytes. Raises Misused for a value that cannot be read as YAML.
    """
    for name, text in sorted(environment.items()):
        key = name.removeprefix(PREFIX)
        if name.startswith(PREFIX) and _SERVICE_LINK.fullmatch(key) is None:
            yield Setting(tuple(key.lower().split("__")), data_of(text, name), name)


def data_of(text: str | bytes, source: str) -> Any:
    """Return the data of a YAML text. Raises Misused, which names the source and the line and repeats no value."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        why = f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else str(error).partition("\n")[0]
        raise Misused(Reason.CONFIG_INVALID, f"{source}: it cannot be read as YAML: {why}") from error
    except RecursionError as error:
        raise Misused(Reason.CONFIG_INVALID, f"{source}: it is nested too deeply") from error


def merged(settings: Sequence[Setting]) -> Any:
    """Return all settings in one record. Raises Misused for one whose path leads through a value."""
    record: Any = {}
    for setting in settings:
        record = _with(record, setting, 0)
    return record


def source_of(settings: Sequence[Setting], path: Sequence[str]) -> str:
    """Return where the value at a path is written: several sources, if its parts are, else that of what encloses it."""
    path, found = tuple(path), []
    for setting in reversed(settings):
        if path[: len(setting.path)] == setting.path:
            if _has(setting.value, path[len(setting.path) :]):
                found.append(setting.source)
            break  # it replaces all that is written before
        if setting.path[: len(path)] == path:
            found.append(setting.source)
    return " and ".join(dict.fromkeys(reversed(found))) if found or not path else source_of(settings, path[:-1])


def _with(record: Any, setting: Setting, depth: int) -> Any:
    """Return a copy of a record with a setting in it; parts of a record may be one object, by YAML's aliases."""
    if depth == len(setting.path):
        return setting.value
    if not isinstance(record, dict | None):
        whole = ".".join(setting.path[:depth])
        a_list = ": it is a list, which is set as a whole" if isinstance(record, list | tuple) else ""
        raise Misused(Reason.CONFIG_INVALID, f"{setting.source}: {whole} has no keys of its own{a_list}")
    key = setting.path[depth]
    if not key:
        raise Misused(Reason.CONFIG_INVALID, f"{setting.source}: it names no key")
    return (record or {}) | {key: _with((record or {}).get(key), setting, depth + 1)}


def _has(value: Any, path: Sequence[str]) -> bool:
    for key in path:
        if isinstance(value, dict):
            named = {str(each): held for each, held in value.items()}
            if key not in named:
                return False
            value = named[key]
    return True


class _Loader(yaml.SafeLoader):
    """YAML with the types of JSON: a date is text. A key that is written twice is refused."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _TYPES or tag.endswith(":merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {
        tag: constructor for tag, constructor in yaml.SafeLoader.yaml_constructors.items() if tag in {*_TYPES, None}
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse duplicates here, where keys are as written: later `<<` may have added some."""
        node = super().compose_mapping_node(anchor)
        seen: dict[Hashable, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
                name, line = self.construct_object(key), key.start_mark.line + 1
                if name in seen:
                    raise ConstructorError(
                        None, None, f"the key {name} is written twice, first in line {seen[name]}", key.start_mark
                    )
                seen[name] = line
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError) as error:  # such as !!int x
            raise ConstructorError(None, None, f"this is no {node.tag.rpartition(':')[2]}", node.start_mark) from error
