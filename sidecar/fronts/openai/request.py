"""What a completion or a chat asks of us: for whom, how long a prompt, how many tokens, streamed or not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sidecar.config import identities
from sidecar.config.identities import checked, clipped, is_fit, session_of
from sidecar.errors import Reason, Refused
from sidecar.fronts.callers import REQUEST_ID_KEY, made_id
from sidecar.fronts.kserve.parameters import seconds_until
from sidecar.fronts.openai.body import Body, Span

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
ONCE = frozenset((*(name.encode() for name in HEADERS), REQUEST_ID_HEADER, b"authorization"))
"""Headers that say who asks. Of two a proxy may read the one and we the other."""
KV_TRANSFER = "kv_transfer_params"
"""A router's word to engines that hand prompts to each other: from a client it would be a look into others' prompts."""
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
class OpenAiRequest:
    """A request as admission sees it. `max_tokens` is None where the client leaves it to the engine.

    `prompt_tokens` counts token ids; `prompt_bytes` bounds what text may be. `answers` is how many were asked for,
    which the engine generates side by side. `part` is where the one prompt stands that it is about, where a body has
    several.
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
    part: Span | None = None

    @property
    def around(self) -> tuple[bytes, bytes]:
        """The body's bytes up to and behind the name of the model."""
        return self.body.around(self.part)

    @property
    def size_bytes(self) -> int:
        """The length of what goes to an engine, the name aside."""
        whole = len(self.body.raw)
        if self.part is None:
            return whole
        (first, last), (begin, end) = self.body.prompt, self.part
        return whole - (last - first) + (end - begin)

    @property
    def model(self) -> str:
        return str(self.body.values["model"])

    @property
    def is_chat(self) -> bool:
        return self.path == CHAT


def read_asked(path: str, body: Body) -> OpenAiRequest:
    """Look at a body. Raises Refused(INVALID_REQUEST) where what we must know is not as it must be."""
    values = body.values
    if values.get(KV_TRANSFER) is not None:
        message = f'"{KV_TRANSFER}" says which blocks of a KV cache an engine reads and from whom; leave it out'
        raise Unfit(KV_TRANSFER, message)
    tokens, size_bytes, prompts = (0, _chat_bytes(body), 1) if path == CHAT else _prompts(body)
    streams = _flag(values, "stream")
    options = values.get("stream_options")
    max_tokens = next((length for name in LENGTHS if (length := _count(values, name)) is not None), None)
    if max_tokens is None and path == COMPLETIONS:
        max_tokens = COMPLETION_TOKENS_DEFAULT
    each = max(1, _count(values, "n") or 1, _count(values, "best_of") or 1)
    return OpenAiRequest(
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


def parts_of(asked: OpenAiRequest, prompts_max: int, bytes_max: int) -> tuple[OpenAiRequest, ...]:
    """Return the requests that a body asks for: one for each prompt of a list, so that each finds a seat by itself.

    Raises Unfit for more prompts than are taken, and where these requests would have more bytes in all.
    """
    values, body = asked.body.values, asked.body
    prompts: Any = values.get("prompt")
    if asked.is_chat or values.get("prompt_embeds") is not None or not _are_several(prompts):
        return (asked,)
    if len(prompts) > prompts_max:
        raise Unfit(
            "prompt",
            f"the list has {len(prompts)} prompts; at most {prompts_max} are taken in one request: send the rest in "
            "others, or raise listeners.http.prompts_max",
        )
    rest_bytes = len(body.raw) - (body.prompt[1] - body.prompt[0])
    if rest_bytes * len(prompts) > bytes_max:
        raise Unfit(
            "prompt",
            f"each of the {len(prompts)} prompts takes the other {rest_bytes} bytes of the body along, together more "
            f"than {bytes_max}; send fewer prompts in one request, or raise listeners.http.body_bytes_max",
        )
    each = asked.answers // len(prompts)
    return tuple(
        replace(asked, part=span, answers=each, prompt_tokens=_tokens_in([prompt]), prompt_bytes=_bytes_in([prompt]))
        for prompt, span in zip(prompts, body.prompts(), strict=True)
    )


def _are_several(prompt: Any) -> bool:
    """Whether it is a list of several prompts, and not one of token ids; a list of one is as good as that one."""
    return isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)


def _flag(values: dict[str, Any], name: str) -> bool:
    """A text that looks like a flag would be one to some engines and not to others, so none is taken."""
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise Unfit(name, f'"{name}" must be true or false')
    return bool(value)


def _count(values: dict[str, Any], name: str) -> int | None:
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise Unfit(name, f'"{name}" must be a whole number, and not below 0')
    return value


def _chat_bytes(body: Body) -> int:
    if not isinstance(body.values.get("messages"), list):
        raise Unfit("messages", '"messages" must be a list of messages')
    return body.sizes["messages"] + body.sizes.get("tools", 0)


def _prompts(body: Body) -> tuple[int, int, int]:
    """Return token ids and bytes of all prompts, and how many prompts there are."""
    prompt, embeds = body.values.get("prompt"), body.values.get("prompt_embeds")
    if embeds is None:
        return _given(prompt)
    tokens, size_bytes, count = (0, 0, 0) if prompt is None else _given(prompt)
    more = len(embeds) if isinstance(embeds, list) else 1
    return tokens, size_bytes + body.sizes["prompt_embeds"], count + more


def _given(prompt: Any) -> tuple[int, int, int]:
    if isinstance(prompt, str):
        return 0, _bytes_in([prompt]), 1
    if isinstance(prompt, list) and prompt:
        if isinstance(prompt[0], int):
            return len(prompt), 0, 1
        if all(isinstance(one, str) for one in prompt) or all(_is_token_ids(one) for one in prompt):
            return _tokens_in(prompt), _bytes_in(prompt), len(prompt)
    raise Unfit("prompt", '"prompt" must be a text, a list of token ids, or a list of either')


def _is_token_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(isinstance(token, int | float) for token in prompt)


def _tokens_in(prompts: Sequence[Any]) -> int:
    return sum(len(one) for one in prompts if isinstance(one, list))


def _bytes_in(prompts: Sequence[Any]) -> int:
    return sum(len(one.encode(errors="replace")) for one in prompts if isinstance(one, str))


def read_caller(headers: Iterable[tuple[bytes, bytes]]) -> Caller:
    """Read our headers. Raises Refused(INVALID_REQUEST) for one that is misspelt or given twice."""
    own: dict[str, str] = {}
    once: set[bytes] = set()
    for raw_name, raw in headers:
        if raw_name in once:
            raise Refused(Reason.INVALID_REQUEST, f"the header {raw_name.decode()} is given twice; send it once")
        if raw_name in ONCE:
            once.add(raw_name)
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
    """Return the request's own id, "" where it has none or several, which `read_caller` refuses."""
    given = [value for name, value in headers if name == REQUEST_ID_HEADER]
    return given[0].decode(errors="replace") if len(given) == 1 else ""


def _unknown(name: str) -> Refused:
    near = difflib.get_close_matches(name[:80], HEADERS, n=1, cutoff=0.85)
    hint = f'did you mean "{near[0]}"?' if near else f'there are {", ".join(HEADERS)}; an adapter is named by "model"'
    return Refused(Reason.INVALID_REQUEST, f'unknown header "{clipped(name)}"; {hint}')
