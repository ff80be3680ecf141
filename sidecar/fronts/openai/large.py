"""Requests with large bodies, read in a process of their own, one after the other.

The standard library's scanner keeps the interpreter to itself for as long as it reads, so that a thread does not
help: a million token ids stop the event loop for 0.18 s, half a million objects for 0.3 s, in a thread as without one.
What is read must not come back either, as letting go of so many values takes as long. So the reading process gives back
what admission looks at, where the name stands, and the request in the words of engines that take text only; the body
itself is kept as it came. A small body is read where it arrives, in less time than passing it on would take.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import subprocess
import sys
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sidecar.errors import Reason, Refused
from sidecar.fronts.openai.request import OpenAiRequest, Unfit

if TYPE_CHECKING:  # the child begins with this module, and seldom needs what these import
    from sidecar.fronts.openai.chat_templates import ChatTemplate
    from sidecar.fronts.openai.text_forms import TextRequest

LARGE_BYTES = 1 << 20
"""Bodies above are read in the other process."""
TRIES = 2
"""Processes that one body is given to."""
ENDING_S = 1.0


@dataclass(frozen=True)
class Template:
    """What a chat template is compiled from."""

    source: str
    path: str
    tokens: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, template: ChatTemplate) -> Template:
        return cls(template.source, template.path, tuple(template.tokens.items()))


@dataclass(frozen=True)
class Order:
    """A body of `size_bytes` to be read, which follows, and how many prompts and bytes it may be split into.

    `templates` are those to write it as text with, None among them for a prompt that needs none; `streams` says of the
    kinds of model that take text whether they are asked to stream, and `kinds` names those of other packages.
    """

    path: str
    size_bytes: int
    prompts_max: int
    bytes_max: int
    templates: tuple[Template | None, ...]
    tokens_assumed: int
    streams: dict[str, bool]
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """Why a body, or its text, is refused; `param` is the member that is to blame for it."""

    message: str
    param: str | None = None

    @property
    def error(self) -> Refused:
        if self.param is not None:
            return Unfit(self.param, self.message)
        return Refused(Reason.INVALID_REQUEST, self.message)


@dataclass(frozen=True)
class Found:
    """One of the requests that a body asks for; `texts` are by the order's templates.

    Of its `body` there are the name and the places when it comes from the other process, which leaves the bytes here.
    """

    asked: OpenAiRequest
    texts: tuple[TextRequest | Refusal, ...]


class LargeBodies:
    """Reads bodies through one child process, which is started with the first and ends with this object."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "large-bodies")
        self._child: _Child | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id, None before there is one."""
        return None if self._child is None else self._child.process.pid

    async def read(self, pieces: Sequence[bytes], order: Order) -> tuple[Found, ...]:
        """Return what a body asks for that came in pieces. Raises Refused(INVALID_REQUEST) as reading it here would."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._read, pieces, order)

    def _read(self, pieces: Sequence[bytes], order: Order) -> tuple[Found, ...]:
        raw = b"".join(pieces)
        found = self._told(order, raw)
        if isinstance(found, Refusal):
            raise found.error
        body = replace(found[0].asked.body, raw=raw)
        return tuple(replace(each, asked=replace(each.asked, body=body)) for each in found)

    def _told(self, order: Order, raw: bytes) -> tuple[Found, ...] | Refusal:
        why = ""
        for _ in range(TRIES):
            try:
                if self._child is None:
                    self._child = _Child()
                return self._child.ask(order, raw)
            except (OSError, EOFError, pickle.UnpicklingError) as error:
                why = str(error) or "it ended"
                if self._child is not None:
                    why = f"it ended with code {self._child.ended()}"
                    self._child = None
        return Refusal(
            f"the body cannot be read: the process that reads bodies of more than {LARGE_BYTES} bytes failed {TRIES} "
            f"times ({why}); send less, or give the sidecar more memory"
        )


class _Child:
    """A reading process, asked from one thread."""

    def __init__(self) -> None:
        command = (sys.executable, "-m", "sidecar.fronts.openai.large_reader")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._end: Any = weakref.finalize(self, _end, self.process)

    def ask(self, order: Order, raw: bytes) -> tuple[Found, ...] | Refusal:
        """Have a body read. Raises OSError or EOFError when the process ends meanwhile."""
        orders, answers = self.process.stdin, self.process.stdout
        assert orders is not None
        assert answers is not None
        pickle.dump(order, orders)
        orders.write(raw)
        orders.flush()
        answer: tuple[Found, ...] | Refusal = pickle.load(answers)
        return answer

    def ended(self) -> int:
        """Return the code of a process that has closed its end; it need not be quite over."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(ENDING_S)
        return int(self._end())


def _end(process: subprocess.Popen[bytes]) -> int:
    """End a process, which is reading for nobody any more, and return its code."""
    process.kill()
    code = process.wait()
    assert process.stdout is not None
    process.stdout.close()
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # by what it was to be told last
        process.stdin.close()
    return code
