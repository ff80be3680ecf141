"""What a completion or a chat asks of us: for whom, how long a prompt, how many tokens, streamed or not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sidecar import identities
from sidecar.errors import Reason, Refused
from sidecar.fronts.callers import REQUEST_ID_KEY, made_id
from sidecar.fronts.kserve_parameters import seconds_until
from sidecar.fronts.openai.body import Body
from sidecar.identities import checked, clipped, is_fit, session_of

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
COMPLETION_TOKENS_DEFAULT = 16
"""OpenAI's own for completions; a chat is as long as the engine allows."""
HEADERS = {
    "x-lora-tenant": identities.TENANT,
    "x-lora-class": identities.CLASS,
    "x-lora-deadline-ms": identities.DEADLINE,
    "x-lora-session": identities.SESSION,
}
"""What each may look like."""
REQUEST_ID_HEADER = REQUEST_ID_KEY.encode()
LENGTHS = ("max_completion_tokens", "max_tokens")


class Unfit(Refused):
    """A refusal that one member of the body is to blame for."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(Reason.INVALID_REQUEST, message)
        self.param = param


@dataclass(frozen=True)
class Caller:
    """What the headers say. `tenant` is what the client claims of itself."""

    tenant: str
    klass: str
    session: str
    deadline_s: float | None


@dataclass(frozen=True)
class Asked:
    """A request as admission sees it. `max_tokens` is None where the client leaves it to the engine.

    `prompt_tokens` counts token ids; `prompt_bytes` bounds what text may be. `answers` is how many were asked for.
    """

    path: str
    body: Body
    streams: bool
    wants_usage: bool
    max_tokens: int | None
    answers: int
    prompt_tokens: int
    prompt_bytes: int
    session: str
    """What stands for the end user, where the client names one: who that is is no business of journals and logs."""

    @property
    def model(self) -> str:
        return str(self.body.values["model"])

    @property
    def is_chat(self) -> bool:
        return self.path == CHAT


def read_asked(path: str, body: Body) -> Asked:
    """Look at a body. Raises Refused(INVALID_REQUEST) where what we must know is not as it must be."""
    values = body.values
    tokens, size_bytes, prompts = (0, _chat_bytes(body), 1) if path == CHAT else _prompts(body)
    streams = _flag(values, "stream")
    options = values.get("stream_options")
    max_tokens = next((length for name in LENGTHS if (length := _count(values, name)) is not None), None)
    if max_tokens is None and path == COMPLETIONS:
        max_tokens = COMPLETION_TOKENS_DEFAULT
    each = max(1, _count(values, "n") or 1, _count(values, "best_of") or 1)
    return Asked(
        path=path,
        body=body,
        streams=streams,
        wants_usage=streams and isinstance(options, dict) and options.get("include_usage") is True,
        max_tokens=max_tokens,
        answers=prompts * each,
        prompt_tokens=tokens,
        prompt_bytes=size_bytes,
        session=session_of(user) if isinstance(user := values.get("user"), str) else "",
    )


def _flag(values: dict[str, Any], name: str) -> bool:
    """A text that looks like a flag would be one to some engines and not to others, so none is taken."""
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise Unfit(name, f'"{name}" must be true or false')
    return bool(value)


def _count(values: dict[str, Any], name: str) -> int | None:
    value = values.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise Unfit(name, f'"{name}" must be a whole number, and not below 0')
    return value


def _chat_bytes(body: Body) -> int:
    if not isinstance(body.values.get("messages"), list):
        raise Unfit("messages", '"messages" must be a list of messages')
    return body.sizes["messages"] + body.sizes.get("tools", 0)


def _prompts(body: Body) -> tuple[int, int, int]:
    """Return token ids and bytes of all prompts, and how many prompts there are."""
    prompt = body.values.get("prompt")
    if prompt is None and "prompt_embeds" in body.values:
        return 0, body.sizes["prompt_embeds"], 1
    if isinstance(prompt, str):
        return 0, len(prompt.encode(errors="replace")), 1
    if isinstance(prompt, list) and prompt:
        if isinstance(prompt[0], int):
            return len(prompt), 0, 1
        if all(isinstance(one, str | list) for one in prompt):
            tokens = sum(len(one) for one in prompt if isinstance(one, list))
            return tokens, sum(len(one.encode(errors="replace")) for one in prompt if isinstance(one, str)), len(prompt)
    raise Unfit("prompt", '"prompt" must be a text, a list of token ids, or a list of those')


def read_caller(headers: Iterable[tuple[bytes, bytes]]) -> Caller:
    """Read our headers; of one that is given twice the last. Raises Refused(INVALID_REQUEST) for one misspelt."""
    own: dict[str, str] = {}
    for raw_name, raw in headers:
        if raw_name[:6] == b"x-lora":
            name = raw_name.decode("latin-1")
            if name not in HEADERS:
                raise _unknown(name)
            own[name] = checked(HEADERS[name], raw.decode(errors="replace"), f"the header {name}")
    return Caller(
        tenant=own.get("x-lora-tenant", ""),
        klass=own.get("x-lora-class") or "default",
        session=session_of(own.get("x-lora-session", "")),
        deadline_s=seconds_until(own.get("x-lora-deadline-ms")),
    )


def check_request_id(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Raise Refused(INVALID_REQUEST) for a request id that is not as it may be."""
    checked(identities.REQUEST_ID, _said_id(headers), f"the header {REQUEST_ID_KEY}")


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the id by which a client finds its request: its own, if it may be one, else a new one."""
    said = _said_id(headers)
    return said if said and is_fit(identities.REQUEST_ID, said) else made_id()


def _said_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    return dict(headers).get(REQUEST_ID_HEADER, b"").decode(errors="replace")


def _unknown(name: str) -> Refused:
    near = difflib.get_close_matches(name[:80], HEADERS, n=1, cutoff=0.85)
    hint = f'did you mean "{near[0]}"?' if near else f'there are {", ".join(HEADERS)}; an adapter is named by "model"'
    return Refused(Reason.INVALID_REQUEST, f'unknown header "{clipped(name)}"; {hint}')
