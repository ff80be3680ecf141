"""A simulation's report page: complete, safe, reproducible, small, and informative."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="needs the extra lab")

from sidecar.core.config import ClassLimit
from sidecar.errors import Misused
from sidecar.lab.sim.records import Tenure
from sidecar.lab.sim.report import formatting, page, write_report
from sidecar.lab.sim.report.canvas import WIDE, svg
from sidecar.lab.sim.report.figures import store, throughput
from sidecar.lab.sim.report.headline import bindings, headline, summary
from sidecar.lab.sim.report.parts import Part
from sidecar.lab.sim.report.requests import waits
from sidecar.lab.sim.report.runs import runs_of
from sidecar.lab.sim.report.timeline import slot_lanes
from sidecar.lab.sim.results import Result
from sidecar.lab.sim.setup import EngineSetup, Setup, Sidecar
from sidecar.lab.sim.simulate import simulate
from sidecar.lab.sim.workloads import Arrival, LoadParameters, Workload, workload
from sidecar.pace.cost import CostModel
from tests.kit.cases import first

VOID = {"meta"}
HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "n" * 5000, "bell\x07\u202e 漢 $\\frac{$")


class Reader(HTMLParser):
    """Parses a page, and checks that all tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for key, value in attrs if key == "id"]
        self.handlers += [key for key, _ in attrs if key.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@cache
def ran(
    order: str,
    name: str = "round_robin",
    *,
    slots: int = 4,
    adapters: int = 16,
    requests: int = 300,
    in_flight: int = 128,
    rate: float | None = None,
    wait_s: float = 1e6,
    engines: int = 1,
    host_slots: int = 1024,
    store_bytes: int = 1 << 32,
    output: int = 128,
) -> Result:
    """Run something small."""
    classes = {"default": ClassLimit(queue_wait_ns_max=int(wait_s * 1e9))}
    sidecar = None if order == "none" else Sidecar(ordering=order, classes=classes, store_bytes=store_bytes)
    load = LoadParameters(adapters=adapters, input_tokens=128, output_tokens=output, requests=requests, rate_per_s=rate)
    engine = EngineSetup(cost=CostModel.from_file(), slots=slots, host_slots=host_slots)
    setup = Setup(engine=engine, sidecar=sidecar, in_flight=in_flight, engines=engines)
    return simulate(setup, workload(name, load), order)


def compared() -> list[Result]:
    return [ran("none"), ran("skip"), ran("soft_gated")]


def overloaded() -> list[Result]:
    return [
        ran(order, "two_hot", slots=2, adapters=8, requests=800, rate=40.0, wait_s=5.0, output=256)
        for order in ("none", "soft_gated")
    ]


CASES = {
    "compared": compared,
    "overloaded": overloaded,
    "four engines": lambda: [ran(order, "zipf", engines=4, in_flight=256) for order in ("none", "soft_gated")],
    "base model": lambda: [ran("soft_gated", "base")],
    "one request": lambda: [ran("soft_gated", adapters=1, requests=1)],
    "all resident": lambda: [ran("none", slots=32), ran("soft_gated", slots=32)],
    "the same twice": lambda: [ran("skip"), ran("skip")],
    "several slots": lambda: [ran("soft_gated", slots=slots) for slots in (2, 4, 8)],
    "none answered": lambda: [ran("soft_gated", rate=40.0, requests=20, wait_s=1e-9, slots=1, adapters=2)],
}


LONG = ("four engines", "the same twice", "several slots")
"""What is well-formed in their pages is so in the others' too."""
EACH = first(len(CASES) - len(LONG), sorted(CASES, key=lambda case: case in LONG))


def read(made: str) -> Reader:
    reader = Reader()
    reader.feed(made)
    reader.close()
    return reader


def seconds(value: float) -> str:
    return formatting.seconds(value).replace(formatting.NO_BREAK, " ")


@cache
def page_of(case: str) -> str:
    return page(CASES[case]())


def section(made: str, anchor: str) -> str:
    """Return a part of a page."""
    return made.partition(f'id="{anchor}">')[2].partition("</section>")[0]


def pictures(made: str) -> Iterator[ElementTree.Element]:
    for found in re.findall(r"<svg.*?</svg>", made, flags=re.DOTALL):
        yield ElementTree.fromstring(found)


def plain(made: str) -> str:
    """Return a page's text with usual blanks."""
    return re.sub(r"<[^>]*>", " ", made).replace("\N{NO-BREAK SPACE}", " ")


def lines(part: Part) -> set[str]:
    """Return the runs' colours in which a part's drawing has lines through three points."""
    paths = ElementTree.fromstring(svg(part.pictures[0], WIDE)).iter("path")
    styles = [each.get("style", "") for each in paths if each.get("d", "").count("L") == 2]
    return {found for style in styles for found in re.findall(r"stroke: var\(--(s\d)\)", style)}


@pytest.mark.parametrize("case", EACH)
def test_every_page_is_well_formed(case: str) -> None:
    """Tags are closed, drawings are XML, ids are unique, and each drawing has a title and a description."""
    made = page_of(case)

    reader = read(made)
    assert not reader.open
    assert len(set(reader.ids)) == len(reader.ids)
    assert all(number not in made for number in ('="nan"', '="inf"', "NaN"))
    for picture in pictures(made):
        if picture.get("role") == "img":
            assert [child.tag.split("}")[-1] for child in picture[:2]] == ["title", "desc"]
            assert all("".join(child.itertext()) for child in picture[:2])
    assert [tag for tag in reader.tags if tag == "h1"] == ["h1"]


@pytest.mark.parametrize("case", EACH)
def test_a_page_loads_nothing(case: str) -> None:
    """A page is self-contained: no external address, image, style, script or font."""
    made = page_of(case)

    assert not re.findall(r"[a-z]+://[^\"'\s<]*", made)
    assert not set(read(made).tags) & {"link", "img", "iframe", "object", "embed", "image", "foreignobject"}
    assert not re.search(r"\bsrc=|\bhref=\"(?!#)|@import|@font-face", made)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", made))


@pytest.mark.parametrize("case", EACH)
def test_labels_of_drawings_stay_inside(case: str) -> None:
    """No text is cut by the edge of its drawing, with letters as broad as they usually are."""
    for picture in pictures(page_of(case)):
        if picture.get("role") != "img":
            continue
        _, _, width, height = map(float, picture.get("viewBox", "").split())
        for each in picture.iter("text"):
            content, x, y = "".join(each.itertext()), float(each.get("x", 0)), float(each.get("y", 0))
            anchor = re.search(r"text-anchor: (\w+)", each.get("style", ""))
            assert anchor is not None
            left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor.group(1)] * 6 * len(content)
            assert left >= -1, content
            assert left + 6 * len(content) <= width + 12, content
            assert 8 <= y <= height, content


@pytest.mark.parametrize("case", EACH)
def test_a_drawing_can_be_read_on_a_phone(case: str) -> None:
    """Each is drawn for a phone's width too, or scrolls; no letter is smaller than 10 pixels."""
    made = page_of(case)

    narrow = [each.get("viewBox", "").split()[2] for each in pictures("".join(re.split('class="slim"', made)[1:]))]
    assert made.count('class="broad"') == made.count('class="slim"') <= narrow.count("340")
    sizes = {
        float(size)
        for size in re.findall(r"font: ?[^;]*?([\d.]+)px|font-size: ([\d.]+)px", made)
        for size in size
        if size
    }
    assert min(sizes) >= 10


def test_the_headline_is_the_gain_over_the_bare_engine() -> None:
    """The best run's throughput over that of bare engines on the same arrivals."""
    deep = {"slots": 2, "adapters": 32, "requests": 800, "in_flight": 512}
    results = [ran("none", **deep), ran("skip", **deep), ran("soft_gated", **deep)]
    gain = results[2].throughput_tokens_per_s / results[0].throughput_tokens_per_s

    assert gain > 1.1
    assert headline(runs_of(results)) == f"soft_gated gives {gain:.2f}× the throughput of the bare engine"


def test_the_page_begins_with_what_is_to_be_known() -> None:
    """The headline is the title; the sentences under it and the limit come before any figure."""
    runs = runs_of(compared())
    top = page_of("compared").partition("<main>")[0]
    assert f"<h1>{headline(runs)}</h1>" in top
    assert f"<title>Simulation report: {headline(runs)}</title>" in top
    assert all(escape(said) in top for said in [*summary(runs), *bindings(runs)])
    assert re.findall("<dt>(.*?)</dt>", top)[:3] == ["Load", "Adapters", "Requests"]


def test_the_lead_tells_waits_of_both() -> None:
    """The 99th percentile and the longest, the best run's against the bare engine's."""
    results = overloaded()
    bare, best = (result.as_json()["wait_s"]["all"] for result in results)

    made = plain(page_of("overloaded"))
    assert f"the 99th percentile of waits is {seconds(best['p99'])} against {seconds(bare['p99'])}" in made
    assert f"the longest {seconds(best['max'])} against {seconds(bare['max'])}" in made


def test_a_gain_is_only_told_on_the_same_arrivals() -> None:
    """No gain is shown over a bare engine with other arrivals."""
    said = headline(runs_of([ran("none", requests=200), ran("soft_gated")]))

    assert "× the throughput of the bare engine" not in said
    assert said.endswith(("what is reachable", "all resident", "each prompt"))


def test_bounds_stand_first_in_the_table() -> None:
    """The reachable bounds come before any run."""
    results = compared()
    body = re.search(r'id="figures".*?<tbody>(.*?)</tbody>', page_of("compared"), flags=re.DOTALL)
    assert body is not None

    heads = re.findall(r'<th scope="row">(.*?)</th>', body.group(1))
    assert heads == ["All resident (bound)", "Closed form (bound)", "bare engine", "skip", "soft_gated"]
    assert f"{results[0].bounds()['closed_form_tokens_per_s']:,.0f}" in body.group(1)


def test_what_binds_is_told() -> None:
    """The limit is the slots where they are few, and the requests in flight where all adapters are resident."""
    assert "bound by the slots: 4 slots for 16 adapters with 128 in flight" in bindings(runs_of([ran("soft_gated")]))[0]
    assert "bound by the requests in flight, 128" in bindings(runs_of([ran("soft_gated", slots=32)]))[0]


def test_every_plot_is_there() -> None:
    """Throughput, the running batch, waits, the store and the timeline; endings only where some were not answered."""
    sections = ["throughput", "running", "waits", "store", "timeline"]

    assert re.findall(r'<section class="[^"]*" id="(\w+)"', page_of("compared"))[1:] == sections
    assert 'id="endings"' in page_of("overloaded")


def test_a_load_of_the_base_model_has_no_plot_of_adapters() -> None:
    """Without slots, store and timeline, the page is still valid."""
    made = page_of("base model")

    assert re.findall(r'<section class="[^"]*" id="(\w+)"', made) == ["figures", "running", "waits"]


def test_waits_are_told_by_class_and_with_their_bound() -> None:
    """Three distributions where some adapters are hot, one where none is; the bound's nearest share beside them."""
    made = plain(page_of("overloaded"))

    assert all(f"{name} adapters: waited at most" in made for name in ("All", "Hot", "Cold"))
    assert re.search(
        r"soft_gated: of [\d,]+ waits with a bound none exceeded it; the nearest came to [\d.]+ % of", made
    )
    assert "Hot adapters: waited" not in page_of("compared")


def test_a_broken_promise_is_an_alert() -> None:
    """A wait over its bound or a doubled answer is shown as an alert."""
    good = ran("soft_gated")
    counts = {**good.recorder.counts, "doubled": 2}
    bad = replace(good, recorder=replace(good.recorder, counts=counts, over_bound=[(7, 2.0, 1.0)]))

    made = page([bad])
    assert 'role="alert">soft_gated: 1 request waited longer than its bound<' in made
    assert 'role="alert">soft_gated: 2 requests got a doubled answer<' in made
    assert 'role="alert"' not in page_of("compared")


def test_what_is_fetched_again_is_told_apart() -> None:
    """Where neither store nor engine can keep all adapters, the second fetch of one is not its first."""
    result = ran("soft_gated", "zipf", host_slots=5, store_bytes=60_000_000, requests=600)
    assert sum(result.recorder.fetches.values()) > len(result.recorder.fetches)

    stored, whole = (store(runs_of([each])) for each in (result, ran("soft_gated")))
    assert stored is not None
    assert whole is not None
    again = stored.table.heads.index("Again (s)")
    assert float(stored.table.rows[0][again]) > 0
    assert whole.table.rows[0][again] == "0"
    assert "opacity: 0.35" in svg(stored.pictures[0], WIDE)
    assert "opacity: 0.35" not in svg(whole.pictures[0], WIDE)


def test_the_store_is_told_with_its_bound() -> None:
    """The cost of misses and its ratio to the bound are in the drawing and in the table."""
    result = ran("soft_gated")
    paid, bound = (result.as_json()["store"][key] for key in ("miss_cost", "bound"))

    made = plain(section(page_of("compared"), "store"))
    assert f"{seconds(paid)}, {paid / bound:.2f}× the bound" in made


def test_runs_with_several_numbers_of_slots_are_a_line_of_throughput() -> None:
    """A line through the runs of one name, in its style; one number of slots is a mark, whatever the seeds."""
    swept = [ran(order, slots=slots) for order in ("none", "soft_gated") for slots in (2, 4, 8)]
    again = [ran("skip"), ran("skip"), ran("skip")]

    part = throughput(runs_of([*swept, *again]))
    assert part is not None
    assert lines(part) == {"s0", "s1"}


@pytest.mark.parametrize("waited", [(0.0, 0.0), (0.07, 0.07), (6.0, 9.0), (0.06, 836.0), (1e-5, 4e6)])
def test_all_waits_are_on_their_axis(waited: tuple[float, float]) -> None:
    """For any waits, the curve lies within the drawing, and the axis has at least one label."""
    result = ran("soft_gated")
    recorder = replace(result.recorder, waits_s=array("d", waited), waited_for=result.recorder.waited_for[:2])

    part = waits(runs_of([replace(result, recorder=recorder)]))
    assert part is not None
    root = ElementTree.fromstring(svg(part.pictures[0], WIDE))
    left, right = 56, WIDE - 16
    curves = [each.get("d", "") for each in root.iter("path") if "stroke: var(--s1)" in each.get("style", "")]
    places = [float(x) for curve in curves if "clip" not in curve for x in re.findall(r"[ML] ([\d.-]+) ", curve)]
    assert any(left <= x <= right for x in places)
    below = [each for each in root.iter("text") if float(each.get("y", 0)) > 260 and "middle" in each.get("style", "")]
    assert 1 <= len(below) <= 12
    assert all("$" not in (each.text or "") for each in below)


def test_a_key_tells_each_run_and_its_throughput() -> None:
    """The names are text beside their marks, so that none can cover another; the bounds are among them."""
    said = re.findall(r"</svg>([^<]+)</span>", section(page_of("compared"), "throughput"))

    names = [
        f"{result.label.replace('none', 'bare engine')} {result.throughput_tokens_per_s:,.0f}" for result in compared()
    ]
    assert said == [*names, "all resident", "closed form"]


def test_no_two_runs_are_drawn_alike() -> None:
    """This includes runs of one name, and, up to six runs, a drawing without colours."""
    bare = [ran("none", slots=slots) for slots in (2, 4, 8)]
    runs = runs_of([*bare, *(replace(ran("skip"), label=f"order {number}") for number in range(20)), ran("skip")])

    assert len({run.style for run in runs}) == len(runs) == len({run.label for run in runs})
    assert len({run.marker for run in runs_of(compared())}) == 3


def test_the_strips_tell_mean_batches() -> None:
    """One for each run, with its name and its mean."""
    made = section(page_of("compared"), "running")
    for result in compared():
        assert f"mean batch {formatting.number(result.as_json()['mean_batch'])}<" in made
    assert all(f">{name}</text>" in made for name in ("bare engine", "skip", "soft_gated"))


def test_endings_are_told_apart_without_colours() -> None:
    """Those refused and expired are hatched, and the key names each kind that there is, and the arrivals."""
    made = section(page_of("overloaded"), "endings")

    kinds = re.findall(r"</svg>([^<]+)</span>", made)
    assert kinds[0] == "answered"
    assert kinds[-1] == "arrivals"
    assert {"refused", "expired"} & set(kinds)
    assert made.count("<pattern") >= 2


def test_a_block_tells_its_adapter_and_its_time() -> None:
    """Each stay is a block with a tooltip; the page's script finds the other stays of an adapter by its number."""
    stays = ran("soft_gated").recorder.tenures
    drawn = list(pictures(section(page_of("compared"), "timeline")))[-1]

    (group,) = (each for each in drawn.iter("g") if each.get("class") == "stays")
    assert len(group) == len(stays)
    told = sorted(each[0].text or "" for each in group)
    assert all(re.fullmatch(r"a\d+ on b0: [\d.]+ to [\d.]+ s, for [\d.]+\xa0m?s", each) for each in told)
    assert {each.partition(" ")[0] for each in told} == {stay.adapter for stay in stays}
    assert len({each.get("data-a") for each in group}) == len({stay.adapter for stay in stays})


def test_slot_lanes_are_pictures_that_stand_alone() -> None:
    """For documents: one for each run in which an adapter held a slot, in light and dark."""
    made = slot_lanes([*compared(), ran("fifo", "base")])

    assert len(made) == 3
    for each in made:
        assert ElementTree.fromstring(each).tag == "{http://www.w3.org/2000/svg}svg"
        assert "prefers-color-scheme:dark" in each
    assert ">soft_gated</text>" in made[2]


def test_names_are_text_wherever_they_stand() -> None:
    """Names of adapters and labels from a trace are shown as text and never executed."""
    arrivals = [Arrival(None, HOSTILE[number % 4], 64, 64) for number in range(80)]
    load = Workload(HOSTILE[0], HOSTILE, dict.fromkeys(HOSTILE, 16), 80, False, 1, lambda: iter(arrivals))
    setup = Setup(engine=EngineSetup(cost=CostModel.from_file(), slots=2), in_flight=16)

    made = page([simulate(setup, load, HOSTILE[1])])
    reader = read(made)
    assert not reader.open
    assert reader.tags.count("script") == 1
    assert "img" not in reader.tags
    assert not reader.handlers
    assert "&lt;script&gt;alert(1)" in made
    assert "n" * 100 not in made


def test_the_same_results_give_the_same_bytes() -> None:
    """A second simulation gives the same bytes too: the page contains nothing of the machine or the clock."""
    again = [simulate(result.setup, result.workload, result.label) for result in CASES["all resident"]()]

    assert page(again) == page_of("all resident")


def test_a_long_run_makes_no_large_page() -> None:
    """Ten runs with all the stays that recorders keep are below 1.5 MB, and what is left out is told."""
    first = ran("soft_gated")
    stays = [Tenure("b0", f"a{at % 16:03}", at * 10**7, (at + 3) * 10**7) for at in range(20_000)]
    recorder = replace(first.recorder, tenures=stays, openings=1_000_000, ended_ns=20_003 * 10**7, began_ns=1)
    many = [replace(first, recorder=recorder, label=f"run {number}") for number in range(10)]

    made = page(many)
    assert 200_000 < len(made.encode()) < 1_500_000
    assert re.search(r"run 9: the first 4\.\d\d s of 200 s; 999,550 stays of 1,000,000 left out\.", plain(made))


def test_the_page_is_written_where_asked(tmp_path: Path) -> None:
    """The directory is made; writing again replaces the page."""
    path = write_report(CASES["one request"](), tmp_path / "new" / "report")

    assert path.parent == tmp_path / "new" / "report"
    assert path.read_text(encoding="utf-8") == page_of("one request")
    path.write_text("before")
    assert write_report(CASES["one request"](), path.parent) == path
    assert path.read_text(encoding="utf-8") == page_of("one request")
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_directory_that_is_a_file_is_misused(tmp_path: Path) -> None:
    """The message names the file, why it cannot be written, and what to do."""
    (tmp_path / "taken").write_text("")

    with pytest.raises(Misused, match=r"taken.*name another directory"):
        write_report([ran("soft_gated")], tmp_path / "taken")
