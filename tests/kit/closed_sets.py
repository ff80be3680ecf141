"""Compare a closed set with the handlers of its members: unions, enums, tables by member, and cases of a match."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any, get_args


def members_of(closed: Any) -> list[str]:
    """Return the names of the members of an enum, of a union of classes, or of an iterable."""
    if isinstance(closed, type) and issubclass(closed, Enum):
        return list(closed.__members__)
    return [_name_of(member) for member in get_args(closed) or closed]


def _name_of(member: Any) -> str:
    if isinstance(member, Enum):
        return member.name
    return member if isinstance(member, str) else member.__name__


def differences(closed: Any, handled: Any, what: str) -> list[str]:
    """Return a sentence for each member that the set or its handlers lack; nothing if they agree."""
    members, names = members_of(closed), members_of(handled)
    lacking = [f"{name} is not among {what}: add it" for name in members if name not in names]
    strange = [f"{what} name {name}, which is no member any more" for name in names if name not in members]
    return lacking + strange


def cases_of(function: Callable[..., Any]) -> list[str]:
    """Return the names of the classes and enum members in the cases of a function's match statements."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    patterns = [each for each in ast.walk(tree) if isinstance(each, ast.MatchClass | ast.MatchValue)]
    named = [each.cls if isinstance(each, ast.MatchClass) else each.value for each in patterns]
    return [each.attr if isinstance(each, ast.Attribute) else ast.unparse(each) for each in named]


def classes_in(module: ModuleType) -> list[type]:
    """Return the dataclasses that a module defines."""
    own = (each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__)
    return [each for each in own if is_dataclass(each)]


def made_in(*folders: Path) -> set[str]:
    """Return the names of the classes that Python files below some folders instantiate."""
    texts = (path.read_text() for folder in folders for path in folder.rglob("*.py"))
    return {name for text in texts for name in re.findall(r"\b([A-Z]\w+)\(", text)}


def named_in(closed: type[Enum], folder: Path) -> set[str]:
    """Return the members of an enum that Python files below a folder name, as in `Fault.MISS`."""
    texts = (path.read_text() for path in folder.rglob("*.py"))
    return {name for text in texts for name in re.findall(rf"\b{closed.__name__}\.([A-Z_]+)\b", text)}


def without(names: Iterable[Any], *left_out: Any) -> list[Any]:
    """Return a table's members without those that are handled elsewhere."""
    return [name for name in names if name not in left_out]
