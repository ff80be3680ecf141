"""Split a `ModelInferRequest` into its structure, which is parsed and rewritten, and its raw contents, which are not.

An engine is sent the client's message with a fragment of ours appended, and protobuf merges the two, so the first must
be open to one reading only. Parsers differ on odd messages: of a map entry with an unknown field C++ reads the value
and Python nothing. So the client's own encoding of the structure is never passed on, only what was read from it. The
contents, which are nearly all of a large message, are neither parsed nor copied.
"""

from __future__ import annotations

from typing import Any

from sidecar.backends.wire import ModelInferRequest, content_head
from sidecar.errors import Reason, Refused
from sidecar.fronts.message_fields import UNCOUNTED_BYTES, check_fields, check_known, decoded, malformed

STRUCTURE_BYTES_MAX = 8 << 20
"""Size of a message without its raw contents: parsing and rewriting it blocks the event loop."""
REPEATED_MAX = 256
"""Inputs, outputs, parameters and contents, each. TensorRT-LLM's models have about 60 inputs."""

FIELDS_BEFORE_ID = 2
"""Fields before the id: the model's name and version."""

_DESCRIPTOR = ModelInferRequest.DESCRIPTOR
_COUNTS_MAX = {
    field.number << 3 | 2: REPEATED_MAX if field.is_repeated else 1 for field in ModelInferRequest.DESCRIPTOR.fields
}
"""How often a field may occur, by tag. Each field has a length, and a tag of one byte."""
_NAMES = {field.number << 3 | 2: field.name for field in ModelInferRequest.DESCRIPTOR.fields}
_ID = _DESCRIPTOR.fields_by_name["id"].number << 3 | 2
_CONTENT = _DESCRIPTOR.fields_by_name["raw_input_contents"].number << 3 | 2
_PARAMETER = _DESCRIPTOR.fields_by_name["parameters"].number << 3 | 2


class Structure:
    """One request: `message` without raw contents, `contents` apart, and `size_bytes` as received.

    `inputs` and `outputs` are the message's own tensors: protobuf makes an object for each whenever it is asked.
    """

    __slots__ = ("_whole", "contents", "inputs", "message", "outputs", "size_bytes")

    def __init__(self, message: Any, contents: list[memoryview], size_bytes: int, whole: bytes | None) -> None:
        self.message = message
        self.inputs: list[Any] = list(message.inputs)
        self.outputs: list[Any] = list(message.outputs)
        self.contents = contents
        self.size_bytes = size_bytes
        self._whole = whole

    def changed(self) -> None:
        """Note that `message` was changed, so that the client's own bytes are not sent on."""
        self._whole = None

    def to_bytes(self) -> bytes:
        """Return the request to send on: the client's own bytes if they are exactly what we would write."""
        return self._written(self.message) if self._whole is None else self._whole

    def without(self, inputs: list[int], contents: list[int]) -> bytes:
        """Return the request without the inputs and contents at these indices."""
        message = ModelInferRequest()
        message.CopyFrom(self.message)
        for index in reversed(inputs):
            del message.inputs[index]
        return self._written(message, frozenset(contents))

    def _written(self, message: Any, left_out: frozenset[int] = frozenset()) -> bytes:
        parts: list[bytes | memoryview] = [message.SerializeToString()]
        for index, content in enumerate(self.contents):
            if index not in left_out:
                parts += (content_head(len(content)), content)
        return b"".join(parts)


def structure_of(raw: bytes) -> Structure:
    """Split and check a client's message. Raises Refused(INVALID_REQUEST) naming its fault."""
    try:
        parts, contents, parameters = _split(raw)
    except IndexError:
        raise _malformed(raw, "a field is cut off") from None
    written = b"".join(parts)
    if len(written) > STRUCTURE_BYTES_MAX:
        raise Refused(
            Reason.INVALID_REQUEST,
            f"the request has {len(written)} bytes beside raw_input_contents, and at most {STRUCTURE_BYTES_MAX} are "
            "taken; send large tensors there instead of in typed contents",
        )
    if len(written) > UNCOUNTED_BYTES:
        check_fields(written, _DESCRIPTOR)
    message = decoded(written, ModelInferRequest)
    ours = check_known(message, written)
    if len(message.parameters) != parameters:
        raise Refused(Reason.INVALID_REQUEST, "the request has a parameter twice; send each once")
    is_ours = len(parts) == 1 and ours == written and raw.startswith(ours)
    return Structure(message, contents, len(raw), raw if is_ours else None)


def id_in(raw: bytes) -> str:
    """Return the id of a message whose structure is refused; "" if it is not among the first fields.

    Every encoder writes it third, and nothing of the message that takes time may be read.
    """
    at = 0
    try:
        for _ in range(FIELDS_BEFORE_ID + 1):
            tag, (size, begin) = raw[at], _size(raw, at + 1)
            at = begin + size
            if tag == _ID:
                return raw[begin:at].decode() if at <= len(raw) else ""
    except (IndexError, UnicodeDecodeError, Refused):
        pass
    return ""


def _split(raw: bytes) -> tuple[list[memoryview], list[memoryview], int]:
    """Return the bytes around the raw contents, the raw contents, and the number of parameters.

    The former come in as few pieces as possible. Raises IndexError if a field is cut off.
    """
    view, at, end, piece = memoryview(raw), 0, len(raw), 0
    parts: list[memoryview] = []
    contents: list[memoryview] = []
    left = dict(_COUNTS_MAX)
    while at < end:
        start, tag, size = at, raw[at], raw[at + 1]
        at += 2
        if tag not in left:
            raise _malformed(raw, f"at byte {start} is a field that is not in the definition, or written oddly")
        if size > 0x7F:
            size, at = _size(raw, at - 1)
        if not left[tag]:
            raise _too_many(tag)
        left[tag] -= 1
        stop = at + size
        if stop > end:
            raise IndexError
        if tag == _CONTENT:
            if start > piece:
                parts.append(view[piece:start])
            contents.append(view[at:stop])
            piece = stop
        at = stop
    if end > piece:
        parts.append(view[piece:end])
    return parts, contents, REPEATED_MAX - left[_PARAMETER]


def _size(raw: bytes, at: int) -> tuple[int, int]:
    """Return a length of several bytes and the index after it. One that is longer than necessary is refused."""
    size = shift = 0
    while True:
        byte = raw[at]
        at += 1
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    if not byte or shift > 35:
        raise _malformed(raw, f"before byte {at} is a length that is written longer than it need be")
    return size, at


def _too_many(tag: int) -> Refused:
    name = _NAMES[tag]
    if _COUNTS_MAX[tag] == 1:
        return Refused(Reason.INVALID_REQUEST, f"the request has {name} twice; send it once")
    return Refused(Reason.INVALID_REQUEST, f"the request has more than {REPEATED_MAX} {name}; no engine takes so many")


def _malformed(raw: bytes, what: str) -> Refused:
    return malformed(_DESCRIPTOR, f"malformed protobuf ({len(raw)} bytes): {what}")
