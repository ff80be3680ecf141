"""Count the product by room: lines, statements, rooms, floors, and circles of imports.

    python -m tools.house [--json] [--entry MODULE …] [--no-run]

A room is a direct child of `sidecar` or of `sidecar/lab`, a package or a single module, and `policies`. `__init__` and
`__main__` of `sidecar` and of `sidecar/lab` are no rooms; their lines count in the totals. Generated code
(`sidecar/proto`) is a room without lines. A statement is an `ast.stmt` that is not a docstring.

"serve" is counted twice:

* static closure: the modules that can be reached from the entry modules by any `import`, those inside functions
  included, by the packages around each module, and by strings that name a module (`package.module:Class`, as
  registries and `python -m` have them). Imports under `if TYPE_CHECKING` are not followed. The command table
  (`sidecar/cli/__init__.py`) counts itself, and what it imports for other commands does not: it is not followed.
* run: what a process imports that really serves, without engines, until it is ready.

The entries are the module of the `serve` command's function, found by the command line's own table, and each module
given by --entry. Floors are the longest chain of rooms in the graph of imports; a circle of rooms counts as one floor.
The graph has all imports of both rooms' modules, lazy ones and those under TYPE_CHECKING included. Strings count for
the closure only: a registry may name what it does not know.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("sidecar", "policies")
GENERATED = "sidecar.proto"
NESTED = "sidecar.lab"
"""The package whose children are rooms, too."""
COMMAND_TABLES = ("sidecar", "sidecar.cli", "sidecar.__main__")
NAMED = re.compile(r"([a-z_][\w]*(?:\.[\w]+)+)(?::[\w.]+)?")

SERVES = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=open(sys.argv[1], "w")))
from sidecar.cli import run
sys.exit(run(sys.argv[2:]))
"""


@dataclass
class Module:
    """One file of the product.

    `imports` are the product's modules that it imports at run time, `types` those for types only, `strings` those that
    its strings name.
    """

    name: str
    lines: int
    statements: int
    imports: set[str] = field(default_factory=set)
    types: set[str] = field(default_factory=set)
    strings: set[str] = field(default_factory=set)


@dataclass
class Size:
    modules: int = 0
    lines: int = 0
    statements: int = 0

    def add(self, module: Module) -> None:
        self.modules += 1
        self.lines += module.lines
        self.statements += module.statements


def read(root: Path = ROOT) -> dict[str, Module]:
    """Return every module of the product by its dotted name; generated ones have no lines."""
    files = {_dotted(path, root): path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))}
    modules = {}
    for name, path in files.items():
        text = path.read_text()
        tree = ast.parse(text)
        if _is_within(name, GENERATED):
            modules[name] = Module(name, 0, 0)
        else:
            modules[name] = Module(name, len(text.splitlines()), statements(tree))
        _collect(tree, modules[name], path.name == "__init__.py", files)
    return modules


def _dotted(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def _is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def statements(tree: ast.AST) -> int:
    """Count statements without docstrings."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    return sum(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in nodes)


def _collect(tree: ast.Module, module: Module, is_package: bool, known: Iterable[str]) -> None:
    for node, for_types in _walk(tree, False):
        found = module.types if for_types else module.imports
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.update(_known_part(alias.name, known))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.name.split(".")
                kept = len(parts) - node.level + is_package
                base = ".".join([*parts[:kept], *([node.module] if node.module else [])])
            for alias in node.names:
                found.update(_known_part(f"{base}.{alias.name}", known))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            match = NAMED.fullmatch(node.value)
            if match and match[1] in known:
                module.strings.add(match[1])
    for names in (module.imports, module.types, module.strings):
        names.discard(module.name)


def _known_part(name: str, known: Iterable[str]) -> set[str]:
    """Return the module at the start of a dotted name: `a.b` for `a.b.C`."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return {name} if name else set()


def _walk(node: ast.AST, for_types: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Yield each node, and True if only type checkers use it."""
    yield node, for_types
    for name, value in ast.iter_fields(node):
        within = for_types or (name == "body" and isinstance(node, ast.If) and _is_for_types(node.test))
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _walk(child, within)


def _is_for_types(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def closure(modules: Mapping[str, Module], entries: Iterable[str]) -> set[str]:
    """Return the modules that the entries reach. Raises SystemExit for an entry that is no module."""
    waiting, reached = list(entries), set[str]()
    for entry in waiting:
        if entry not in modules:
            raise SystemExit(f"--entry {entry}: there is no such module")
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        around = name.rpartition(".")[0]
        if around in modules:  # proto is a namespace package: it has no __init__
            waiting.append(around)
        if name not in COMMAND_TABLES:
            waiting += modules[name].imports | modules[name].strings
    return reached


def serve_module() -> str:
    """Return the module whose function the `serve` command calls."""
    from tools.commands import root_command

    root = root_command()
    command = root.get_command(root.context_class(root), "serve")
    return str(getattr(command.callback, "__wrapped__", command.callback).__module__)


def run_serving() -> set[str]:
    """Return the modules that a serving process imports. Raises SystemExit if it does not start."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "modules.json")
        options = ["serve", "--json", "--data-directory", folder, "--probes", "127.0.0.1:0"]
        for listener in ("--listen", "--admin", "--http"):
            options += [listener, "127.0.0.1:0"]
        command = [sys.executable, "-c", SERVES, str(file), *options]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
        if not ready or not file.exists():
            raise SystemExit(f"sidecar serve did not come up: {errors}")
        return set(json.loads(file.read_text()))


@cache
def room_of(name: str) -> str:
    """Return the room of a module, or "" if it is in none."""
    parts = name.split(".")
    if parts[0] == "policies":
        return "policies"
    depth = 2 if _is_within(name, NESTED) else 1
    room = ".".join(parts[1 : depth + 1])
    return "" if len(parts) <= depth or parts[depth] == "__main__" else room


def graph_of(modules: Mapping[str, Module]) -> dict[str, set[str]]:
    """Return the rooms that each room imports."""
    graph: dict[str, set[str]] = {room: set() for room in sorted({room_of(name) for name in modules} - {""})}
    for name, module in modules.items():
        room = room_of(name)
        if room:
            graph[room] |= {room_of(other) for other in module.imports | module.types} - {room, ""}
    return graph


def circles_of(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the circles: sets of rooms that import each other directly or indirectly (strongly connected parts)."""
    reach = {room: _reached(graph, room) for room in graph}
    circles = {tuple(sorted(other for other in reach[room] if room in reach[other])) for room in graph}
    return [list(circle) for circle in sorted(circles) if len(circle) > 1]


def _reached(graph: Mapping[str, set[str]], start: str) -> set[str]:
    reached, waiting = set[str](), list(graph[start])
    while waiting:
        room = waiting.pop()
        if room not in reached:
            reached.add(room)
            waiting += graph[room]
    return reached


def floors_of(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the rooms by floor, the lowest first: a room is above all that it imports, except rooms of its circle."""
    beside = {room: circle for circle in circles_of(graph) for room in circle}

    @cache
    def height(room: str) -> int:
        circle = beside.get(room, [room])
        below = set[str]().union(*(graph[one] for one in circle)) - set(circle)
        return 1 + max((height(beside.get(other, [other])[0]) for other in below), default=0)

    floors: dict[int, list[str]] = defaultdict(list)
    for room in graph:
        floors[height(beside.get(room, [room])[0])].append(room)
    return [floors[level] for level in sorted(floors)]


def sizes(modules: Mapping[str, Module], names: Iterable[str]) -> tuple[Size, dict[str, Size]]:
    """Return the total size of some modules, and the size by room ("" for modules in no room)."""
    total, rooms = Size(), defaultdict[str, Size](Size)
    for name in sorted(names):
        if name in modules and modules[name].lines:
            total.add(modules[name])
            rooms[room_of(name)].add(modules[name])
    return total, dict(rooms)


def measure(entries: Iterable[str], runs: bool) -> dict[str, Any]:
    """Return all figures as JSON values."""
    modules = read()
    graph = graph_of(modules)
    kinds: dict[str, Iterable[str]] = {"all": modules, "serve": closure(modules, entries)}
    if runs:
        kinds["run"] = run_serving()
    record: dict[str, Any] = {"entries": sorted(entries)}
    for kind, names in kinds.items():
        total, rooms = sizes(modules, names)
        record[kind] = asdict(total) | {"rooms": {room: asdict(rooms[room]) for room in sorted(rooms)}}
    record["serve"]["names"] = sorted(kinds["serve"])
    if runs:
        record["run"]["unforeseen"] = sorted((set(kinds["run"]) & set(modules)) - set(kinds["serve"]))
    record["rooms"] = {room: sorted(graph[room]) for room in graph}
    record["modules_that_are_rooms"] = sorted(room for room in graph if f"sidecar.{room}" in modules and _is_file(room))
    record["floors"] = floors_of(graph)
    record["circles"] = circles_of(graph)
    return record


def _is_file(room: str) -> bool:
    return (ROOT / "sidecar" / room.replace(".", "/")).with_suffix(".py").is_file()


def tell(record: Mapping[str, Any]) -> None:
    kinds = [kind for kind in ("all", "serve", "run") if kind in record]
    print(f"{'room':24}" + "".join(f"{kind + ' lines':>13}{'stmts':>8}" for kind in kinds))
    for room in sorted(set().union(*(record[kind]["rooms"] for kind in kinds))):
        _row(room or "(in no room)", [record[kind]["rooms"].get(room) for kind in kinds])
    _row("total", [record[kind] for kind in kinds])
    print(f"\nserve: static closure of {', '.join(record['entries'])}")
    unforeseen = record.get("run", {}).get("unforeseen", [])
    if unforeseen:
        rooms = sorted({room_of(name) for name in unforeseen})
        print(f"run: {len(unforeseen)} modules beyond the closure (--json names them), of {', '.join(rooms)}")
    files = record["modules_that_are_rooms"]
    print(f"rooms: {len(record['rooms'])}, {len(files)} of them single modules: {', '.join(files)}")
    print(f"floors: {len(record['floors'])}")
    for level, rooms in enumerate(record["floors"], start=1):
        print(f"  {level:2} {', '.join(rooms)}")
    print(f"circles: {len(record['circles'])}")
    for circle in record["circles"]:
        print(f"     {', '.join(circle)}")


def _row(name: str, found: list[Mapping[str, int] | None]) -> None:
    cells = (f"{size['lines']:13,}{size['statements']:8,}" if size else " " * 21 for size in found)
    print(f"{name:24}" + "".join(cells).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the product by room.")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.add_argument("--entry", action="append", default=[], help="one more module that serving begins with")
    parser.add_argument("--no-run", action="store_true", help="do not start a process that serves")
    options = parser.parse_args()
    record = measure([serve_module(), *options.entry], not options.no_run)
    if options.json:
        print(json.dumps(record, indent=1))
    else:
        tell(record)


if __name__ == "__main__":
    main()
