"""An engine's replies as `Generate` gives them on: the text or the token ids of one, and how many tokens those are."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np

from sidecar.backends.api import Reply
from sidecar.proto import gateway_pb2

EVENT, DONE = b"data:", b"[DONE]"
HTTP_BEGINS = (b"d", b"{")
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a character whose last bytes are still to come looks like at the end of a text."""


class TextSoFar:
    """What a client has been told of a text that comes whole each time, a little longer."""

    def __init__(self) -> None:
        self._told = 0
        self._held = ""

    def news(self, text: str, has_text: bool, final: bool) -> str:
        """Return what is new, in order; a character that may still become another is held back to the end."""
        if not has_text:
            text = self._held  # an end without data
        self._held = text
        settled = text if final else text.rstrip(INCOMPLETE)
        piece = settled[self._told :]
        self._told = max(self._told, len(settled))
        return piece


def response_of(reply: Reply, text: bool) -> tuple[Any, int]:
    """Return our form of an engine's response and how many tokens it carries."""
    # A serialized response begins with the tag of one of its first fields, none of which is a letter or a brace.
    return _of_http(reply.raw, text) if reply.raw[:1] in HTTP_BEGINS else _of_triton(reply, text)


def _of_http(raw: bytes, text: bool) -> tuple[Any, int]:
    """Read an event or a whole answer of an OpenAI API that was asked for token ids, too."""
    message = gateway_pb2.GenerateResponse()
    content = raw.removeprefix(EVENT).strip()
    choices = [] if content == DONE else json.loads(content).get("choices", [])
    if not choices:
        return message, 0
    ids = choices[0].get("token_ids") or ()
    if text:
        message.text = choices[0].get("text") or ""
    else:
        message.token_ids.extend(ids)
    return message, len(ids)


def _of_triton(reply: Reply, text: bool) -> tuple[Any, int]:
    message = gateway_pb2.GenerateResponse()
    tokens = 0
    lengths: list[int] = []
    for output, data in zip(reply.message.outputs, reply.message.raw_output_contents, strict=False):
        if output.name == "text_output" and text:
            message.text = b"".join(_strings(data)).decode(errors="replace")
            tokens = tokens or 1
        elif output.name == "output_ids":
            message.token_ids.extend(np.frombuffer(data, "<i4").tolist())
        elif output.name == "sequence_length":
            lengths = np.frombuffer(data, "<i4").tolist()
    if lengths:
        del message.token_ids[lengths[0] :]
        tokens = lengths[0]
    return message, tokens


def _strings(data: bytes) -> list[bytes]:
    """Split a BYTES tensor: each element is its length in four bytes and its content."""
    found, at = [], 0
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        found.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return found
