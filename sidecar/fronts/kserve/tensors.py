"""Read a request's inputs from where they are: typed contents, raw contents, or a region of shared memory."""

from __future__ import annotations

import struct
from collections.abc import Container
from functools import lru_cache
from typing import Any

from sidecar.config.identities import clipped
from sidecar.errors import Reason, Refused
from sidecar.fronts.kserve.structure import Structure

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
"""The field with a tensor's typed elements. The engine reads no other field, so neither do we."""
REGION = "shared_memory_region"
SHARED_BYTES = "shared_memory_byte_size"
PROMPTS = ("input_ids", "text_input")
INTEGERS_MAX = 256
"""Elements that are read: one for each row of a batch."""
NAME_CHARACTERS_MAX = 256
DIMENSIONS_MAX = 32
PARAMETERS_MAX = 32
CORE_LORA_TENSORS = ("lora_task_id", "lora_weights", "lora_config")
LLMAPI_LORA_TENSORS = ("lora_id", "lora_name", "lora_path", "lora_ckpt_source")
LORA_TENSORS = (*CORE_LORA_TENSORS, *LLMAPI_LORA_TENSORS)
WORDS_KEPT = 1024
"""Names that were found good, which are not checked again: clients use few."""


class Tensors:
    """The inputs of one `ModelInferRequest`, each with its content unless that lies in shared memory.

    With `typed` they travel in `contents`, and an added input must too. Raises Refused(INVALID_REQUEST) for inputs
    whose contents or names an engine could read in another way than we do.
    """

    def __init__(self, structure: Structure) -> None:
        self._structure = structure
        self._inputs = structure.inputs
        self._indices: dict[str, int] = {}
        self._raw: dict[str, memoryview] = {}
        self.typed = False
        contents, used = structure.contents, 0
        for index, tensor in enumerate(self._inputs):
            in_region = check_tensor(tensor)
            name = tensor.name
            if name in self._indices:
                raise _wrong(f"the request has the input {clipped(name)} twice; send each once")
            self._indices[name] = index
            check_word("the datatype of a tensor", tensor.datatype)
            if (dimensions := len(tensor.shape)) > DIMENSIONS_MAX:
                raise _wrong(
                    f"the tensor {clipped(name)} has {dimensions} dimensions; at most {DIMENSIONS_MAX} are taken"
                )
            if tensor.HasField("contents"):
                if in_region:
                    raise _wrong(f"the tensor {clipped(name)} has contents and a {REGION}; send it in one of the two")
                self.typed = True
            elif not in_region:
                if used < len(contents):
                    self._raw[name] = contents[used]
                used += 1
        for output in structure.outputs:
            check_tensor(output)
        self.lora = [name for name in self._indices if name in LORA_TENSORS]
        """The names of the LoRA tensors that the client sends."""
        if self.typed and contents:
            raise _wrong("the request has typed contents beside raw_input_contents; send all inputs in one of the two")
        if used != len(contents):
            raise _wrong(
                f"the request has {len(contents)} raw_input_contents and {used} inputs that need one, which those "
                "without typed contents or a shared-memory region do; send one for each, in the order of the inputs"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._indices

    def in_region(self, name: str) -> bool:
        """Return True if a tensor is present and lies in shared memory, where its content cannot be read."""
        return name in self._indices and REGION in self._inputs[self._indices[name]].parameters

    def rank(self, name: str) -> int | None:
        """Return the number of a tensor's dimensions, None if it is absent."""
        return len(self._inputs[self._indices[name]].shape) if name in self._indices else None

    def integers(self, *names: str) -> tuple[int, ...]:
        """Return the elements of the first of these tensors that is present; () if they cannot be read."""
        for name in names:
            if name in self._indices:
                break
        else:
            return ()
        raw = self._raw.get(name)
        datatype = self._inputs[self._indices[name]].datatype
        if datatype == "BYTES":
            return ()
        if raw is None:
            return tuple(int(value) for value in self._typed(name)[:INTEGERS_MAX])
        size, signed = 8 if datatype.endswith("64") else 4, datatype[:1] != "U"
        starts = range(0, min(len(raw) - len(raw) % size, size * INTEGERS_MAX), size)
        return tuple(int.from_bytes(raw[at : at + size], "little", signed=signed) for at in starts)

    def flag(self, name: str) -> bool:
        """Return the first element of a BOOL tensor, False if there is none."""
        raw = self._raw.get(name)
        if raw is not None:
            return bytes(raw[:1]) not in (b"", b"\0")
        return name in self._indices and any(self._typed(name)[:1])

    def input_tokens(self) -> int:
        """Return the prompt's length: token ids by their shape, text in bytes."""
        if "input_ids" in self._indices:
            shape = self._inputs[self._indices["input_ids"]].shape
            size = max(0, int(shape[-1])) if shape else 0
            raw = self._raw.get("input_ids")
            return size if raw is None else min(size, len(raw) // 4)
        raw = self._raw.get("text_input")
        if raw is not None:
            return min(struct.unpack_from("<I", raw)[0], len(raw)) if len(raw) >= 4 else 0
        texts = self._typed("text_input") if "text_input" in self._indices else ()
        return len(texts[0]) if texts else max(0, self._shared_bytes("text_input") - 4)

    def text(self) -> str | None:
        """Return the prompt if it is one text in the message itself."""
        if "text_input" not in self._indices:
            return None
        raw, content = self._raw.get("text_input"), b""
        if raw is None:
            content = b"".join(self._typed("text_input")[:1])
        elif len(raw) >= 4 and raw[:4] == struct.pack("<I", len(raw) - 4):
            content = bytes(raw[4:])
        return content.decode(errors="replace") if content and self.rows() == 1 else None

    def rows(self) -> int:
        """Return the number of prompts: the batch dimension of the prompt tensor."""
        for name in PROMPTS:
            if name in self._indices:
                shape = self._inputs[self._indices[name]].shape
                return max(1, int(shape[0])) if len(shape) > 1 else 1
        return 1

    def _shared_bytes(self, name: str) -> int:
        """Return the size of a tensor in shared memory, 0 if it is not there."""
        if name not in self._indices:
            return 0
        parameters = self._inputs[self._indices[name]].parameters
        return int(parameters[SHARED_BYTES].int64_param) if SHARED_BYTES in parameters else 0

    def without(self, names: Container[str]) -> bytes:
        """Return the request without some inputs and their raw contents."""
        with_content = list(self._raw)
        return self._structure.without(
            [index for name, index in self._indices.items() if name in names],
            [index for index, name in enumerate(with_content) if name in names],
        )

    def _typed(self, name: str) -> Any:
        tensor = self._inputs[self._indices[name]]
        field = CONTENTS.get(tensor.datatype)
        return () if field is None else getattr(tensor.contents, field)


def check_tensor(tensor: Any) -> bool:
    """Check what inputs and outputs have in common; return True if the tensor lies in a region.

    Raises Refused(INVALID_REQUEST) for a name that can be read in two ways: Triton's C interface ends it at a NUL. A
    name that nearly is one of our tensors' was meant to be one.
    """
    name, parameters = tensor.name, tensor.parameters
    _check_name(name)
    if not parameters:
        return False
    if len(parameters) > PARAMETERS_MAX:
        raise _wrong(f"the tensor {clipped(name)} has {len(parameters)} parameters; at most {PARAMETERS_MAX} are taken")
    if REGION in parameters and not parameters[REGION].string_param:
        raise _wrong(f"the tensor {clipped(name)} has a {REGION} that is no name; set its string_param")
    return REGION in parameters


@lru_cache(WORDS_KEPT)
def _check_name(name: str) -> None:
    check_word("the name of a tensor", name)
    if name not in LORA_TENSORS and name.strip().lower().startswith("lora"):
        raise _wrong(f"the tensor {clipped(name)} is none of {', '.join(LORA_TENSORS)}; name adapters with lora_name")


@lru_cache(WORDS_KEPT)
def check_word(what: str, word: str) -> None:
    """Raise Refused(INVALID_REQUEST) for a word that is empty, too long or not printable; engines may change it."""
    if not word or len(word) > NAME_CHARACTERS_MAX or not word.isprintable():
        raise _wrong(f'{what} is "{clipped(word)}"; it must be 1 to {NAME_CHARACTERS_MAX} printable characters')


def _wrong(message: str) -> Refused:
    return Refused(Reason.INVALID_REQUEST, message)
