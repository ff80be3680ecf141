"""Make mutants of Python source: one small fault each, at one place.

Operators: `compare` (< and <=, == and !=, is, in), `negate` (the condition of if, while, a conditional expression or a
comprehension), `not` (taken away), `and-or`, `constant` (one more, one less; a large one doubled, halved), `boolean`,
`min-max`, `plus-minus`, `break-continue`, `return` (None instead), and `remove` (a call, a raise, an augmented
assignment, an assignment to an attribute or an item).

Left alone: annotations, decorators, docstrings, imports, assertions, log lines, f-strings, and what is in a `raise`.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
NEGATED = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
"""Comparisons that `compare` inverts, so that `negate` would give the same mutant again."""
LARGE = 100
"""Larger constants are doubled and halved: a change by one would not be noticeable."""
SKIPPED = (ast.Import, ast.ImportFrom, ast.Assert, ast.JoinedStr, ast.Global, ast.Nonlocal)
NOT_READ = ("annotation", "returns", "decorator_list", "type_comment", "type_params")


@dataclass(frozen=True)
class Mutant:
    """`before` and `after` are the expression or statement that is changed, as `ast.unparse` writes it.

    `start` and `end` are bytes of the source that `text` replaces. `defined` is the line on which the function around
    begins, its decorators included, 0 for none. `ordinal` tells apart what is else equal.
    """

    room: str
    file: str
    line: int
    function: str
    operator: str
    before: str
    after: str
    start: int
    end: int
    text: str
    defined: int = 0
    ordinal: int = 0

    @property
    def id(self) -> str:
        """The mutant's id, which stays the same when its file moves."""
        return " | ".join((self.room, self.function, self.operator, self.before, self.after, str(self.ordinal)))


def apply(source: str, mutant: Mutant) -> str:
    raw = source.encode()
    return (raw[: mutant.start] + mutant.text.encode() + raw[mutant.end :]).decode()


def mutants_of(source: str, room: str = "", file: str = "") -> list[Mutant]:
    """Return all mutants of a file, in source order."""
    found = sorted(_Finder(source, room, file).mutants(), key=lambda mutant: (mutant.start, mutant.operator))
    return numbered(found)


def numbered(mutants: list[Mutant]) -> list[Mutant]:
    """Return the mutants with ordinals that make all ids differ."""
    seen = Counter[str]()
    result = []
    for mutant in mutants:
        plain = replace(mutant, ordinal=0)
        result.append(replace(mutant, ordinal=seen[plain.id]))
        seen[plain.id] += 1
    return result


class _Finder:
    def __init__(self, source: str, room: str, file: str) -> None:
        self._room = room
        self._file = file
        self._tree = ast.parse(source)
        self._starts = [0]
        for line in source.encode().splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def mutants(self) -> Iterator[Mutant]:
        yield from self._visit(self._tree, "", 0)

    def _visit(self, node: ast.AST, function: str, defined: int) -> Iterator[Mutant]:
        if isinstance(node, SKIPPED) or _is_docstring(node) or _is_logged(node) or _is_for_types(node):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            function = f"{function}.{node.name}" if function else node.name
            if not isinstance(node, ast.ClassDef):
                defined = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        for operator, changed in _changes(node):
            yield self._mutant(node, function, defined, operator, changed)
        for condition in _conditions(node):
            yield self._mutant(condition, function, defined, "negate", ast.UnaryOp(ast.Not(), condition))
        if isinstance(node, ast.Raise):
            return
        for name, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and name not in NOT_READ:
                    yield from self._visit(child, function, defined)

    def _mutant(self, node: ast.AST, function: str, defined: int, operator: str, changed: ast.AST) -> Mutant:
        assert isinstance(node, ast.expr | ast.stmt)
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        before, after = ast.unparse(node), ast.unparse(changed)
        text = f"({after})" if isinstance(node, ast.expr) else after
        start = self._starts[node.lineno - 1] + node.col_offset
        end = self._starts[node.end_lineno - 1] + node.end_col_offset
        place = (self._room, self._file, node.lineno, function)
        return Mutant(*place, operator, before, after, start, end, text, defined)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_logged(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and ast.unparse(node).startswith(("logger.", "logging."))


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield each operator that applies to a node, and the changed node."""
    match node:
        case ast.Compare():
            for place, operation in enumerate(node.ops):
                changed = copy.deepcopy(node)
                changed.ops[place] = COMPARED[type(operation)]()
                yield "compare", changed
        case ast.BoolOp():
            operation_ = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield "and-or", ast.BoolOp(operation_, node.values)
        case ast.UnaryOp(op=ast.Not()):
            yield "not", node.operand
        case ast.Constant(value=bool()):
            yield "boolean", ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            is_large = abs(node.value) > LARGE
            yield "constant", ast.Constant(node.value * 2 if is_large else node.value + 1)
            yield "constant", ast.Constant(node.value // 2 if is_large else node.value - 1)
        case ast.Call(func=ast.Name(id="min" | "max" as name)):
            swapped = {"min": "max", "max": "min"}[name]
            yield "min-max", ast.Call(ast.Name(swapped), node.args, node.keywords)
        case ast.BinOp(op=ast.Add() | ast.Sub()) if not (_is_joined(node.left) or _is_joined(node.right)):
            yield (
                "plus-minus",
                ast.BinOp(node.left, ast.Sub() if isinstance(node.op, ast.Add) else ast.Add(), node.right),
            )
        case _:
            yield from _changes_of_statement(node)


def _conditions(node: ast.AST) -> list[ast.expr]:
    """Return the conditions of a node, without those that another operator inverts."""
    match node:
        case ast.If() | ast.While() | ast.IfExp():
            found = [node.test]
        case ast.comprehension():
            found = node.ifs
        case _:
            found = []
    return [condition for condition in found if not _is_negated(condition)]


def _is_joined(node: ast.expr) -> bool:
    """Return True for a text or a sequence, which + joins and - does not support."""
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    return is_text or isinstance(node, ast.JoinedStr | ast.List | ast.Tuple | ast.ListComp)


def _is_negated(test: ast.expr) -> bool:
    """Return True if another operator inverts a condition."""
    is_not = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
    is_compared = isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], NEGATED)
    return is_not or is_compared or isinstance(test, ast.Constant)


def _changes_of_statement(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    match node:
        case ast.Break():
            yield "break-continue", ast.Continue()
        case ast.Continue():
            yield "break-continue", ast.Break()
        case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield "return", ast.Return(ast.Constant(None))
        case ast.Raise() | ast.AugAssign() | ast.Expr(value=ast.Call() | ast.Await()):
            yield "remove", ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript(), *_]):
            yield "remove", ast.Pass()
        case _:
            return
