"""How adapters are named, and what is suggested when a name is not known."""

from __future__ import annotations

import pytest

from sidecar.adapters.names import AdapterReference, check_name, nearest, parse_reference, shown
from sidecar.errors import Invalid, Reason


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("sql", AdapterReference("sql")),
        ("team-a/sql_v2.1", AdapterReference("team-a/sql_v2.1")),
        ("7b-sql", AdapterReference("7b-sql")),
        ("x" * 128, AdapterReference("x" * 128)),
        ("sql@v8", AdapterReference("sql", ordinal=8)),
        ("sql@3fa9", AdapterReference("sql", digest_prefix="3fa9")),
        ("sql@" + "a" * 64, AdapterReference("sql", digest_prefix="a" * 64)),
    ],
)
def test_references_parse_and_print_as_themselves(text: str, reference: AdapterReference) -> None:
    """name, name@v8, name@digest."""
    assert parse_reference(text) == reference
    assert str(reference) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is empty"),
        ("x" * 129, "longer than 128 characters"),
        ("-x", "begins with a letter or digit"),
        ("a b", "letters, digits and"),
        ("a\n", "letters, digits and"),
        ("ä", "letters, digits and"),
        ("../a", "begins with a letter or digit"),
        ("a/../b", "'..' segment"),
        ("a//b", "no empty"),
        ("a/", "no empty"),
        ("a/./b", "'.' or '..' segment"),
        ("123", "reads as a task id"),
        ("@v1", "it is empty"),
        ("sql@", "what follows '@' is a version"),
        ("sql@8", "what follows '@' is a version"),
        ("sql@v0", "what follows '@' is a version"),
        ("sql@v08", "what follows '@' is a version"),
        ("sql@ABCD", "lower-case hex digits"),
        ("sql@v1@v2", "what follows '@' is a version"),
        ("sql@" + "a" * 65, "what follows '@' is a version"),
    ],
)
def test_a_bad_reference_is_refused_with_the_rule(text: str, why: str) -> None:
    """Each says what is wrong."""
    with pytest.raises(Invalid) as caught:
        parse_reference(text)
    assert caught.value.reason is Reason.INVALID_NAME
    assert why in caught.value.message


def test_a_huge_bad_name_shows_80_characters() -> None:
    """A name of 10 MB does not fill the log."""
    with pytest.raises(Invalid) as caught:
        check_name("é" * 10_000_000)
    assert caught.value.message.count("\\xe9") == 80
    assert "(10000000 characters)" in caught.value.message
    assert len(caught.value.message) < 700


def test_shown_text_is_one_line_of_ascii() -> None:
    """Control characters and line breaks of a stranger do not reach the terminal."""
    assert shown("a\n\x1b[31m\u202e") == "'a\\n\\x1b[31m\\u202e'"


@pytest.mark.parametrize(
    ("wanted", "names", "expected"),
    [
        ("sqll", ["chat", "sql", "sqlite", "code"], ("sql", "sqlite")),
        ("SQL", ["chat", "sql"], ("sql",)),
        ("sql", ["sql-prod", "sql-dev", "chat"], ("sql-dev", "sql-prod")),
        ("zzz", ["chat", "sql"], ()),
        ("", ["chat"], ()),
        ("x", [], ()),
        ("adapter-1", [f"adapter-{n}" for n in range(30)], ("adapter-1", "adapter-10", "adapter-11")),
        ("q" * 10_000_000, ["sql"], ()),
    ],
)
def test_the_nearest_names_are_suggested(wanted: str, names: list[str], expected: tuple[str, ...]) -> None:
    """Typos, case and beginnings are recognised; the rest is not suggested."""
    assert nearest(wanted, names) == expected
