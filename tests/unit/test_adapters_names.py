"""What may be an adapter's name, and how a stranger's text is shown."""

from __future__ import annotations

import pytest

from sidecar.adapters.names import check_name, shown
from sidecar.errors import Invalid, Reason


@pytest.mark.parametrize("name", ["sql", "team-a/sql_v2.1", "7b-sql", "x" * 128])
def test_a_good_name_is_taken_as_it_is(name: str) -> None:
    """Letters, digits, some punctuation, and folders."""
    assert check_name(name) == name


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
        ("sql@v1", "letters, digits and"),
        ("base", "stands for the base model"),
    ],
)
def test_a_bad_name_is_refused_with_the_rule(text: str, why: str) -> None:
    """Each says what is wrong."""
    with pytest.raises(Invalid) as caught:
        check_name(text)
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
