"""Read a request by the row of its path: its prompt's length, the tokens it asks for, streamed or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from sidecar.backends.openai.paths import CHAT, ROWS, ApiPath
from sidecar.config.identities import session_of
from sidecar.errors import Reason, Refused
from sidecar.fronts.openai.body import LENGTHS, SALT, Body, Span

N, BEST_OF, MESSAGES_OF = "n", "best_of", "messages"
KV_TRANSFER = "kv_transfer_params"
"""A router's message to engines that share prompts. From a client it would give access to others' prompts."""


class Unfit(Refused):
    """A refusal for which one member of the body, `param`, is to blame."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(Reason.INVALID_REQUEST, message)
        self.param = param


class NotServed(Refused):
    """No engine has the path."""

    def __init__(self, message: str) -> None:
        super().__init__(Reason.INVALID_REQUEST, message)


@dataclass(frozen=True)
class OpenAiRequest:
    """A request as admission sees it. `max_tokens` is None if the client leaves it to the engine.

    `members` are the body's members, but for lengths that are null, with values that are short. `prompt_tokens` counts
    token ids; `prompt_bytes` bounds the tokens of text. `answers` is how many answers the engine generates side by
    side. `part` is the span of the one prompt it is about, if the body has several.
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
    """A digest of the end user that the client names: journals and logs must not show who that is."""
    members: Mapping[str, Any] = field(default_factory=dict)
    id_range_found: tuple[float, float] | None = field(default=None, compare=False)
    """What was found in another process, where the values have stayed."""
    has_length: bool = False
    """True if the client says how long the answer may be, in a member that engines read on this path."""
    part: Span | None = None
    choice: int | None = None
    """Which of several answers to one prompt it is, if each is a request of its own."""

    def around(self, length: int | None = None, salt: str | None = None) -> tuple[bytes, bytes]:
        """Return the body's bytes before and after the model's name; with `length`, it asks for so many tokens."""
        more = {name: value for name, value in self.row.adds.items() if name not in self.members}
        return self.body.around(self.part, length, self.row.lengths, salt, more)

    @property
    def row(self) -> ApiPath:
        return ROWS[self.path]

    @cached_property
    def id_range(self) -> tuple[float, float] | None:
        """The least and the largest token id of its prompts; None if they have none."""
        prompt = self.body.values.get(self.row.prompt)
        lists = [prompt, *prompt] if isinstance(prompt, list) else []
        ids = [each for ids in lists if isinstance(ids, list) for each in ids if isinstance(each, int | float)]
        return (min(ids), max(ids)) if ids else self.id_range_found

    @property
    def text(self) -> str | None:
        """The prompt, if it is one text."""
        prompt = self.body.values.get(self.row.prompt)
        return prompt if isinstance(prompt, str) else None

    @property
    def salt(self) -> str:
        """The salt that the client has chosen for its prefix blocks, as it is written; "" for none."""
        written = self.body.raw[slice(*self.body.salt)].decode()
        return "" if written == "null" else written

    @property
    def size_bytes(self) -> int:
        """Size of what is sent to an engine, without the model's name."""
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


def read_request(path: str, body: Body) -> OpenAiRequest:
    """Read the members of a body that admission needs. Raises Refused(INVALID_REQUEST) for a malformed one."""
    values = body.values
    if values.get(KV_TRANSFER) is not None:
        message = f'"{KV_TRANSFER}" says which blocks of a KV cache an engine reads and from whom; leave it out'
        raise Unfit(KV_TRANSFER, message)
    if values.get(SALT) is not None and not (isinstance(values[SALT], str) and values[SALT]):
        raise Unfit(SALT, f'"{SALT}" must be a text that is not empty; leave it out for none')
    row = ROWS[path]
    for name, (allowed, why) in row.allows.items():
        if values.get(name) is not None and values[name] not in allowed:
            raise Unfit(name, f'"{name}" is not served as it is here: {why}')
    tokens, size_bytes, prompts = _sizes(row, body)
    streams = _flag(values, "stream")
    options = values.get("stream_options")
    # The largest, since engines differ in which of two they read.
    lengths = (*row.lengths, *row.lengths_too)
    max_tokens = max((length for name in lengths if (length := _count(values, name)) is not None), default=None)
    if path == CHAT:  # some versions of vLLM take a 0 for no length
        has_length = bool(max_tokens)
    else:
        has_length = any(values.get(name) is not None for name in row.lengths)
    if max_tokens is None:
        max_tokens = row.length_default
    if not row.generates:
        max_tokens, has_length = 1, True  # a sequence that makes no token takes a place as one that makes one
    return OpenAiRequest(
        path=path,
        body=body,
        streams=streams,
        wants_usage=streams and isinstance(options, dict) and options.get("include_usage") is True,
        max_tokens=max_tokens,
        answers=prompts * (_answers(values) if row.lengths_too or path == CHAT else 1),
        prompt_tokens=tokens,
        prompt_bytes=size_bytes,
        session=session_of(user) if isinstance(user := values.get("user"), str) else "",
        members={name: _short(value) for name, value in values.items() if name not in LENGTHS or value is not None},
        has_length=has_length,
    )


def parts_of(asked: OpenAiRequest, prompts_max: int, bytes_max: int) -> tuple[OpenAiRequest, ...]:
    """Return the requests of a body: one for each prompt of a list, so that each is scheduled by itself.

    Raises Unfit for more than `prompts_max` prompts, or if these requests would have more than `bytes_max` in all.
    """
    values, body = asked.body.values, asked.body
    prompts: Any = values.get("prompt")
    if not asked.row.is_split or values.get("prompt_embeds") is not None or not _are_several(prompts):
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


def choices_of(asked: OpenAiRequest, prompts: int, requests_max: int, bytes_max: int) -> tuple[OpenAiRequest, ...]:
    """Return one of `prompts` prompts as a request for each of its answers, for engines that give one to a request.

    Raises Unfit for more than `requests_max` answers to all prompts, or if they would have more than `bytes_max`.
    """
    total = prompts * asked.answers
    best_of = asked.body.values.get(BEST_OF)
    if best_of not in (None, 1, asked.body.values.get(N)):
        raise Unfit(BEST_OF, "the engines behind this model cannot choose the best of their answers; leave best_of out")
    if total > requests_max or total * asked.size_bytes > bytes_max:
        raise Unfit(
            N,
            f"each of the {total} answers is a request of its own here: at most {requests_max} are taken at once "
            f"(listeners.http.prompts_max), and {bytes_max} bytes in all; set a smaller n",
        )
    return tuple(replace(asked, choice=choice, answers=1) for choice in range(asked.answers))


def _short(value: Any) -> Any:
    """Return a value by which a request may be judged; None for what is long: it may have to come from a process."""
    return value if isinstance(value, bool | int | float) else None


def _are_several(prompt: Any) -> bool:
    """Return True for a list of several prompts; False for one of token ids, or of one prompt."""
    return isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int | float)


def _flag(values: dict[str, Any], name: str) -> bool:
    """Return a flag. Raises Unfit for text that looks like one: engines differ in whether they accept it."""
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise Unfit(name, f'"{name}" must be true or false')
    return bool(value)


def _answers(values: dict[str, Any]) -> int:
    """Return how many answers an engine makes of a prompt: `best_of`, of which the client gets `n`."""
    asked, best_of = _count(values, N), _count(values, BEST_OF)
    returned = 1 if asked is None else asked
    if not returned:
        raise Unfit(N, '"n" must be at least 1')
    if best_of is not None and best_of < returned:
        raise Unfit(BEST_OF, f'"best_of" is {best_of} and must be at least "n", which is {returned}')
    return returned if best_of is None else best_of


def _count(values: dict[str, Any], name: str) -> int | None:
    value = whole_number(values.get(name))
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise Unfit(name, f'"{name}" must be a whole number, and not below 0')
    return value


def whole_number(value: Any) -> Any:
    """Return a number such as 4.0 as an integer, since JSON's schemas and engines take it for one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _sizes(row: ApiPath, body: Body) -> tuple[int, int, int]:
    """Return the token ids and bytes of all prompts, and how many sequences they are."""
    values = body.values
    texts = [name for name in row.texts if values.get(name) is not None]
    size_bytes, prompt = sum(body.sizes[name] for name in texts), values.get(row.prompt)
    is_chat = MESSAGES_OF in row.texts and (MESSAGES_OF in texts or not row.prompt)
    if is_chat and not isinstance(values.get(MESSAGES_OF), list):
        raise Unfit(MESSAGES_OF, f'"{MESSAGES_OF}" must be a list of messages')
    if row.is_split:
        first = values[texts[0]] if texts else []
        more = len(first) if isinstance(first, list) else 1
        tokens, in_prompt, count = (0, 0, 0) if prompt is None and texts else _prompt_sizes(row.prompt, prompt)
        return tokens, size_bytes + in_prompt, count + more
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):  # a chat's messages
        return 0, size_bytes + body.sizes[row.prompt], 1
    if row.prompt and (prompt is not None or not texts):
        tokens, in_prompt, count = _prompt_sizes(row.prompt, prompt)
        return tokens, size_bytes + in_prompt, count
    if not texts:
        raise Unfit(row.texts[0], f'"{row.texts[0]}" is missing')
    lists = [values[name] for name in row.lists if isinstance(values.get(name), list)]
    return 0, size_bytes, max(map(len, lists), default=1)


def _prompt_sizes(name: str, prompt: Any) -> tuple[int, int, int]:
    if isinstance(prompt, str):
        return 0, _bytes_in([prompt]), 1
    if isinstance(prompt, list) and prompt:
        if isinstance(prompt[0], int | float):
            return len(prompt), 0, 1
        if all(isinstance(one, str) for one in prompt) or all(_is_token_ids(one) for one in prompt):
            return _tokens_in(prompt), _bytes_in(prompt), len(prompt)
    raise Unfit(name, f'"{name}" must be a text, a list of token ids, or a list of either')


def _is_token_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(isinstance(token, int | float) for token in prompt)


def _tokens_in(prompts: Sequence[Any]) -> int:
    return sum(len(one) for one in prompts if isinstance(one, list))


def _bytes_in(prompts: Sequence[Any]) -> int:
    return sum(len(one.encode()) for one in prompts if isinstance(one, str))
