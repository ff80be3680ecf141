"""The paths of the OpenAI API that name a model, each a row: its prompt, what bounds its answer, and its events.

`ROWS` has them all. The front reads a request by its row, and the run reads the answer by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
EMBEDDINGS, CLASSIFY, POOLING = "/v1/embeddings", "/v1/classify", "/v1/pooling"
SCORE, RERANK = "/v1/score", "/v1/rerank"
MAX_TOKENS = "max_tokens"


@dataclass(frozen=True)
class Grammar:
    """How the events of a stream are told apart by their names. Without `finals` they have none, as OpenAI's choices.

    An event whose name ends as one of `tokens` has a token. One of `finals` is the last, one of `errors` an error.
    """

    tokens: tuple[bytes, ...] = ()
    finals: tuple[bytes, ...] = ()
    errors: tuple[bytes, ...] = ()

    @property
    def is_named(self) -> bool:
        return bool(self.finals)


CHOICES = Grammar()


@dataclass(frozen=True)
class ApiPath:
    """A path. An engine may serve it as `at_engine`."""

    path: str
    summary: str
    operation: str = "chat"
    """What it does, by the GenAI conventions for traces and metrics: their name, or ours where they have none."""
    prompt: str = ""
    """The member whose value is a text, a list of token ids, or a list of either."""
    texts: tuple[str, ...] = ()
    """Members whose size bounds the tokens of the prompt."""
    lists: tuple[str, ...] = ()
    """Members of which each element is a sequence of the engine's."""
    lengths: tuple[str, ...] = ()
    """Members that bound the answer's tokens; without one, there are no tokens in it."""
    lengths_too: tuple[str, ...] = ()
    """Members that some engines take for one, and others ignore."""
    length_default: int | None = None
    """The tokens of an answer without a length; None if it may be as long as the context."""
    is_split: bool = False
    """True if each prompt of a list is a request of its own."""
    as_text: bool = False
    """True if an engine that takes nothing but text can be asked."""
    adds: Mapping[str, str] = field(default_factory=dict)
    """JSON that is added where the client has not said it."""
    allows: Mapping[str, tuple[tuple[object, ...], str]] = field(default_factory=dict)
    """The values, beside null, that a member may have, and why no others."""
    grammar: Grammar = CHOICES
    engine_path: str = ""
    is_anthropics: bool = False
    """True if its clients send keys, and read errors, in the form of Anthropic's API."""

    @property
    def at_engine(self) -> str:
        return self.engine_path or self.path

    def error_event(self, error: bytes) -> bytes:
        """Return the last event of a stream that ends with an error, in the form of its API."""
        return (b"event: error\n" if self.grammar.is_named else b"") + b"data: " + error + b"\n\n"

    @property
    def generates(self) -> bool:
        return bool(self.lengths)


_STATELESS = "the sidecar keeps no answers, since another engine may have the next request; send the conversation in"
_NO_BYTES = 'answers are sent as JSON: "float" or "base64"'
_POOLED: dict[str, tuple[tuple[object, ...], str]] = {
    "stream": ((False,), "the answer comes as a whole; leave it out"),
    "encoding_format": (("float", "base64"), _NO_BYTES),
}


_PAIRS = ("queries", "query", "documents", "items", "data_1", "data_2", "text_1", "text_2")
_INPUTS = ApiPath(EMBEDDINGS, "Embed texts", "embeddings", prompt="input", texts=("messages", "tools"), allows=_POOLED)
ROWS: dict[str, ApiPath] = {
    row.path: row
    for row in (
        ApiPath(
            COMPLETIONS, "Complete prompts", "text_completion", prompt="prompt", texts=("prompt_embeds",),
            lengths=(MAX_TOKENS,), lengths_too=("max_completion_tokens",), length_default=16,
            is_split=True, as_text=True,
        ),
        ApiPath(
            CHAT, "Answer a chat", texts=("messages", "tools"), lengths=("max_completion_tokens", MAX_TOKENS),
            as_text=True,
        ),
        ApiPath(
            RESPONSES, "Answer a conversation (OpenAI's Responses)",
            texts=("input", "previous_input_messages", "instructions", "tools"),
            lengths=("max_output_tokens",), adds={"store": "false"},
            allows={
                "store": ((False,), f'{_STATELESS} "input", and "store": false'),
                "background": ((False,), "an answer in the background cannot be fetched; leave it out"),
                "previous_response_id": ((), f'{_STATELESS} "input"'),
                "conversation": ((), f'{_STATELESS} "input"'),
            },
            grammar=Grammar(
                (b".delta",),
                (b"response.completed", b"response.incomplete"),
                (b"error", b"response.failed"),
            ),
        ),
        ApiPath(
            MESSAGES, "Answer a conversation (Anthropic's Messages)", texts=("messages", "system", "tools"),
            lengths=(MAX_TOKENS,),
            grammar=Grammar((b"content_block_delta",), (b"message_stop",), (b"error",)),
            is_anthropics=True,
        ),
        _INPUTS,
        replace(_INPUTS, path=CLASSIFY, summary="Classify texts", operation="classify", engine_path="/classify"),
        replace(
            _INPUTS, path=POOLING, summary="Return what the model's pooler makes of texts", operation="pooling",
            engine_path="/pooling",
        ),
        ApiPath(SCORE, "Score pairs of texts", "score", texts=_PAIRS, lists=_PAIRS, allows=_POOLED),
        ApiPath(RERANK, "Rank documents for a query", "rerank", texts=_PAIRS, lists=_PAIRS, allows=_POOLED),
    )
}  # fmt: skip
"""By the path that clients ask."""
AT_ENGINE: dict[str, ApiPath] = {row.at_engine: row for row in ROWS.values()}


def generates(paths: tuple[str, ...] | None) -> bool:
    """Return True unless a server that has these paths does not answer with tokens; None: it has not told."""
    return paths is None or COMPLETIONS in paths
