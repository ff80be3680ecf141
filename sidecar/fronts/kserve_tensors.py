"""A request's inputs, looked at where they are: typed contents, raw contents, or a region of shared memory."""

from __future__ import annotations

import struct
from collections.abc import Container
from typing import Any

CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "BYTES": "bytes_contents",
}
"""Where the typed elements of a tensor are. The engine reads no other field, so neither do we."""
SHARED_BYTES = "shared_memory_byte_size"
INTEGERS_MAX = 256
"""Elements that are looked at: one for each row of a batch."""


class Tensors:
    """The inputs of one `ModelInferRequest`.

    `typed` says that some travel in `contents`: an input that is added must then, too. Where there are raw contents
    they count, one for each tensor that is not in shared memory.
    """

    def __init__(self, message: Any) -> None:
        self._message = message
        self._places: dict[str, int] = {}
        self._raw: dict[str, bytes] = {}
        self.typed = False
        place = 0
        contents = message.raw_input_contents
        for index, tensor in enumerate(message.inputs):
            self._places.setdefault(tensor.name, index)
            if tensor.HasField("contents"):
                self.typed = True
            elif "shared_memory_region" not in tensor.parameters:
                if place < len(contents):
                    self._raw.setdefault(tensor.name, contents[place])
                place += 1

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def rank(self, name: str) -> int | None:
        """Return how many dimensions a tensor has, None if it is not here."""
        return len(self._message.inputs[self._places[name]].shape) if name in self._places else None

    def integers(self, *names: str) -> tuple[int, ...]:
        """Return the elements of the first of these tensors that is here; none if they cannot be seen."""
        name = next((name for name in names if name in self._places), None)
        if name is None:
            return ()
        raw = self._raw.get(name)
        if raw is None:
            return tuple(int(value) for value in self._typed(name)[:INTEGERS_MAX])
        datatype = self._message.inputs[self._places[name]].datatype
        size, signed = 8 if datatype.endswith("64") else 4, datatype[:1] != "U"
        starts = range(0, min(len(raw) - len(raw) % size, size * INTEGERS_MAX), size)
        return tuple(int.from_bytes(raw[at : at + size], "little", signed=signed) for at in starts)

    def flag(self, name: str) -> bool:
        """Return the first element of a BOOL tensor, False if there is none."""
        raw = self._raw.get(name)
        if raw is not None:
            return raw[:1] not in (b"", b"\0")
        return name in self._places and any(self._typed(name)[:1])

    def input_tokens(self) -> int:
        """Return the prompt's length: token ids by their shape, text in bytes."""
        if "input_ids" in self._places:
            shape = self._message.inputs[self._places["input_ids"]].shape
            size = max(0, int(shape[-1])) if shape else 0
            raw = self._raw.get("input_ids")
            return size if raw is None else min(size, len(raw) // 4)
        raw = self._raw.get("text_input")
        if raw is not None:
            return min(struct.unpack_from("<I", raw)[0], len(raw)) if len(raw) >= 4 else 0
        texts = self._typed("text_input") if "text_input" in self._places else ()
        return len(texts[0]) if texts else max(0, self._shared_bytes("text_input") - 4)

    def _shared_bytes(self, name: str) -> int:
        """Return the size of a tensor in shared memory, 0 if it is not there: its content cannot be seen."""
        if name not in self._places:
            return 0
        parameters = self._message.inputs[self._places[name]].parameters
        return int(parameters[SHARED_BYTES].int64_param) if SHARED_BYTES in parameters else 0

    def without(self, names: Container[str]) -> bytes:
        """Return the request without some inputs. Raw contents go with the tensors they belong to."""
        place = 0
        message = self._message
        unwanted: list[tuple[int, int | None]] = []
        for index, tensor in enumerate(message.inputs):
            takes_place = "shared_memory_region" not in tensor.parameters and not tensor.HasField("contents")
            if tensor.name in names:
                unwanted.append((index, place if takes_place and place < len(message.raw_input_contents) else None))
            place += takes_place
        for index, raw_place in reversed(unwanted):
            del message.inputs[index]
            if raw_place is not None:
                del message.raw_input_contents[raw_place]
        return bytes(message.SerializeToString())

    def _typed(self, name: str) -> Any:
        tensor = self._message.inputs[self._places[name]]
        field = CONTENTS.get(tensor.datatype)
        return () if field is None else getattr(tensor.contents, field)
