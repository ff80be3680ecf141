"""One sequence of a request over HTTP, and its progress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from sidecar.lab.engine.http.prefix import Owner
from sidecar.lab.engine.http.text import GeneratedText, Stops
from sidecar.lab.engine.kserve.work import Progress, Work
from sidecar.lab.engine.packed import PackedAdapter

LENGTH, STOP = "length", "stop"


@runtime_checkable
class Loaded(Protocol):
    """An adapter in an engine: the owner of its prefix blocks, its factors, and the number of its dummy answers."""

    @property
    def owner(self) -> Owner: ...

    @property
    def packed(self) -> PackedAdapter: ...

    @property
    def content_id(self) -> int: ...


@dataclass(frozen=True)
class Token(Progress):
    """A token with the text that it completes; the last one has the reason for the end."""

    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def sequence(self) -> TextWork:
        """The sequence of the token."""
        assert isinstance(self.work, TextWork)
        return self.work

    @property
    def place(self) -> int:
        """The sequence's number in its request."""
        return self.sequence.place


@dataclass(eq=False, kw_only=True)
class TextWork(Work):
    """A sequence with a text. `place` is its number in the request."""

    stops: Stops = field(default_factory=Stops)
    bias: Mapping[int, float] = field(default_factory=dict)
    place: int = 0
    output: GeneratedText = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.output = GeneratedText(self.stops)

    @property
    def loaded(self) -> Loaded | None:
        """The adapter that the request brings; None if it only names one."""
        return None
