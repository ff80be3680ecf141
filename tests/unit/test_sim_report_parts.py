"""The parts of a report's page: markup that cannot be broken out of, axes, figures in words, labels, lanes."""

from __future__ import annotations

import random
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from sidecar.lab.sim.records import Tenure
from sidecar.lab.sim.report import scales, words
from sidecar.lab.sim.report.labels import Box, Labels, beside
from sidecar.lab.sim.report.lanes import begun, stays, window_ns
from sidecar.lab.sim.report.markup import NAME_CHARACTERS_MAX, Markup, element, shown

HOSTILE = '"><script>alert("&")</script>'


def test_text_and_attributes_are_escaped_and_markup_is_not() -> None:
    """What a name holds is text of the page, wherever it stands."""
    made = element("p", HOSTILE, element("b", "bold"), title=HOSTILE)

    parsed = ElementTree.fromstring(made)
    assert parsed.text == HOSTILE
    assert parsed.get("title") == HOSTILE
    assert [child.tag for child in parsed] == ["b"]


def test_attributes_are_spelt_as_html_has_them_and_none_is_left_out() -> None:
    """Underscores are dashes, a last one is dropped; numbers have one decimal at most, and no minus before 0."""
    made = element("path", class_="a", stroke_width=1.25, x=-0.01, y=3.0, d=None)

    assert made == '<path class="a" stroke-width="1.2" x="0" y="3"/>'
    assert isinstance(made, Markup)


def test_an_empty_element_of_html_is_closed_by_a_tag() -> None:
    """`<td/>` would be an open cell to a browser."""
    assert element("td") == "<td></td>"


@pytest.mark.parametrize("name", ["a\x00b", "a\x1bb", "a\u202eb", "a\udce9b", "a\nb"])
def test_a_name_is_shown_without_what_cannot_be_seen(name: str) -> None:
    """Control characters, turns of direction and halves of characters are replaced by a sign."""
    assert shown(name) == "a\N{REPLACEMENT CHARACTER}b"


def test_a_long_name_is_cut() -> None:
    """A page stays small whatever adapters are called."""
    assert len(shown("n" * 10_000)) == NAME_CHARACTERS_MAX
    assert shown("n" * 10_000).endswith("…")
    assert shown("n" * NAME_CHARACTERS_MAX) == "n" * NAME_CHARACTERS_MAX


@pytest.mark.parametrize(
    ("high", "expected"),
    [(3305, [0, 1000, 2000, 3000, 4000]), (0.467, [0, 0.1, 0.2, 0.3, 0.4, 0.5]), (256, [0, 100, 200, 300]), (1, None)],
)
def test_ticks_are_round_and_reach_the_highest_value(high: float, expected: list[float] | None) -> None:
    """An axis ends at a round value that is not below what is drawn."""
    found = scales.ticks(high)

    assert found == pytest.approx(expected or [0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_ticks_of_nothing_are_those_of_one() -> None:
    """A run without a token still has an axis."""
    assert scales.ticks(0) == scales.ticks(1)


def test_inner_ticks_stay_within_the_axis() -> None:
    """No label stands beyond the end of a time axis."""
    for high in (0.3, 1.0, 46.6, 749.0, 2425.0):
        found = scales.inner_ticks(high)
        assert 2 <= len(found) <= 7
        assert found[-1] <= high * (1 + 1e-9)


def test_decades_enclose_the_values() -> None:
    """A broad range has powers of ten, a narrow one 1, 2 and 5 as well, and one value still has two ticks."""
    assert scales.decades(0.06, 836) == [0.01, 0.1, 1, 10, 100, 1000]
    assert scales.decades(3, 40) == [2, 5, 10, 20, 50]
    assert scales.decades(5, 5) == [5, 10]


@pytest.mark.parametrize("seed", range(20))
def test_decades_enclose_any_range(seed: int) -> None:
    """Whatever the waits are, they are on the axis."""
    source = random.Random(seed)
    low = 10 ** source.uniform(-3, 4)
    high = low * 10 ** source.uniform(0, 5)

    found = scales.decades(low, high)

    assert found == sorted(found)
    assert found[0] <= low * (1 + 1e-9)
    assert found[-1] >= high * (1 - 1e-9)


def test_powers_of_two_end_with_the_last_value() -> None:
    """The number of adapters is on the axis, and no power that is too close to it."""
    assert scales.powers_of_two(64) == [1, 2, 4, 8, 16, 32, 64]
    assert scales.powers_of_two(50) == [1, 2, 4, 8, 16, 32, 50]
    assert scales.powers_of_two(70) == [1, 2, 4, 8, 16, 32, 70]


def test_a_scale_puts_what_is_outside_at_its_edge() -> None:
    """A wait of 0 has a place on an axis of decades."""
    scale = scales.Scale(0.1, 1000, 50, 650, logarithmic=True)

    assert scale(0) == 50
    assert scale(10) == pytest.approx(350)
    assert scale(1e9) == 650


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (0.00012, "1.2e-04"),
        (0.0123, "0.0123"),
        (1, "1.00"),
        (12.34, "12.3"),
        (99.96, "100"),
        (1234.5, "1,234"),
    ],
)
def test_numbers_have_three_digits_that_count(value: float, expected: str) -> None:
    """A person reads three digits, and all digits before the point."""
    assert words.number(value) == expected


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0, "0 %"), (0.999, "99.9 %"), (1, "100 %"), (1.004, "100.4 %"), (0.5, "50 %"), (0.004, "0.4 %")],
)
def test_a_share_is_never_rounded_to_all_or_nothing(share: float, expected: str) -> None:
    """99.9 % answered is not 100 %."""
    assert words.percent(share).replace(words.NO_BREAK, " ") == expected


def test_seconds_are_milliseconds_where_they_are_few() -> None:
    """A figure and its unit are not parted by a line's end."""
    assert words.seconds(0.0042) == f"4.20{words.NO_BREAK}ms"
    assert words.seconds(0) == f"0{words.NO_BREAK}s"


def test_labels_keep_off_each_other_and_off_lines() -> None:
    """Of two marks at one place the second's label gives way; a line through the first spot moves a label."""
    labels = Labels(Box(0, 400, 0, 200), [[(100.0, 100.0), (300.0, 100.0)]])

    first, second = (labels.put("bare engine 1,729", beside(100, 100), "name") for _ in range(2))

    places = [
        (float(each.get("x", 0)), float(each.get("y", 0))) for each in map(ElementTree.fromstring, (first, second))
    ]
    assert all(abs(y - 100) >= 9 or x < 100 for x, y in places)
    assert places[0] != places[1]


def test_a_label_at_the_edge_stands_inside() -> None:
    """No label is clipped by the right edge: it ends at its mark instead."""
    labels = Labels(Box(0, 400, 0, 200), [])

    assert 'text-anchor="end"' in labels.put("bare engine 1,729", beside(390, 100), "name")


def tenure(backend: str, adapter: str, begin: int, end: int) -> Tenure:
    return Tenure(backend, adapter, begin, end)


def test_a_stay_gets_the_lowest_free_lane_of_its_backend() -> None:
    """A slot that is given back at an instant is taken at that instant; backends have lanes of their own."""
    found = stays(
        begun([tenure("b0", "c", 10, 20), tenure("b0", "a", 0, 10), tenure("b0", "b", 0, 30), tenure("b1", "a", 5, 9)])
    )

    assert [(stay.tenure.backend, stay.tenure.adapter, stay.lane) for stay in found] == [
        ("b0", "a", 0),
        ("b0", "b", 1),
        ("b1", "a", 0),
        ("b0", "c", 0),
    ]


@pytest.mark.parametrize("seed", range(10))
def test_no_two_stays_are_in_one_lane_at_once(seed: int) -> None:
    """And there are never more lanes than stays at once."""
    source = random.Random(seed)
    made = []
    for number in range(200):
        begin = source.randrange(1000)
        made.append(tenure("b0", f"a{number}", begin, begin + source.randrange(1, 100)))

    found = stays(begun(made))

    most = max(sum(1 for each in made if each.begin_ns <= at < each.end_ns) for at in range(1100))
    assert max(stay.lane for stay in found) + 1 == most
    for lane in range(most):
        own = [stay.tenure for stay in found if stay.lane == lane]
        assert all(before.end_ns <= after.begin_ns for before, after in pairwise(own))


def test_a_window_ends_where_a_run_would_show_too_many() -> None:
    """One run's many stays cut the window for all, so that they can be compared."""
    many, few = [tenure("b0", "a", at, at + 1) for at in range(10)], [tenure("b0", "a", 0, 100)]

    assert window_ns([many, few], most=4, ended_ns=100) == 4
    assert window_ns([many, few], most=10, ended_ns=100) == 100
