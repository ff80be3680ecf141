"""Read large bodies in a child process, one after the other.

The standard library's scanner holds the interpreter lock while it reads, so a thread does not help: a million token ids
stop the event loop for 0.18 s, half a million objects for 0.3 s, with or without a thread. The values must not come
back either, as freeing so many takes as long. So the child returns only what admission needs, the span of the name, and
the request written for engines that take text only; the parent keeps the body as it came. A small body is read in this
process, in less time than it would take to pass it on.
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

if TYPE_CHECKING:  # the child starts with this module, and seldom needs what these import
    from sidecar.fronts.openai.chat_templates import ChatTemplate
    from sidecar.fronts.openai.text_forms import TextRequest

LARGE_BYTES = 1 << 20
"""Larger bodies are read in the child process."""
TRIES = 2
"""How many child processes may fail on one body."""
ENDING_S = 1.0


@dataclass(frozen=True)
class Template:
    """The parts from which a chat template is compiled."""

    source: str
    path: str
    tokens: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, template: ChatTemplate) -> Template:
        return cls(template.source, template.path, tuple(template.tokens.items()))


@dataclass(frozen=True)
class Order:
    """The order to read a body of `size_bytes`, which follows it, with bounds for a list of prompts.

    The request is written as text with each of `templates`, where None stands for a plain prompt. `streams` says for
    each kind of model that takes text whether it is asked to stream; `kinds` names the kinds of other packages.
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
    """The refusal of a body, or of its text; `param` is the member that is to blame."""

    message: str
    param: str | None = None

    @property
    def error(self) -> Refused:
        if self.param is not None:
            return Unfit(self.param, self.message)
        return Refused(Reason.INVALID_REQUEST, self.message)


@dataclass(frozen=True)
class Found:
    """One request of a body; `texts` are by the order's templates.

    When it comes from the child, its `body` has the name and the spans only; the parent has the bytes.
    """

    asked: OpenAiRequest
    texts: tuple[TextRequest | Refusal, ...]


class LargeBodies:
    """Reads bodies through one child process, which is started with the first body and ends with this object."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "large-bodies")
        self._child: _Child | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id; None before it has started."""
        return None if self._child is None else self._child.process.pid

    async def read(self, pieces: Sequence[bytes], order: Order) -> tuple[Found, ...]:
        """Return the requests of a body in pieces. Raises Refused(INVALID_REQUEST) as reading it here would."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._read, pieces, order)

    def _read(self, pieces: Sequence[bytes], order: Order) -> tuple[Found, ...]:
        raw = b"".join(pieces)
        found = self._ask(order, raw)
        if isinstance(found, Refusal):
            raise found.error
        body = replace(found[0].asked.body, raw=raw)
        return tuple(replace(each, asked=replace(each.asked, body=body)) for each in found)

    def _ask(self, order: Order, raw: bytes) -> tuple[Found, ...] | Refusal:
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


def _start() -> subprocess.Popen[bytes]:
    command = (sys.executable, "-m", "sidecar.fronts.openai.large_reader")
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


class _Child:
    """A child process, used from one thread."""

    def __init__(self) -> None:
        self.process = _start()
        self._end: Any = weakref.finalize(self, _end, self.process)

    def ask(self, order: Order, raw: bytes) -> tuple[Found, ...] | Refusal:
        """Have a body read. Raises OSError or EOFError if the process ends meanwhile."""
        orders, answers = self.process.stdin, self.process.stdout
        assert orders is not None
        assert answers is not None
        pickle.dump(order, orders)
        orders.write(raw)
        orders.flush()
        answer: tuple[Found, ...] | Refusal = pickle.load(answers)
        return answer

    def ended(self) -> int:
        """Return the exit code of a process that has closed its end of the pipe; it may still be ending."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(ENDING_S)
        return int(self._end())


def _end(process: subprocess.Popen[bytes]) -> int:
    """End a process that has nothing more to read, and return its exit code."""
    process.kill()
    code = process.wait()
    assert process.stdout is not None
    process.stdout.close()
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # from bytes that are still buffered
        process.stdin.close()
    return code
