"""The fields of requests that the servers have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from sidecar.lab.engine.http.text import Stops
from sidecar.lab.engine.tokens import EOS


class SharedFields(BaseModel):
    """The fields of every server's completions and chats. A server adds its own, and those with defaults of its own."""

    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logit_bias: dict[str, float] | None = None
    min_tokens: int = 0
    response_format: dict[str, Any] | None = None
    seed: int | None = None
    stop: str | list[str] | None = Field(default_factory=list)
    stop_token_ids: list[int] | None = Field(default_factory=list)
    stream: bool | None = False
    temperature: float | None = None
    top_p: float | None = None
    use_beam_search: bool = False

    @property
    def stops(self) -> Stops:
        """What ends an answer."""
        return Stops(
            (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            tuple(self.stop_token_ids or ()),
            None if self.ignore_eos else EOS,
            self.min_tokens,
            self.include_stop_str_in_output,
        )
