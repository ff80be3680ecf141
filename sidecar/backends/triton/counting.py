"""Count the tokens of answers that come all at once; a streamed answer has a response for each token.

TensorRT-LLM's core model tells a sequence's length. For a text it does if it is asked (from 0.20 on), by outputs that
the client does not get. Both lengths hold the prompt unless the request excludes it. The core model fails after its
work if a request lists outputs without the ids and their lengths, and other outputs tell of no token: these are added.
Of a text that nothing counts, each byte is taken for a token, up to the length that was asked for: no answer counts
less than it has.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

from sidecar.backends.api import Whole
from sidecar.backends.wire import ModelInferRequest, output_tokens

FLAGS = {"return_num_input_tokens": "num_input_tokens", "return_num_output_tokens": "num_output_tokens"}
TEXT, LENGTHS, IDS = "text_output", "sequence_length", "output_ids"


@dataclass(frozen=True)
class Tells:
    """What a model tells of its tokens, by `outputs`: their number if asked, and the prompt unless it `excludes` it."""

    counts: bool = False
    excludes: bool = False
    outputs: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Any, core: Any) -> Tells:
        """Return what a model with this ModelConfig tells; its engine's model has another, or the same."""
        inputs, outputs = {each.name for each in config.input}, {each.name for each in config.output}
        default = core.parameters.get("exclude_input_in_output")
        excludes = default is not None and default.string_value.lower() in ("true", "1")
        counts = TEXT in outputs and inputs >= set(FLAGS) and outputs >= set(FLAGS.values())
        return cls(counts, excludes, tuple(name for name in (IDS, LENGTHS, TEXT) if name in outputs))


class Counter:
    """Counts the tokens of an answer. A `whole` one has a response for each row and sequence."""

    def __init__(
        self, whole: Whole | None = None, tells: Tells = Tells(), ticket: Any = None, is_read: bool = True
    ) -> None:
        """Nothing can be left out of an answer that a proxy carries, unless it `is_read`."""
        self.whole = whole
        self._ticket = ticket
        self._asks = whole is not None and whole.may_ask and tells.counts and is_read
        self._excludes = tells.excludes
        listed = () if ticket is None else ticket.payload.outputs
        added = tuple(name for name in tells.outputs if listed and name not in listed)
        counts = tuple(FLAGS.values()) if self._asks else ()
        self._listed = added + (counts if listed else ())
        self._hidden = added + counts if is_read and ticket is not None and ticket.payload.prompt is None else ()
        self.hides = bool(self._hidden)
        """True if outputs are left out that only the count needs; answers to requests of ours are read here."""
        self.reads_all = whole is not None or self.hides
        """True if no response of a stream may pass unread."""
        self.is_estimated = False

    def fragment(self, raw: bool) -> bytes:
        """Return what to append to the request, so that its answer tells how many tokens it has."""
        fragment, rows = ModelInferRequest(), 1 if self.whole is None else self.whole.rows
        for name in self._listed:
            fragment.outputs.add(name=name)
        for flag in FLAGS if self._asks else ():
            tensor = fragment.inputs.add(name=flag, datatype="BOOL", shape=[rows, 1])
            if raw:
                fragment.raw_input_contents.append(b"\1" * rows)
            else:
                tensor.contents.bool_contents.extend([True] * rows)
        return bytes(fragment.SerializeToString())

    def take(self, response: Any) -> int:
        """Return the number of tokens in a response, and leave out of it what only the count needs."""
        tokens = output_tokens(response) if self.whole is None else self._of_whole(response, self.whole)
        if self.hides:
            for index in reversed([at for at, output in enumerate(response.outputs) if output.name in self._hidden]):
                del response.outputs[index], response.raw_output_contents[index]
        return tokens

    def _of_whole(self, response: Any, whole: Whole) -> int:
        """Return the number of tokens in a response of a whole answer."""
        outputs = [
            each for each in response.outputs if each.name == TEXT or each.datatype == "INT32"
        ]  # else of classes
        shapes: dict[str, tuple[int, ...]] = {output.name: tuple(output.shape) for output in outputs}
        raw = zip(response.outputs, response.raw_output_contents, strict=False)
        contents = {output.name: data for output, data in raw if output.name in shapes}
        told = {name: _sum(contents[name]) for name in (*FLAGS.values(), LENGTHS) if name in contents}
        prompt, facts = told.get("num_input_tokens", whole.prompt_tokens), self._ticket.facts
        if "num_input_tokens" in told and facts.sequences == 1:
            self._ticket.prompt_tokens = prompt
        sequences = shapes[IDS][-2] if IDS in shapes else math.prod(shapes.get(TEXT, ()))
        tokens = told.get("num_output_tokens") or told.get(LENGTHS) or (IDS in shapes and math.prod(shapes[IDS]))
        if tokens or not response.outputs:
            excludes = self._excludes if whole.excludes is None else whole.excludes
            return max(min(1, tokens), tokens - (0 if excludes else prompt * sequences))
        self.is_estimated = True
        bounds = len(contents.get(TEXT, b"")) - 4 * sequences, facts.output_tokens_max // facts.sequences
        return max(1, min((each for each in bounds if each > 0), default=1))


def _sum(data: bytes) -> int:
    return sum(struct.unpack(f"<{len(data) // 4}i", data))
