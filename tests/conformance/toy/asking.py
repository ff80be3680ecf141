"""How requests of ours are put to the toy engine's two models, and their answers read."""

from __future__ import annotations

import json
import struct
from typing import Any

from sidecar.backends.api import Prompt, Reply
from sidecar.backends.kind import Ask, Asking, Piece
from sidecar.backends.wire import ModelInferRequest

SAMPLING = (
    "temperature", "top_k", "top_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


def _why_not(ask: Ask) -> str:
    return "the toy engine has no stop words; leave them out" if ask.stop_words else ""


def _write(ask: Ask, streams: bool) -> bytes:
    """Return the value of `ask` in the line that asks the engine."""
    record: dict[str, Any] = {
        "prompt": ask.text if ask.text is not None else list(ask.token_ids),
        "max_tokens": ask.max_tokens,
        "stream": streams,
        **{field: getattr(ask, field) for field in SAMPLING if getattr(ask, field) is not None},
    }
    if ask.ignore_eos:
        record["ignore_eos"] = True
    return json.dumps(record).encode()


class _Reads:
    """Lines of the engine: each says what is new."""

    def __init__(self, is_text: bool) -> None:
        self._is_text = is_text

    def read(self, reply: Reply) -> Piece:
        record = json.loads(reply.raw)
        tokens = record["tokens"]
        return Piece(record["text"], (), len(tokens)) if self._is_text else Piece("", tokens, len(tokens))


def _why_not_kserve(ask: Ask) -> str:
    if ask.text is None:
        return "the toy engine's KServe model takes text only; send the prompt as text, not as token ids"
    lacked = [field for field in SAMPLING if getattr(ask, field) not in (None, 1)]  # top_k 1 is how it answers
    lacked += ["ignore_eos"] if ask.ignore_eos else []
    if lacked:
        return f"the toy engine's KServe model has no {', '.join(lacked)}; leave it out"
    return _why_not(ask)


def _write_kserve(ask: Ask, streams: bool) -> bytes:
    """Return a `ModelInferRequest`, as a client of the model would write it; the backend says whether it streams."""
    message = ModelInferRequest(model_name="toy_kserve")
    text = (ask.text or "").encode()
    message.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    message.raw_input_contents.append(struct.pack("<I", len(text)) + text)
    message.inputs.add(name="max_tokens", datatype="INT32", shape=[1])
    message.raw_input_contents.append(struct.pack("<i", ask.max_tokens))
    message.parameters["toy_stream"].bool_param = streams
    return bytes(message.SerializeToString())


class _ReadsKServe:
    """Replies of the KServe model."""

    def __init__(self, is_text: bool) -> None:
        assert is_text, "the KServe model answers in text"

    def read(self, reply: Reply) -> Piece:
        text, length = reply.message.raw_output_contents
        return Piece(text[4:].decode(), (), struct.unpack("<i", length)[0])


ASKING = Asking(_write, _why_not, _Reads)
ASKING_KSERVE = Asking(_write_kserve, _why_not_kserve, _ReadsKServe, frozenset({Prompt.TEXT}))
