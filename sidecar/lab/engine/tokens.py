"""Text to token ids and back, one token per byte, so that the emulated engine needs no vocabulary file."""

from __future__ import annotations

from collections.abc import Iterable

BOS = 256
EOS = 257
PAD = 258
VOCABULARY_SIZE = 259


class ByteTokenizer:
    """The 256 bytes as tokens 0–255, then BOS, EOS and PAD."""

    def encode(self, text: str) -> list[int]:
        """Return BOS and the UTF-8 bytes of the text."""
        return [BOS, *text.encode("utf-8")]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of the byte tokens; special tokens are left out, broken UTF-8 shows as U+FFFD."""
        return bytes(token for token in tokens if 0 <= token < BOS).decode("utf-8", errors="replace")
