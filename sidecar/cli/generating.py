"""`sidecar generate`: send one request and print the answer as it arrives."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from sidecar.cli import completing
from sidecar.cli.awaiting import reason_of, until_begun
from sidecar.cli.client import Client
from sidecar.cli.durations import positive_seconds_in
from sidecar.cli.endpoint import PANEL, data_command
from sidecar.cli.exits import CommandError, Exit, harmless, say
from sidecar.cli.listener import ADMIN_DEFAULT, ADMIN_VARIABLE
from sidecar.cli.show import AsJson, console, count, duration, facts, print_json, record_of
from sidecar.proto import gateway_pb2 as pb

Asked = Callable[[Any], Iterator[Any]]
"""Sends a request and yields its answer."""

TIMEOUT_S = 60.0
SAMPLING, CALLER, COMPARING = "Sampling", "Who asks", "Comparing"

CACHE_WORDS = {
    "base": "no adapter needed",
    "resident": "adapter resident",
    "host": "adapter in the host store",
    "fetched": "adapter fetched",
    "joined": "adapter fetched for an earlier request",
}


@data_command
def generate(
    client: Client,
    adapter: Annotated[
        str | None,
        typer.Argument(
            help='The adapter: name, name@v1; "base" for none.', show_default=False, autocompletion=completing.models
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Argument(help='The prompt; "-" reads stdin.', show_default=False)] = None,
    tokens: Annotated[str | None, typer.Option(help="Token ids instead of a prompt: 1,2,3.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Output tokens at most.")] = 128,
    stats: Annotated[bool, typer.Option("--stats", help="Print on stderr where the answer came from.")] = False,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Request the whole answer at once.")] = False,
    temperature: Annotated[float | None, typer.Option(min=0, rich_help_panel=SAMPLING)] = None,
    top_k: Annotated[int | None, typer.Option(min=0, rich_help_panel=SAMPLING)] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, rich_help_panel=SAMPLING)] = None,
    seed: Annotated[int | None, typer.Option(min=0, rich_help_panel=SAMPLING)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A word to stop at.", rich_help_panel=SAMPLING)] = None,
    tenant: Annotated[str, typer.Option(help="On whose behalf.", rich_help_panel=CALLER, show_default=False)] = "",
    klass: Annotated[str, typer.Option("--class", help="Request class.", rich_help_panel=CALLER)] = "default",
    request_id: Annotated[
        str,
        typer.Option(
            help="Id of the request in logs; random if not given.", rich_help_panel=CALLER, show_default=False
        ),
    ] = "",
    deadline_ms: Annotated[
        int, typer.Option(min=0, help="Deadline in milliseconds; 0: none.", rich_help_panel=CALLER)
    ] = 0,
    timeout: Annotated[
        str,
        typer.Option(
            metavar="TIME", help="How long to wait for the answer to begin: 30s, 5m. Default: 1m, or the deadline."
        ),
    ] = "",
    compare: Annotated[
        str | None, typer.Option(help="Versions to compare: sql@v7,sql@v8,base.", rich_help_panel=COMPARING)
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file of prompts, one per line.", rich_help_panel=COMPARING)
    ] = None,
    admin: Annotated[
        str,
        typer.Option(
            envvar=ADMIN_VARIABLE, help="Address of the admin listener, to say why it waits.", rich_help_panel=PANEL
        ),
    ] = ADMIN_DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Send a prompt to an adapter and print the answer as it arrives.

    What an answer waits for that has not begun after two seconds is said on stderr, and after a minute it is given up.
    """
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    fields: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
    fields["class"] = klass
    limit_s = positive_seconds_in(timeout, "--timeout") if timeout else None if deadline_ms else TIMEOUT_S

    def asked(request: Any) -> Iterator[Any]:
        request.request_id = request.request_id or token_hex(16)
        call = client.ask(client.gateway.Generate, request, timeout_s=None)
        why = partial(reason_of, client, admin, request.request_id)
        return until_begun(call, request.adapter or "base", limit_s, why, quiet=as_json)

    if compare is not None:  # there is no adapter argument then: the first word is the prompt
        fields |= {"max_tokens": max_tokens, "stop_words": stop, "tenant": tenant, "deadline_ms": deadline_ms}
        fields["request_id"] = request_id
        _compare(asked, compare.split(","), _read_prompts(adapter, prompts), fields, as_json)
        return
    if not adapter:
        raise CommandError('name an adapter, "base" for none, or versions with --compare', Exit.MISUSED)
    request = pb.GenerateRequest(
        adapter=adapter,
        max_tokens=max_tokens,
        stream=not no_stream,
        stop_words=stop,
        tenant=tenant,
        deadline_ms=deadline_ms,
        request_id=request_id,
        **_prompt(prompt, tokens),
        **fields,
    )
    messages = asked(request)
    origin = _collect(messages) if as_json else _print(messages)
    if stats and origin is not None:
        say(sentence(origin), error=True)


def _prompt(prompt: str | None, tokens: str | None) -> dict[str, Any]:
    if (prompt is None) == (tokens is None):
        raise CommandError("give a prompt or --tokens, one of the two", Exit.MISUSED)
    if tokens is None:
        return {"text": sys.stdin.read() if prompt == "-" else prompt}
    try:
        ids = [int(token) for token in tokens.replace(",", " ").split()]
    except ValueError as error:
        raise CommandError(f"--tokens wants numbers, as in 1,2,3: {error}", Exit.MISUSED) from error
    return {"tokens": pb.TokenIds(ids=ids)}


def _print(messages: Iterable[Any]) -> Any:
    """Print the answer as it arrives; return its origin."""
    origin = None
    line_open = False
    try:
        for message in messages:
            text = message.text or "".join(f"{token} " for token in message.token_ids)
            if text:
                sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
                sys.stdout.flush()
                line_open = not text.endswith("\n")
            origin = message.origin if message.HasField("origin") else origin
    finally:
        if line_open:
            sys.stdout.write("\n")
            sys.stdout.flush()
    return origin


def _collect(messages: Iterable[Any]) -> Any:
    """Print the whole answer as one JSON object; return its origin."""
    text, token_ids, origin = "", [], None
    for message in messages:
        text += message.text
        token_ids += message.token_ids
        origin = message.origin if message.HasField("origin") else origin
    print_json({"text": text, "token_ids": token_ids, "origin": origin and record_of(origin)})
    return origin


def sentence(origin: Any) -> str:
    """Return a sentence about an answer's origin and timing."""
    where = f" from {origin.backend}" if origin.backend else ""
    cache = CACHE_WORDS.get(origin.cache, origin.cache)
    if origin.load_ms:
        cache += f" and loaded (load {duration(origin.load_ms / 1000)})"
    queued = f"queued {duration(origin.queue_ms / 1000)}"
    produced, heals = count(origin.output_tokens, "token"), count(origin.heals, "heal")
    return f"{origin.version or 'base'}{where}: {cache}, {queued}, {produced}, {heals}"


# The same prompts to several versions, side by side.


def _read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    """Return the one prompt, or the lines of a file. Raises CommandError for neither or both."""
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


def _compare(
    asked: Asked, versions: Sequence[str], prompts: Sequence[str], fields: dict[str, Any], as_json: bool
) -> None:
    """Send each prompt to every version and print the answers side by side."""
    for prompt in prompts:
        answers = {version: _answer(asked, version, prompt, fields) for version in versions}
        reference = answers[versions[0]]
        places = {version: first_difference(reference, answer) for version, answer in answers.items()}
        if as_json:
            shown = {v: {"text": "".join(a), "first_difference": places[v]} for v, a in answers.items()}
            print_json({"prompt": prompt, "answers": shown})
            continue
        marked = {version: _marked(answer, places[version]) for version, answer in answers.items()}
        console().print(Text(prompt, style="bold"), side_by_side(marked), "")


def _answer(asked: Asked, version: str, prompt: str, fields: dict[str, Any]) -> list[str]:
    """Return an answer token by token; "base" is the base model."""
    request = pb.GenerateRequest(adapter="" if version == "base" else version, text=prompt, **fields)
    return [message.text for message in asked(request) if message.text]


def first_difference(reference: Sequence[str], answer: Sequence[str]) -> int | None:
    """Return the index of the first token that differs, or None for equal answers."""
    for index, (left, right) in enumerate(zip(reference, answer, strict=False)):
        if left != right:
            return index
    return None if len(reference) == len(answer) else min(len(reference), len(answer))


def side_by_side(marked: dict[str, Text]) -> RenderableType:
    """Return each version with its answer beside it, folded to what is left of a line: nothing of an answer is cut."""
    return facts((version, answer or Text("(empty)", style="dim")) for version, answer in marked.items())


def _marked(answer: Sequence[str], place: int | None) -> Text:
    if place is None:
        return Text("".join(answer))
    token = answer[place] if place < len(answer) else "(ends)"
    return Text.assemble("".join(answer[:place]), (f"»{token}«", "bold red"), "".join(answer[place + 1 :]))
