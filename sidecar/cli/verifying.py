"""`sidecar adapters verify`: verify by the backends' answers that an adapter takes effect."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.text import Text

from sidecar.cli import completing
from sidecar.cli.client import Client
from sidecar.cli.endpoint import admin_command
from sidecar.cli.exits import CommandError, Exit, say
from sidecar.cli.show import AsJson, bad, console, count, print_json, record_of
from sidecar.proto import admin_pb2 as pb

SHOWN_CHARACTERS = 40
MARKS = {"passed": Text("✓", style="green"), "failed": Text("✗", style="red"), "skipped": Text("-", style="dim")}
NOTHING_COMPARED = (
    "nothing could be compared, so nothing is known; ask more than one backend, let the base model be asked, or put "
    "known answers into a probe.jsonl beside the weights"
)


@dataclass
class Findings:
    """The findings of a verification so far."""

    plan: Any = None
    answers: list[Any] = field(default_factory=list)
    checks: list[Any] = field(default_factory=list)

    @property
    def compared(self) -> bool:
        """True if any answers could be compared."""
        return any(check.result == "passed" and check.check != "answered" for check in self.checks)

    @property
    def good(self) -> bool:
        return self.compared and not any(check.result == "failed" for check in self.checks)


@admin_command
def verify(
    client: Client,
    name: Annotated[
        str,
        typer.Argument(
            help="The adapter: name or name@v2.", show_default=False, autocompletion=completing.adapter_versions
        ),
    ],
    backend: Annotated[
        list[str] | None,
        typer.Option(help="A backend to ask; repeatable. Default: as --all.", autocompletion=completing.backend_ids),
    ] = None,
    all_backends: Annotated[
        bool, typer.Option("--all", help="Ask all backends that are up and can serve it; the default.")
    ] = False,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt to send; repeatable. Default: a few general ones.")
    ] = None,
    prompt_tokens: Annotated[
        list[str] | None, typer.Option(help="A prompt as token ids, 1,2,3, for servers without a text model.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Maximum output tokens of each answer.")] = 24,
    timeout: Annotated[int, typer.Option(min=1, help="Seconds for each request, its load included.")] = 120,
    as_json: AsJson = False,
) -> int:
    """Verify by the backends' answers that an adapter takes effect; exit 0 if it does.

    Each backend answers greedy prompts, including those of the adapter's own probe.jsonl, with the base model and with
    the adapter. Exit 1 if the adapter changes nothing, if backends disagree, or if an answer is not the expected one.
    """
    if backend and all_backends:
        raise CommandError("give --backend or --all, one of the two", Exit.MISUSED)
    request = pb.VerifyRequest(
        name=name,
        backends=backend,
        prompts=[
            *(pb.VerifyPrompt(text=text) for text in prompt or ()),
            *(pb.VerifyPrompt(token_ids=_ids(text)) for text in prompt_tokens or ()),
        ],
        max_tokens=tokens,
        timeout_s=timeout,
    )
    messages = client.ask(client.adapters.Verify, request, timeout_s=None)
    findings = _collect(messages, printed=not as_json)
    if as_json:
        print_json(_record(findings))
    elif not findings.compared:
        say(NOTHING_COMPARED)
    return Exit.OK if findings.good else Exit.FAILED


def _ids(text: str) -> list[int]:
    try:
        ids = [int(token) for token in text.replace(",", " ").split()]
    except ValueError as error:
        raise CommandError(f"--prompt-tokens wants numbers, as in 1,2,3: {error}", Exit.MISUSED) from error
    if not ids or min(ids) < 0 or max(ids) >= 1 << 31:
        raise CommandError(f'--prompt-tokens wants token ids from 0 up, as in 1,2,3, and not "{text}"', Exit.MISUSED)
    return ids


def _collect(messages: Iterable[Any], printed: bool) -> Findings:
    """Collect the findings, and print them as they come if `printed` is True."""
    findings = Findings()
    for message in messages:
        kind = message.WhichOneof("finding")
        finding = getattr(message, kind)
        if kind == "plan":
            findings.plan = finding
        else:
            (findings.answers if kind == "answer" else findings.checks).append(finding)
        if printed:
            console().print(*_TOLD[kind](finding), sep="\n")
    return findings


def _plan_lines(plan: Any) -> list[Text]:
    of_own = f", {plan.expected} with a known answer" if plan.expected else ""
    first = f"verifying {plan.version} on {', '.join(plan.backends)}: {count(plan.prompts, 'prompt')}{of_own}"
    lines = [Text(first, style="bold")]
    lines += [bad(f"{skipped.backend} is skipped: {skipped.why}") for skipped in plan.skipped]
    return [*lines, Text(plan.probes)] if plan.probes else lines


def _answer_lines(answer: Any) -> list[Text]:
    if answer.adapter.error:
        shown = bad(answer.adapter.error)
    else:
        shown = Text.assemble(
            f"{_shown(answer.base)} → " if answer.changed else "",
            _shown(answer.adapter),
            ("" if answer.changed or answer.base.error else " as the base model", "yellow"),
            (f" and not {_cut(answer.expect)}" if answer.expect and not answer.matches else "", "red"),
        )
    return [Text.assemble(f"  {answer.backend}  {_prompt(answer.prompt)}  ", shown)]


def _prompt(prompt: Any) -> str:
    return _cut(prompt.text) if prompt.text else f"tokens {list(prompt.token_ids[:8])}"


def _shown(reply: Any) -> str:
    return _cut(reply.text) if reply.text or not reply.token_ids else str(list(reply.token_ids))


def _cut(text: str) -> str:
    line = text.replace("\n", "⏎")
    return f'"{line}"' if len(line) <= SHOWN_CHARACTERS else f'"{line[: SHOWN_CHARACTERS - 1]}…"'


def _check_lines(check: Any) -> list[Text]:
    lines = [Text.assemble(MARKS[check.result], f" {check.sentence}")]
    return [*lines, Text(f"  → {check.advice}", style="yellow")] if check.advice else lines


_TOLD = {"plan": _plan_lines, "answer": _answer_lines, "check": _check_lines}


def _record(findings: Findings) -> dict[str, Any]:
    return {
        "good": findings.good,
        **record_of(findings.plan),
        "answers": [record_of(answer) for answer in findings.answers],
        "checks": [record_of(check) for check in findings.checks],
    }
