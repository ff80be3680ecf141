"""No file imports, at once, later or for its types only, one that imports it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
STILL = {
    frozenset({"sidecar.core.state", "sidecar.core.whereabouts"}),
    frozenset({"sidecar.fronts.kserve.infer", "sidecar.fronts.kserve.stream"}),
}
"""The pairs that are left."""


def test_no_circle_between_files() -> None:
    files = {_name(path): path for room in ("sidecar", "policies") for path in (ROOT / room).rglob("*.py")}
    imports = {name: set(_imports(path, files)) - {name} for name, path in files.items()}
    for pair in STILL:
        assert all(pair - {name} <= imports[name] for name in pair), f"no circle any more: {sorted(pair)}"
        imports[min(pair)] -= pair
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _imports(path: Path, files: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for each in node.names:
                name = f"{node.module}.{each.name}"
                yield from {name, node.module} & files.keys() if name not in files else {name}
        elif isinstance(node, ast.Import):
            yield from {each.name for each in node.names} & files.keys()
