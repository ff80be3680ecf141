"""What mutants are made of a source, and how they are known again."""

from __future__ import annotations

import ast

import pytest

from tools.mutants import Result, compare, renamed, sample
from tools.mutating import apply, mutants_of
from tools.reach import instrumented

CHANGES = [
    ("if a < 1: f()", "compare", "a <= 1"),
    ("if a is None: f()", "compare", "a is not None"),
    ("while a and b: f()", "and-or", "a or b"),
    ("while a: f()", "negate", "not a"),
    ("x = [y for y in z if y]", "negate", "not y"),
    ("x = not y", "not", "y"),
    ("x = 5", "constant", "6"),
    ("x = 4096", "constant", "2048"),
    ("x = True", "boolean", "False"),
    ("x = min(a, b)", "min-max", "max(a, b)"),
    ("x = a - b", "plus-minus", "a + b"),
    ("for a in b: break", "break-continue", "continue"),
    ("def f(): return a", "return", "return None"),
    ("f(a)", "remove", "pass"),
    ("raise E(1)", "remove", "pass"),
    ("a.b = c", "remove", "pass"),
    ("a += c", "remove", "pass"),
]
LEFT_ALONE = [
    '"""Text."""',
    "import a",
    "x: 'list[1]'",
    "logger.info('x', 1)",
    "assert a < 1",
    "return_ = f'{1}'",
    "if TYPE_CHECKING:\n    x = 1",
    "def f(): return None",
    "x = 'a' + b",
    "@f(1)\ndef g(a: 'L[1]') -> 'L[2]': pass",
]


@pytest.mark.parametrize(("source", "operator", "after"), CHANGES)
def test_a_mutant_is_one_change(source: str, operator: str, after: str) -> None:
    (mutant,) = [one for one in mutants_of(source) if (one.operator, one.after) == (operator, after)]
    changed = ast.unparse(ast.parse(apply(source, mutant)))
    assert after in changed
    assert changed != ast.unparse(ast.parse(source))


@pytest.mark.parametrize("source", LEFT_ALONE)
def test_what_no_test_could_notice_is_left_alone(source: str) -> None:
    assert mutants_of(source) == []


def test_a_mutant_is_known_by_more_than_its_place() -> None:
    source = "class A:\n    @d\n    def f(self, b):\n        g(b, 'ä', 1)\n        return g(b, 1)\n"
    found = mutants_of(source, "room", "a.py")
    moved = mutants_of(f"import x\n\n\n{source}", "room", "elsewhere/b.py")
    assert [one.id for one in found] == [one.id for one in moved]
    assert len({one.id for one in found}) == len(found)
    assert {one.function for one in found} == {"A.f"}
    assert {one.defined for one in found} == {2}
    assert apply(source, found[1]).splitlines()[3].strip() == "g(b, 'ä', (2))"


def test_a_sample_stays_when_others_go() -> None:
    found = mutants_of("x = [1, 2, 3, 4, 5, 6, 7, 8, 9]", "core")
    taken = sample(found, 1, 4)
    assert len(taken) == 4
    assert sample([one for one in found if one in taken or one.before == "9"], 1, 4) in (taken, sample(found, 1, 4))
    assert sample(list(reversed(found)), 1, 4) == taken


def test_new_survivors_are_those_that_were_killed_or_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    one, two, three = mutants_of("x = a < b\ny = a is b\nz = not a", "core")
    results = [Result(one, "survived", 1.0), Result(two, "survived", 1.0), Result(three, "killed", 1.0)]
    records = [
        Result(one, "survived", 1.0),
        Result(two, "killed", 1.0, "tests/t.py::t"),
        Result(three, "survived", 1.0),
    ]
    other = {"mutants": [record.record() for record in records]}
    assert compare(results, other, {}) == 1
    told = capsys.readouterr().out
    assert "was killed by tests/t.py::t" in told
    assert "killed now: 1" in told
    assert renamed("core | Turn.f | return a_Turn | 0", {"Turn": "Step"}) == "core | Step.f | return a_Turn | 0"


def test_instrumented_functions_say_that_they_are_called() -> None:
    source = '"""Text."""\nfrom __future__ import annotations\n\n@d\ndef f():\n    """Text."""\n    return 1\n'
    called: set[str] = set()
    space = {"d": lambda function: function, "__reach__": called}
    exec(instrumented(source, "a.py"), space)
    assert called == set()
    space["f"]()  # type: ignore[operator]
    assert called == {"a.py:4"}
