"""The screen of `sidecar top`: one page of the pool, its verdict above, its keys below."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Iterable
from datetime import datetime
from functools import partial
from math import inf
from time import monotonic
from typing import Any, ClassVar

import grpc
from rich.console import Group, RenderableType
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.events import Key, Paste, Resize
from textual.screen import ModalScreen
from textual.widgets import Static
from textual.worker import Worker

from sidecar.cli.backends import drained, seats_of, undrained
from sidecar.cli.client import Client, call_failed
from sidecar.cli.exits import CommandError
from sidecar.cli.show import count, duration, facts
from sidecar.cli.top import opened
from sidecar.cli.top.feed import Feed
from sidecar.cli.top.lanes import drawn
from sidecar.cli.top.pages import PAGES, Lever, PageView, laid_out
from sidecar.errors import Reason
from sidecar.proto import admin_pb2 as pb

SORTS = ("", "name", "waiting", "running", "tokens")
SORTED_BY = {"": "oldest"}
ENGINES = next(page for page in PAGES if page.rows == "backend_rows")
REQUESTS = next(page for page in PAGES if page.rows == "request_rows")
NOTICE_S = 8.0
SILENT_S = 10.0
"""So long after the last view the screen says that nothing comes. Of the largest pools views come every few seconds."""
KEYS = (
    ("1–5", "the pages"),
    ("↑ ↓ PgUp PgDn Home", "move; j and k, too"),
    ("enter", "open: a group's or a tenant's requests, or all of one thing"),
    ("s", "sort by the longest wait, name, waiting, running or tokens"),
    ("/", "show only what has a text in its name, id or state"),
    ("esc", "leave a filter; close this, or go back from what was opened"),
    ("c", "cancel requests"),
    ("p", "pause or resume an adapter"),
    ("d", "drain or undrain an engine"),
    ("q", "quit"),
)
NOT_HERE = {
    "c": "nothing in this row can be cancelled",
    "p": "adapters are paused on page 3: press 3, then p",
    "d": "engines are drained on page 2: press 2, then d",
}
"""What a lever's key says in a row that it does not move."""
KEYS_NOTE = (
    "c, p and d ask before they act. SEATS with ~ are assumed: declare them (engine.seats). Slots with * run requests. "
    "SILENT: since an engine last told anything. WHERE: on how many engines an adapter is, on the GPU or in the host "
    "cache, and where in the sidecar's store. TOKENS of a request: of the prompt and of the answer, at most."
)


class Top(App[None]):
    """Show the pool until the user quits."""

    CSS = """
    Screen { background: ansi_default; }
    #verdict { max-height: 5; text-style: bold; }
    #tabs, #keys, #head { height: 1; }
    #body { height: 1fr; }
    ModalScreen { align: center middle; background: transparent; }
    .box { width: 90%; max-width: 110; height: auto; max-height: 90%; border: round; padding: 0 1; }
    """
    ENABLE_COMMAND_PALETTE = False
    AUTO_FOCUS = ""
    BINDINGS: ClassVar[list[BindingType]] = [
        *(Binding(str(number), f"page({number - 1})", show=False) for number in range(1, len(PAGES) + 1)),
        *(Binding(key, f"move({by})", show=False) for key, by in (("up,k", -1), ("down,j", 1))),
        Binding("pageup", "screens(-1)", show=False),
        Binding("pagedown", "screens(1)", show=False),
        Binding("home", "begin", show=False),
        Binding("s", "sort", show=False),
        Binding("slash", "filter", show=False),
        Binding("enter", "open", show=False),
        Binding("escape", "unfilter", show=False),
        *(Binding(key, f"pull('{key}')", show=False) for key in "cpd"),
        Binding("question_mark", "keys", show=False),
        Binding("q,ctrl+c", "quit", show=False),
    ]

    def __init__(self, client: Client, page: str, interval_s: float) -> None:
        super().__init__()
        self.theme = "ansi-dark"  # the terminal's own colours
        self._client, self._interval_s = client, interval_s
        self._page = next(each for each in PAGES if each.name == page)
        self._sort, self._filter, self._offset, self._cursor = "", "", 0, 0
        self._typed: str | None = None
        """The filter while it is typed. No widget takes the focus for it: that comes too late for who types fast."""
        self._selected: str | None = None
        """The key of the row under the cursor, which stays there when rows move."""
        self._only: dict[str, str] | None = None
        """The names of the row that was opened, whose requests are shown."""
        self._opened_from: tuple[PageView, str] | None = None
        """The page on which that was, and its filter."""
        self._left_at: dict[str, str | None] = {}
        """The key of the row that was under the cursor when a page was left."""
        self._view: Any = None
        self._awaits_rows = True
        self._came_s = monotonic()
        self._trouble, self._notice = "", ""
        self._asked: Any = None
        self._feed: Feed

    # What is on the screen.

    def compose(self) -> ComposeResult:
        yield Static(id="head")
        yield Static(id="verdict")
        yield Static(id="tabs")
        yield Static(id="body")
        yield Static(id="keys")

    def on_mount(self) -> None:
        loop = asyncio.get_running_loop()
        self._feed = Feed(
            self._client,
            lambda request, view: call_soon(loop, self._show, request, view),
            lambda error, lasts: call_soon(loop, self._fail, error, lasts),
        )
        self.set_interval(1.0, self._watch_silence)
        self.set_interval(1.0, self._watch_terminal)
        self._draw()

    def _watch_terminal(self) -> None:
        """End once the terminal is gone: no signal tells of that where it is not the controlling one."""
        if not sys.__stdin__ or not sys.__stdin__.isatty():
            self.exit()

    def on_unmount(self) -> None:
        self._feed.stop()

    def on_resize(self, event: Resize) -> None:
        self.call_after_refresh(self._ask)

    def _show(self, request: Any, view: Any) -> None:
        if request is not self._asked:
            return  # it came while something else was asked for
        self._view, self._trouble, self._came_s, self._awaits_rows = view, "", monotonic(), False
        if self._offset >= view.rows_total and self._offset:
            self._go(max(0, view.rows_total - self._room()))
        keys = [self._page.key(row) for row in self._rows()]
        if self._selected in keys:
            self._cursor = keys.index(self._selected)
        self._cursor = max(0, min(self._cursor, len(keys) - 1))
        self._selected = keys[self._cursor] if keys else None
        self._ask()
        self._draw()

    failure: CommandError | None = None
    """Why the screen was left, if that was not the user's wish."""

    def _fail(self, error: CommandError, lasts: bool) -> None:
        """End as other commands do if nothing was ever shown; a sidecar that was there may come back."""
        if lasts or self._view is None:
            self.failure = error
            self.exit()
            return
        if error.reason == Reason.UNKNOWN_BACKEND.value:
            self._selected = None  # its slots were asked for, and it is gone
            self._ask()
        self._trouble = error.message
        self._draw()

    def _watch_silence(self) -> None:
        if self._silence():
            self._draw()

    def _silence(self) -> str:
        """Return that nothing comes, though the connection did not fail; "" while views come."""
        silent_s = monotonic() - self._came_s
        if self._view is None or silent_s < max(SILENT_S, 3 * self._interval_s):
            return ""
        return f"nothing has come from the sidecar at {self._client.endpoint.address} for {duration(silent_s)}"

    def _draw(self) -> None:
        view, width = self._view, self.size.width or 80
        self._set("#head", self._head(view))
        trouble = self._trouble or self._silence()
        if trouble:
            self._set("#verdict", Text(f"{trouble}; what is below is old", "red"))
        else:
            self._set("#verdict", Text("waiting for the first view" if view is None else view.verdict))
        tabs = Text(no_wrap=True, overflow="ellipsis")
        for number, page in enumerate(PAGES, 1):
            tabs.append(f" {number} {page.name} ", "reverse" if page is self._page else "")
        tabs.append(f"  by {SORTED_BY.get(self._sort, self._sort) if self._page.sorts else 'oldest'}")
        if self._filter:
            tabs.append(f"  /{self._filter}", "bold")
        if view is not None and not self._awaits_rows:
            tabs.append(f"  {self._span()}", "dim")
        self._set("#tabs", tabs)
        self._set("#body", self._body(width))
        self._set("#keys", self._keys())

    def _keys(self) -> Text:
        if self._typed is not None:
            hint = "  part of a name or id; enter filters, esc clears"
            return Text.assemble(
                ("/", "bold"), self._typed, ("▏", "bold"), (hint, "dim"), no_wrap=True, overflow="crop"
            )
        hint = "enter open  s sort  / filter  c cancel  p pause  d drain  ? all keys  q quit"
        if self._only is not None:
            shown = ", ".join(f"{what} {name or 'none'}" for what, name in self._only.items())
            hint = f"requests of {shown}; esc goes back  ? all keys"
        keys = self._notice or hint
        return Text(keys, "bold" if self._notice else "dim", no_wrap=True, overflow="ellipsis")

    def _set(self, name: str, what: RenderableType) -> None:
        self.query_one(name, Static).update(what)

    def _head(self, view: Any) -> Text:
        if view is None:
            return Text("sidecar top", "bold")
        parts = [view.replica, datetime.fromtimestamp(view.time).strftime("%H:%M:%S"), f"{view.waiting} waiting"]
        if view.backends:
            serve = f"{view.backends_serving}/{view.backends} engines serve"
            parts += [f"{view.running}/{seats_of(view)} seats", serve]
        else:
            parts.append(f"{view.running} running")
        if view.HasField("tokens_per_s"):
            parts.append(f"{view.tokens_per_s:.0f} tok/s")
        return Text("top", "bold", no_wrap=True, overflow="ellipsis").append(
            Text(" · " + " · ".join(filter(None, parts)), "not bold")
        )

    def _span(self) -> str:
        shown, total = len(self._rows()), self._view.rows_total
        if shown == total:
            return str(total)
        return f"{self._offset + 1}–{self._offset + shown} of {total}"

    def _body(self, width: int) -> RenderableType:
        if self._view is None:
            return ""
        if self._awaits_rows:
            return Text("loading", "dim")
        rows = self._rows()
        if not rows:
            return Text(f'nothing here has "{self._filter}" in its name' if self._filter else "nothing to show")
        table = laid_out(self._page, rows, width, self._cursor)
        if self._page is not ENGINES:
            return table
        lines = drawn(self._view.lanes, width)
        room = self.query_one("#body").size.height - len(rows) - 3
        head = Text(f"slots of {self._selected}, the last minute", "bold")
        return Group(table, "", head, *(lines if len(lines) <= room else [*lines[: max(room - 2, 1)], *lines[-2:]]))

    def _rows(self) -> list[Any]:
        return list(getattr(self._view, self._page.rows)) if self._view is not None else []

    # What is asked for.

    def _room(self) -> int:
        """Return how many rows fit: the engines' slots take the lower half of their page."""
        height = self.query_one("#body").size.height - 1
        return max(1, height // 2 if self._page is ENGINES else height)

    def _ask(self) -> None:
        """Ask for what the screen has room for, if that is not what is watched already."""
        request = pb.WatchPoolRequest(
            page=self._page.asked,
            sort=self._sort,
            filter=self._filter,
            offset=self._offset,
            limit=self._room(),
            interval_s=self._interval_s,
            lanes_of=self._selected or "" if self._page is ENGINES else "",
            only=self._only,
        )
        if request != self._asked:
            self._asked = request
            self._feed.ask(request)

    def _go(self, offset: int) -> None:
        self._offset = max(0, offset)
        self._ask()

    def _turn_to(self, page: PageView, wanted: str = "", only: dict[str, str] | None = None) -> None:
        self._left_at[self._page.name] = self._selected
        self._opened_from = None if only is None else (self._page, self._filter)
        self._page, self._only = page, only
        self._use_filter(wanted)
        self._selected = self._left_at.get(page.name)

    # Keys.

    def action_page(self, number: int) -> None:
        self._turn_to(PAGES[number])

    def action_move(self, by: int) -> None:
        rows = self._rows()
        cursor = self._cursor + by
        if not rows:  # they are under way: `_show` puts the cursor on one of them
            self._cursor = max(0, cursor)
        elif 0 <= cursor < len(rows):
            self._cursor, self._selected = cursor, self._page.key(rows[cursor])
            self._ask()
        elif cursor < 0 < self._offset or (cursor >= len(rows) and self._offset + len(rows) < self._view.rows_total):
            self._selected = None
            self._go(self._offset + by)
        self._draw()

    def action_screens(self, by: int) -> None:
        offset = self._offset + by * self._room()
        if self._view is not None and offset < self._view.rows_total:
            self._selected = None
            self._go(offset)

    def action_begin(self) -> None:
        self._cursor, self._selected = 0, None
        self._go(0)

    def action_sort(self) -> None:
        if not self._page.sorts:
            self._tell("requests are listed by age")
            return
        self._sort = SORTS[(SORTS.index(self._sort) + 1) % len(SORTS)]
        self.action_begin()
        self._draw()

    def action_filter(self) -> None:
        self._typed = self._filter
        self._draw()

    def on_key(self, event: Key) -> None:
        """Take a key for the filter while that is typed, before any binding does."""
        if self._typed is None or len(self.screen_stack) > 1:
            return
        event.prevent_default()
        if event.key in ("enter", "escape"):
            self._use_filter("" if event.key == "escape" else self._typed.strip())
            return
        if event.key in ("backspace", "ctrl+h"):
            self._typed = self._typed[:-1]
        elif event.key == "ctrl+u":
            self._typed = ""
        elif event.key == "ctrl+c":
            self.exit()
        elif event.character is not None and event.is_printable:
            self._typed += event.character
        self._draw()

    def on_paste(self, event: Paste) -> None:
        if self._typed is not None:
            self._typed += " ".join(event.text.split())
            self._draw()

    def _use_filter(self, wanted: str) -> None:
        """Ask anew, and then forget the rows, so that no key acts on one that is about to go."""
        self._typed, self._filter, before = None, wanted, self._asked
        self.action_begin()
        if self._asked is not before:
            self._awaits_rows = True
            if self._view is not None:
                self._view.ClearField(self._page.rows)
        self._draw()

    def action_unfilter(self) -> None:
        if self._opened_from is not None:
            self._turn_to(*self._opened_from)
        elif self._filter:
            self._use_filter("")

    def action_keys(self) -> None:
        self.push_screen(Shown([facts(KEYS), Text(KEYS_NOTE)]))

    def action_open(self) -> None:
        row = self._row()
        if row is None:
            return
        only = self._page.opens(row)
        if only is not None:
            self._turn_to(REQUESTS, only=only)
        else:
            self._begin(partial(self._open, self._page.shown, row), exclusive=True)

    def _begin(self, work: Callable[[], Coroutine[None, None, None]], exclusive: bool = False) -> Worker[None]:
        """Begin work beside the screen. Its coroutine is made when it begins, for the screen may go before that."""
        return self.run_worker(work, exclusive=exclusive)

    async def _open(self, what: str, row: Any) -> None:
        answer = await self._answer(lambda: opened.OPENED[what](self._client, row))
        if answer is not None:
            await self.push_screen(Shown(answer))

    def action_pull(self, key: str) -> None:
        row = self._row()
        lever = next((each for each in self._page.levers(row) if each.key == key), None) if row is not None else None
        if lever is None:
            self._tell(NOT_HERE[key])
            return
        self._begin(partial(self._pull, lever))

    async def _pull(self, lever: Lever) -> None:
        if not await self.push_screen_wait(Question(lever.question)):
            return
        service, method = lever.method.split(".")
        request = LEVER_REQUESTS[lever.method](**lever.request)
        answer = await self._answer(lambda: self._client.ask(getattr(getattr(self._client, service), method), request))
        if answer is not None:
            self._tell(LEVER_ANSWERS[lever.method](answer))

    async def _answer(self, ask: Callable[[], Any]) -> Any:
        """Return what a call answers, or tell why it failed and return None."""
        try:
            return await asyncio.to_thread(ask)
        except grpc.RpcError as error:
            self._tell(str(call_failed(error, self._client.endpoint)))
        except CommandError as error:
            self._tell(str(error))
        return None

    def _tell(self, notice: str) -> None:
        self._notice = notice
        self._draw()
        self.set_timer(NOTICE_S, lambda: self._forget(notice))

    def _forget(self, notice: str) -> None:
        if self._notice is notice:
            self._notice = ""
            self._draw()

    def _row(self) -> Any:
        rows = self._rows()
        return rows[self._cursor] if self._cursor < len(rows) else None


LEVER_REQUESTS: dict[str, Any] = {
    "queues.Cancel": pb.CancelRequest,
    "adapters.Pause": pb.PauseRequest,
    "adapters.Resume": pb.AdapterRequest,
    "backends.Drain": pb.BackendRequest,
    "backends.Undrain": pb.BackendRequest,
}
LEVER_ANSWERS: dict[str, Callable[[Any], str]] = {
    "queues.Cancel": lambda answer: f"{count(answer.cancelled, 'request')} cancelled",
    "adapters.Pause": lambda answer: f"{answer.name} is paused{'' if answer.paused_s == inf else ' for a while'}",
    "adapters.Resume": lambda answer: f"{answer.name} takes requests",
    "backends.Drain": drained,
    "backends.Undrain": undrained,
}


class Question(ModalScreen[bool]):
    """Ask before a lever is pulled; only "y" means yes."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "dismiss(True)"),
        Binding("n,escape,enter,q", "dismiss(False)"),
    ]

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        yield Static(Text.assemble(self._question, ("  [y/N]", "bold")), classes="box")


class Shown(ModalScreen[None]):
    """Show one thing whole; it scrolls. A page's key closes it and turns to the page."""

    AUTO_FOCUS = "VerticalScroll"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,enter,q,question_mark", "dismiss(None)"),
        *(Binding(str(number), f"page({number - 1})") for number in range(1, len(PAGES) + 1)),
    ]

    def __init__(self, what: Iterable[RenderableType]) -> None:
        super().__init__()
        self._what = Group(*what)

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="box") as box:
            box.border_subtitle = "esc closes"
            yield Static(self._what)

    async def action_page(self, number: int) -> None:
        self.dismiss(None)
        await self.app.run_action(f"page({number})")


def call_soon(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: Any) -> None:
    """Call from another thread; after the screen was left there is no loop, and nothing to call."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(call, *arguments)
