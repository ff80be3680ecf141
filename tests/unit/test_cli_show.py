"""Tables on narrow terminals: nothing is lost, and what one copies, ids and names, is in one piece."""

from __future__ import annotations

import io
import re
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console, Group, RenderableType
from rich.text import Text

from sidecar.cli import backends, generating, queue, show
from sidecar.cli.queue import OPEN, open_row
from sidecar.cli.show import bad, console, duration, table, telling
from sidecar.cli.top.pages import PAGES, laid_out
from sidecar.core.eligibility import Why
from sidecar.proto import admin_pb2
from tests.kit.serving import until

ID = "6e0c8c5e-4a0d-4c53-a1ff-6a1b6c8f2d11"
LONG_ID = "customer-0123456789/" * 6 + "end"
DETAIL = "reached, serves at most 4 adapters at once, because its host cache holds no more; see its log"


def printed(shown: RenderableType, width: int) -> str:
    """Return what commands print on a terminal of a width: by the console that each of them uses."""
    terminal = console()
    terminal.file, terminal.width = io.StringIO(), width
    terminal.print(shown)
    return terminal.file.getvalue()


def waiting(request_id: str) -> Any:
    made = admin_pb2.QueueResponse(verdict="one waits", waiting=1)
    request = made.requests.add(
        waited_s=1.5,
        bound_s=20,
        expires_s=598,
        adapter="customer-support-german",
        tenant="acme",
        backend="127.0.0.1:8001",
    )
    setattr(request, "class", "interactive")
    request.why, request.request, request.request_id = "all slots are busy", 12, request_id
    return made


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.016, "16 ms"),
        (3.24, "3.2 s"),
        (9.97, "10 s"),
        (119, "119 s"),
        (150, "2.5 min"),
        (600, "10 min"),
        (16_127, "4.5 h"),
        (100_000, "28 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    """They read as the core's own do, with fewer digits in a table."""
    assert duration(seconds) == text


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_long_names_leave_room_for_counts_in_top(width: int) -> None:
    """Names are cut in their middle; what is counted, and why it waits, stays on the screen."""
    oldest = admin_pb2.WaitingRequest(waited_s=600, why="seats full")
    group = admin_pb2.QueueGroup(
        adapter=LONG_ID, tenant="customer-support-german", backend=ID, waiting=12, running=345, oldest=oldest
    )
    head, row = laid_out(PAGES[0], [group], width, 0).plain.splitlines()
    assert [len(head), len(row)] == [width, width]
    assert head.index("RUN") == row.index(" 345 ") + 1
    for whole in (" 12 ", " 10 min ", " sea"):
        assert whole in row


@pytest.mark.parametrize("why", Why)
@pytest.mark.parametrize("names", [("sql", "acme", "gpu-3"), ("customer-support-german", "marketing-emea", ID)])
def test_a_void_bound_leaves_the_reason_of_the_wait(names: tuple[str, str, str], why: Why) -> None:
    """In 80 columns BOUND says that a bound is void, and WHY what is waited for, whole."""
    oldest = admin_pb2.WaitingRequest(waited_s=600, why=why.value, voided="backend slower than assumed")
    adapter, tenant, backend = names
    group = admin_pb2.QueueGroup(
        adapter=adapter, tenant=tenant, backend=backend, waiting=12, running=345, tokens=123_456, oldest=oldest
    )
    row = admin_pb2.TenantRow(
        tenant=tenant, waiting=12, running=345, tokens=123_456, tokens_per_s=470, weight=1, oldest=oldest
    )
    for page, shown in ((PAGES[0], group), (PAGES[3], row)):
        head, line = laid_out(page, [shown], 80, 0).plain.splitlines()
        assert line[head.index("BOUND") :].startswith(" void ")
        assert line[head.index("WHY") :].rstrip() == why.value
    view = admin_pb2.QueueResponse(groups=[group])
    assert re.search(
        f"void: backend slower than assumed .* {re.escape(why.value)}$", printed(queue.shown(view, False), 300), re.M
    )


def test_text_of_others_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    """Escape sequences in a name or a title are spelled; line ends stay."""
    console().print("a\x1b[2J\nb", table(("NAME",), [("c\x9b31m",)]), bad("\x1b]0;d\x07"))
    assert capsys.readouterr().out.split() == ["a\\x1b[2J", "b", "NAME", "c\\x9b31m", "\\x1b]0;d"]


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize("request_id", [ID, LONG_ID])
def test_the_queue(request_id: str, width: int) -> None:
    """A request's id can be pasted after --explain, and no header is broken."""
    text = printed(queue.shown(waiting(request_id), by_request=True), width)
    for whole in (request_id, "EXPIRES", "customer-support-german", "127.0.0.1:8001", "all slots are busy"):
        assert whole in text
    assert all(len(line) <= width for line in text.splitlines() if LONG_ID not in line)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_numbers_of_requests(width: int) -> None:
    """One that waits and one that runs have the number that the log has, for `replay --explain`."""
    view = waiting(ID)
    view.requests[0].request = 71_234
    view.runs.add(request=71_235, request_id=LONG_ID[:60], adapter="sql", state="running", backend=ID)
    listed = table(OPEN, [open_row(view.runs[0])])
    for text, numbers in ((printed(queue.shown(view, True), width), "45"), (printed(listed, width), "5")):
        assert all(f"7123{last}" in text for last in numbers)
        assert text.count("REQUEST") == len(numbers)


@pytest.mark.parametrize("by_request", [False, True])
def test_the_verdict_stays_on_the_terminal(by_request: bool) -> None:
    """Of a long queue a terminal gets the rows that it holds, and how to get the others; a pipe gets all that came."""
    view = waiting(LONG_ID[:80])
    view.groups.extend(admin_pb2.QueueGroup(adapter=f"{ID}-{n}", tenant=ID, backend=ID, running=1) for n in range(20))
    view.requests.extend([view.requests[0]] * 19)
    view.groups_total, view.waiting = 1200, 1200
    for size in ((80, 24), (200, 60), (30, 8)):
        terminal = Console(file=io.StringIO(), width=size[0], height=size[1], force_terminal=True, color_system=None)
        lines = printed(queue.fitted(view, by_request, terminal), size[0]).splitlines()
        assert lines[0] == "one waits"
        assert len(lines) < size[1] or size == (30, 8)
        assert "(--limit 1000)" in " ".join(" ".join(lines).split())
    pipe = Console(file=io.StringIO(), width=10_000, height=24)
    assert len(printed(queue.fitted(view, by_request, pipe), 10_000).splitlines()) == 25


@pytest.mark.parametrize("width", [40, 80, 200])
def test_compared_answers_are_whole(width: int) -> None:
    """Answers stand beside their versions and are folded, also one without a blank; an empty one is said to be so."""
    nonsense = "aGSg5]z@3X&cn=jk_YDTOMR" * 8
    answers = {
        "support@v1": Text("Arr, she pays"),
        "support@v2": Text("in doubloons"),
        "base": Text(nonsense),
        "b": Text(),
    }
    lines = printed(generating.side_by_side(answers), width).splitlines()
    assert [line.split() for line in lines[:2]] == [
        ["support@v1", "Arr,", "she", "pays"],
        ["support@v2", "in", "doubloons"],
    ]
    assert max(map(len, lines)) <= width
    assert nonsense in "".join(line.removeprefix("base").strip() for line in lines)
    assert lines[-1].split() == ["b", "(empty)"]


def test_pages_past_a_learned_limit_are_explained() -> None:
    """A limit that is learned is marked so, and where more pages are open the row says what becomes of them."""
    backend = admin_pb2.Backend(id="b", state="up", page_limit=4, detail=DETAIL)
    backend.open.extend([admin_pb2.OpenVersion(pages=5)])
    row = backends._row(backend)
    assert row[4] == "5/~4"
    assert row[-1] == f"1 more open than is believed to fit: some close before another adapter opens; {DETAIL}"
    assert "5 open, at most 4 at once, as learned from loads; 1 more open" in printed(
        Group(*backends.shown(backend)), 300
    )
    backend.device_pages, backend.open[0].pages = 4, 4
    assert (backends._row(backend)[4], backends._row(backend)[-1]) == ("4/4", DETAIL)


def test_pages_that_are_guessed_are_marked() -> None:
    """Without the engine's modules or layers each adapter is counted as one page, and that may be too few."""
    backend = admin_pb2.Backend(id="b", state="up", page_limit=4, device_pages=4, pages_assumed=True)
    backend.open.extend([admin_pb2.OpenVersion(pages=1)])
    assert backends._row(backend)[4] == "~1/4"
    shown = " ".join(printed(Group(*backends.shown(backend)), 300).split())
    assert "each adapter is counted as one page; backends[].engine.config would tell its pages" in shown


def test_seats_that_are_assumed_are_marked() -> None:
    """As limits of pages are that are learned."""
    for assumed, seats in ((True, "~70"), (False, "70")):
        backend = admin_pb2.Backend(id="b", state="up", running=69, seats=70, seats_assumed=assumed)
        assert backends._row(backend)[2] == f"69/{seats}"
        assert f"69 of {seats} taken" in printed(Group(*backends.shown(backend)), 300)
        assert f" 69/{seats} " in laid_out(PAGES[1], [admin_pb2.BackendRow(backend=backend)], 80, 0).plain


def test_a_wait_for_a_drain_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line when the number changes, and every 10 seconds."""
    passed_s = [100.0]
    monkeypatch.setattr(backends, "monotonic", lambda: passed_s[0])
    monkeypatch.setattr(backends, "sleep", lambda seconds: passed_s.append(passed_s.pop() + seconds))

    def answer() -> Any:
        state = "draining" if passed_s[0] < 128 else "drained"
        return admin_pb2.Backend(id="b", state=state, running=2 if passed_s[0] < 105 else 1)

    client: Any = SimpleNamespace(ask=lambda method, request: answer(), backends=SimpleNamespace(Get=None))
    assert backends._emptied(client, answer()).state == "drained"
    said = [line.split()[3] for line in capsys.readouterr().err.splitlines()]
    assert said == ["2", "1", "1", "1"]  # after 0, 5, 15 and 25 s


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_backends(width: int) -> None:
    """No header and no id is broken, and all of the detail is there."""
    backend = admin_pb2.Backend(id="127.0.0.1:8001", state="up", seats=8, page_limit=4, detail=DETAIL)
    text = printed(table(backends.COLUMNS, [backends._row(backend)]), width)
    for whole in ("127.0.0.1:8001", "STATE", "SEATS", "QUEUED", "RESIDENT", "HEALS", "DETAIL"):
        assert whole in text
    assert "".join(DETAIL.split()) in "".join(text.split())


async def test_long_work_is_told_to_a_pipe_again_and_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By plain lines on stderr, though the work says nothing new; nothing is told once it is done."""
    monkeypatch.setattr(show, "TOLD_AGAIN_S", 0.001)
    lines: list[str] = []

    def seen(line: str, times: int) -> bool:
        lines.extend(capsys.readouterr().err.splitlines())
        return lines.count(line) >= times

    with telling("loading [it]") as tell:
        await until(lambda: seen("loading [it] …", 3))
        tell("asking: 1 of 2")
        await until(lambda: seen("asking: 1 of 2 …", 3))
    capsys.readouterr()
    assert "telling" not in {thread.name for thread in threading.enumerate()}
