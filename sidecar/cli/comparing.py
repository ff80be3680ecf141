"""`sidecar generate --compare`: the same prompts to several versions, side by side, the first difference marked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from sidecar.cli.client import Client
from sidecar.cli.exits import CommandError, Exit
from sidecar.cli.show import console, print_json, table
from sidecar.proto import gateway_pb2 as pb


def read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    """Return the one prompt, or the lines of a file. Raises CommandError when there is none, or both."""
    if (prompt is None) == (file is None):
        raise CommandError("--compare wants a prompt or --prompts FILE, one of the two", Exit.MISUSED)
    if file is None:
        assert prompt is not None
        return [prompt]
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}", Exit.MISUSED) from error
    if not lines:
        raise CommandError(f"{file} has no prompt; write one on each line", Exit.MISUSED)
    return lines


def compare(
    client: Client, versions: Sequence[str], prompts: Sequence[str], fields: dict[str, Any], as_json: bool
) -> None:
    """Ask every version each prompt and show what they say."""
    for prompt in prompts:
        answers = {version: _answer(client, version, prompt, fields) for version in versions}
        reference = answers[versions[0]]
        places = {version: first_difference(reference, answer) for version, answer in answers.items()}
        if as_json:
            shown = {v: {"text": "".join(a), "first_difference": places[v]} for v, a in answers.items()}
            print_json({"prompt": prompt, "answers": shown})
            continue
        rows = [(version, _marked(answer, places[version])) for version, answer in answers.items()]
        console().print(Text(prompt, style="bold"), table(("VERSION", "ANSWER"), rows), "")


def _answer(client: Client, version: str, prompt: str, fields: dict[str, Any]) -> list[str]:
    """Return an answer token by token; "base" is the base model."""
    request = pb.GenerateRequest(adapter="" if version == "base" else version, text=prompt, **fields)
    return [m.text for m in client.ask(client.gateway.Generate, request, timeout_s=None) if m.text]


def first_difference(reference: Sequence[str], answer: Sequence[str]) -> int | None:
    """Return the index of the first token that differs, None for equal answers."""
    for index, (left, right) in enumerate(zip(reference, answer, strict=False)):
        if left != right:
            return index
    return None if len(reference) == len(answer) else min(len(reference), len(answer))


def _marked(answer: Sequence[str], place: int | None) -> Text:
    if place is None:
        return Text("".join(answer))
    token = answer[place] if place < len(answer) else "(ends)"
    return Text.assemble("".join(answer[:place]), (f"»{token}«", "bold red"), "".join(answer[place + 1 :]))
