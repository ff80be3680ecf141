"""A policy is pure: what its module imports and calls shows it."""

from __future__ import annotations

import ast
import inspect
import sys
from typing import Any

FORBIDDEN = frozenset({
    "asyncio", "datetime", "grpc", "httpx", "io", "logging", "os", "pathlib", "prometheus_client", "random", "redis",
    "secrets", "sidecar", "socket", "sqlite3", "subprocess", "threading", "time", "uuid",
})  # fmt: skip
FORBIDDEN_CALLS = frozenset({"hash", "id", "open", "print", "input", "eval", "exec", "__import__"})


def is_pure(policy: type[Any]) -> None:
    """The module imports no clock, randomness or I/O, and no decision can rest on hash() or id()."""
    module = sys.modules[policy.__module__]
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        for name in _imported(node):
            assert name.partition(".")[0] not in FORBIDDEN, (
                f"{module.__name__} imports {name}: a policy has no clock, randomness or I/O of its own; time is an "
                "argument, a seed is a constructor argument"
            )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, (
                f"{module.__name__} line {node.lineno} calls {node.func.id}(): the same events must give the same "
                "decisions in every process"
            )


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
