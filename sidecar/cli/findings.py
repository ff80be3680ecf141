"""Print the findings of engine checks: a line for each check, and a table of many backends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from sidecar.backends.checking import result_of
from sidecar.backends.checks.finding import Finding, State
from sidecar.backends.registry import kinds
from sidecar.cli.show import count, table

MARKS = {State.OK: "✓", State.WARNING: "!", State.FAILED: "✗", State.SKIPPED: "–"}
STYLES = {State.OK: "green", State.WARNING: "yellow", State.FAILED: "bold red", State.SKIPPED: "dim"}
NAME_WIDTH = max(len(step.name) for kind in kinds() if kind.checks is not None for step in kind.checks().steps)


@dataclass
class Report:
    """The findings at one backend."""

    backend: str
    url: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def result(self) -> State:
        return result_of(self.findings)

    def record(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        findings = [
            {"check": each.check, "state": each.state.value, "text": each.text, "fix": each.fix.splitlines()}
            for each in self.findings
        ]
        return {"backend": self.backend, "url": self.url, "result": self.result.value, "findings": findings}

    def summary(self) -> str:
        """Return the number of checks by result, as text."""
        counts = Counter(finding.state for finding in self.findings)
        parts = (
            f"{counts[State.FAILED]} failed" if counts[State.FAILED] else "",
            count(counts[State.WARNING], "warning") if counts[State.WARNING] else "",
            f"{counts[State.OK]} ok" if counts[State.OK] else "",
            f"{counts[State.SKIPPED]} not looked at" if counts[State.SKIPPED] else "",
        )
        return ", ".join(part for part in parts if part)


class Lines:
    """Prints findings as they come; consecutive checks that are skipped for one cause share a line."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._skipped: list[Finding] = []

    def show(self, finding: Finding) -> None:
        if finding.state is State.SKIPPED and not finding.fix:
            if self._skipped and self._skipped[0].text != finding.text:
                self.flush()
            self._skipped.append(finding)
            return
        self.flush()
        self._console.print(line(finding))

    def flush(self) -> None:
        """Print the checks skipped so far."""
        skipped, self._skipped = self._skipped, []
        if skipped:
            self._console.print(line(_together(skipped)))


def _together(skipped: Sequence[Finding]) -> Finding:
    if len(skipped) == 1:
        return skipped[0]
    names = ", ".join(finding.check for finding in skipped)
    return Finding(State.SKIPPED, f"{skipped[0].text}: {names}", check=f"{len(skipped)} checks")


def line(finding: Finding) -> RenderableType:
    """Return a finding as a mark, a name and a text, with the changes to make below them."""
    style = STYLES[finding.state]
    made = Table.grid(padding=(0, 1, 0, 0))
    made.add_column(width=1)
    made.add_column(width=NAME_WIDTH)
    made.add_column(overflow="fold")
    text_style = "dim" if finding.state is State.SKIPPED else ""
    made.add_row(Text(MARKS[finding.state], style), Text(finding.check, style), Text(finding.text, text_style))
    if finding.fix:
        made.add_row("", "", _fix(finding.fix))
    return made


def _fix(fix: str) -> RenderableType:
    made = Table.grid(padding=(0, 1, 0, 0))
    made.add_column(width=1)
    made.add_column(overflow="fold")
    for number, each in enumerate(fix.splitlines()):
        made.add_row(Text("" if number else "→", "cyan"), Text(each, "cyan"))
    return made


def drawn(reports: Sequence[Report]) -> Iterator[RenderableType]:
    """Yield the problems of each backend, then a line for each backend."""
    for report in reports:
        troubles = list(_troubles(report.findings))
        if troubles:
            yield Text(f"{report.backend}, {report.url}", "bold underline")
            yield from map(line, troubles)
            yield ""
    yield table(("BACKEND", "RESULT", "CHECKS", "FIRST OF ALL"), [_row(report) for report in reports])


def _troubles(findings: Iterable[Finding]) -> Iterator[Finding]:
    return (finding for finding in findings if finding.state in (State.FAILED, State.WARNING) or finding.fix)


def _row(report: Report) -> tuple[str | Text, ...]:
    state = report.result
    first = next((finding.check for finding in report.findings if finding.state is state), "")
    result = Text(f"{MARKS[state]} {state.value}", STYLES[state])
    return report.backend, result, report.summary(), "" if state is State.OK else first
