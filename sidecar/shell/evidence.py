"""The values on which verdicts rest: what was asked of an adapter to verify it, and the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sidecar.core.facts import EngineFacts
from sidecar.errors import Reason

SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Prompt:
    """A text, or token ids. `expect` is the known beginning of the adapter's answer, or ""."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    expect: str = ""

    def __str__(self) -> str:
        return quoted(self.text) if self.text else "tokens " + ",".join(map(str, self.token_ids[:8]))


@dataclass(frozen=True)
class Reply:
    """An answer; if there is none, `error` says why and `reason` is the cause."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    error: str = ""
    reason: Reason | None = None

    def __str__(self) -> str:
        return quoted(self.text) if self.text else str(list(self.token_ids))

    @property
    def content(self) -> tuple[str, tuple[int, ...]]:
        return self.text, self.token_ids


@dataclass(frozen=True)
class Answers:
    """One backend's answers to one prompt, as the base model and as the adapter.

    `again` has its further answers as the adapter, asked for if several instances share its address.
    """

    backend: str
    prompt: Prompt
    base: Reply
    adapter: Reply
    tokens_max: int
    again: tuple[Reply, ...] = ()

    @property
    def other_answer(self) -> Reply | None:
        """Return an answer of `again` that differs from the first; None if there is none."""
        if self.adapter.error:
            return None
        return next((r for r in self.again if not r.error and r.content != self.adapter.content), None)

    @property
    def answered(self) -> bool:
        """Return True if every question to the adapter was answered."""
        return not any(reply.error for reply in (self.adapter, *self.again))

    @property
    def compared(self) -> bool:
        return not self.base.error and not self.adapter.error

    @property
    def changed(self) -> bool:
        return self.compared and self.base.content != self.adapter.content

    @property
    def expected(self) -> bool:
        """Return True if it can be decided whether the answer is right."""
        return bool(self.prompt.expect) and not self.adapter.error

    @property
    def matches(self) -> bool:
        """Return True if the answer begins as expected, as far as it goes if it may have been cut off."""
        answer, expect = self.adapter.text.strip(), self.prompt.expect.strip()
        cut_off = len(expect.encode()) > self.tokens_max and bool(answer)
        return self.expected and (answer.startswith(expect) or (cut_off and expect.startswith(answer)))


@dataclass(frozen=True)
class Evidence:
    """Everything that was asked of an adapter.

    `probes` says why there are no expected answers, and `probes_wrong` that its probe.jsonl is to blame. `weightless`
    says that its weights are known to change nothing. `no_base` says why the base model was not asked.
    """

    version: str
    asked: Sequence[Answers]
    facts: Mapping[str, EngineFacts]
    probes: str = ""
    probes_wrong: bool = False
    weightless: bool = False
    no_base: str = ""

    def of(self, backend: str) -> list[Answers]:
        return [asked for asked in self.asked if asked.backend == backend]

    def is_silent(self, backend: str) -> bool:
        """Return True if a backend answers every prompt as the base model does."""
        compared = [asked for asked in self.of(backend) if asked.compared]
        return bool(compared) and not any(asked.changed for asked in compared)

    @property
    def changes_nowhere(self) -> bool:
        return all(self.is_silent(backend) for backend in self.facts)


def difference_position(first: Reply, second: Reply) -> str:
    """Return where two answers begin to differ, such as "at character 3"; the first is 1."""
    unit, left, right = (
        ("character", first.text, second.text)
        if first.text or second.text
        else ("token", first.token_ids, second.token_ids)
    )
    same = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        same += 1
    return f"at {unit} {same + 1}"


def quoted(text: str) -> str:
    """Return a text on one line in quotes, shortened if it is long."""
    line = text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"
    return '"' + line.replace("\\", "\\\\").replace("\n", "\\n") + '"'
