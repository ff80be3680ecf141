"""What the OpenAI API of the http listener has beyond OpenAI's own paths."""

from __future__ import annotations

from pydantic import Field

from sidecar.config.section import Section

LOADS = "load-calls"
"""The owner of names that load calls made, and the tenant and class of the requests that bring them to engines."""
LOAD_WAIT_S_MAX = 300.0
"""The longest wait of such a request. It has no patience: what is open on an engine gives way soon."""


class OpenAi(Section):
    """`load_calls` serves vLLM's calls that load and unload adapters, which trainers send after each step. A name that
    they made keeps its last `versions_kept` versions, the current one and the one before it included.
    """

    load_calls: bool = False
    versions_kept: int = Field(4, ge=2, le=10)
