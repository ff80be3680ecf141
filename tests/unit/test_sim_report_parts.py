"""The parts of a report's page: drawings that cannot be broken out of, figures in words, distributions, lanes."""

from __future__ import annotations

import random
from itertools import pairwise
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="needs the extra lab")

from matplotlib.figure import Figure

from sidecar.lab.sim.records import Tenure
from sidecar.lab.sim.report import formatting
from sidecar.lab.sim.report.canvas import DARK, LIGHT, Picture, cut, sheet, svg
from sidecar.lab.sim.report.formatting import NAME_CHARACTERS_MAX, shown
from sidecar.lab.sim.report.requests import RANKS, corners
from sidecar.lab.sim.report.timeline import begun, stays, window_ns

HOSTILE = '"><script>alert("&")</script>$\\frac{$ id="x" 漢'


def picture(text: str) -> Picture:
    def draw(width: float) -> Figure:
        figure, (plot,) = sheet(width, 100)
        plot.plot([0, 1234.5678], [0, 1], color=LIGHT["s1"], marker="o")
        plot.set_title(text)
        return figure

    return Picture("a", text, text, draw)


def test_text_of_a_drawing_is_text_whatever_it_holds() -> None:
    """Markup, formulas and letters that the drawing's font lacks: all of it is shown as it is written."""
    root = ElementTree.fromstring(svg(picture(HOSTILE), 400))

    assert HOSTILE in ["".join(each.itertext()) for each in root.iter("text")]
    assert [each.text for each in root[:2]] == [HOSTILE, HOSTILE]
    assert not list(root.iter("script"))


def test_a_drawing_follows_the_page_and_is_no_larger_than_it_must_be() -> None:
    """Colours are variables of the page after the light ones; no fonts, no metadata, one decimal; ids are its own."""
    made = svg(picture("title"), 400)

    assert f"stroke: {LIGHT['s1']}; stroke: var(--s1)" in made
    assert not set(LIGHT.values()) & {made[at : at + 7] for at in range(len(made)) if made[at - 7 : at] == "fill: "}
    assert "font-family" not in made
    assert "DOCTYPE" not in made
    assert not [each for each in ElementTree.fromstring(made).iter() if each.tag in ("metadata", "style")]
    assert len(made) < 10_000
    ids = [each.get("id", "") for each in ElementTree.fromstring(made).iter() if each.get("id")]
    again = [each.get("id", "") for each in ElementTree.fromstring(svg(picture("title"), 340)).iter() if each.get("id")]
    assert not set(ids) & set(again)


def test_a_drawing_that_stands_alone_brings_both_colours() -> None:
    """And its name space, without which it is no picture."""
    made = svg(picture("title"), 400, alone=True)

    assert ElementTree.fromstring(made).tag == "{http://www.w3.org/2000/svg}svg"
    assert "@media (prefers-color-scheme:dark)" in made
    assert all(colour in made for colour in (f"--ink:{LIGHT['ink']}", f"--ink:{DARK['ink']}"))


def test_each_light_colour_has_one_name_and_a_dark_one() -> None:
    """A drawing's colours are found by their light values."""
    assert len(set(LIGHT.values())) == len(LIGHT)
    assert LIGHT.keys() == DARK.keys()


@pytest.mark.parametrize("ground", ["page", "card"])
@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_text_can_be_read_on_what_it_stands_on(colours: dict[str, str], ground: str) -> None:
    """A contrast of 4.5 or more, as WCAG has it, of words and of runs' names, of adapters' names on their blocks."""
    pairs = [(name, ground) for name in ("ink", "soft", *(f"s{style}" for style in range(6)))]
    pairs += [("alert", "alert-page"), *(("on", f"t{number}") for number in range(11))]
    for text, on in pairs:
        light, dark = sorted((luminance(colours[text]), luminance(colours[on])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, on)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_label_is_cut_to_its_room() -> None:
    """A long name ends in an ellipsis; a short one is whole."""
    assert cut("soft_gated", 200) == "soft_gated"
    assert cut("n" * 48, 160) == "n" * 19 + "…"


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
    assert formatting.number(value) == expected


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0, "0 %"), (0.999, "99.9 %"), (1, "100 %"), (1.004, "100.4 %"), (0.5, "50 %"), (0.004, "0.4 %")],
)
def test_a_share_is_never_rounded_to_all_or_nothing(share: float, expected: str) -> None:
    """99.9 % answered is not 100 %."""
    assert formatting.percent(share).replace(formatting.NO_BREAK, " ") == expected


def test_seconds_are_milliseconds_where_they_are_few() -> None:
    """A figure and its unit are not parted by a line's end."""
    assert formatting.seconds(0.0042) == f"4.20{formatting.NO_BREAK}ms"
    assert formatting.seconds(0) == f"0{formatting.NO_BREAK}s"


@pytest.mark.parametrize("total", [1, 2, 9, 100, 5000])
def test_a_distribution_has_its_slowest_requests_and_few_points(total: int) -> None:
    """It rises from 0 to all; however many requests there are, the ten slowest are all drawn."""
    values = [float(number) for number in range(1, total + 1)]

    found = corners(values)

    assert found[0] == (values[0], 0)
    assert found[-1] == (values[-1], 1)
    assert {at for at, _ in found} >= set(values[-10:])
    assert all(before[1] < after[1] for before, after in pairwise(found))
    assert all(at == values[round(share * total) - 1] for at, share in found[1:])
    assert len(found) <= RANKS + 11


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
