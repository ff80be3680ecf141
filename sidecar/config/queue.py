"""How requests wait: the bounds of the queue, its policies, classes and tenants."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from sidecar.config.identities import CLASS, TENANT, check_words
from sidecar.config.plugins import is_a
from sidecar.config.section import Section

ANSWER_BYTES_MAX, ANSWERS_BYTES_MAX = 4 << 20, 256 << 20


class RequestClass(Section):
    """A class's longest wait, and its patience: the wait after which other requests are held back for it.

    `max_tokens` bounds the answers to OpenAI requests without a length where an engine would go on to the end of its
    context (trtllm-serve).
    """

    queue_wait_s_max: float = Field(600.0, gt=0)
    patience_s: float = Field(20.0, ge=0)
    max_tokens: int | None = Field(None, ge=1)


class Queue(Section):
    """The queue's bounds and policies. `joining_s_max` is the longest time that an engine which has just come up is
    spared, until it has the adapters planned for it; with 0 it gets its full share at once. `tenant_max_tokens` is as
    a class's `max_tokens`; the smaller one counts. Answers that wait for slow
    clients may take `answer_bytes_max` each and `answers_bytes_max` in all; the rest waits in its seat at the engine.
    """

    ordering: Annotated[str, is_a("ordering")] = "soft_gated"
    routing: Annotated[str, is_a("routing")] = "partitioned"
    output_tokens_assumed: int = Field(1024, ge=1)
    sequence_tokens_assumed: int = Field(131_072, ge=1)
    queued_max: int = Field(50_000, ge=1)
    queued_tokens_max: int = Field(1 << 31, ge=1)
    queued_bytes_max: int = Field(1 << 30, ge=1)
    tenant_queued_max: int = Field(50_000, ge=1)
    tenant_queued_tokens_max: int = Field(1 << 31, ge=1)
    tenant_queued_bytes_max: int = Field(1 << 30, ge=1)
    tenant_weights: dict[str, Annotated[float, Field(gt=0)]] = {}
    tenant_max_tokens: dict[str, Annotated[int, Field(ge=1)]] = {}
    inbox_max: int = Field(10_000, ge=1)
    answer_bytes_max: int = Field(ANSWER_BYTES_MAX, ge=1)
    answers_bytes_max: int = Field(ANSWERS_BYTES_MAX, ge=1)
    joining_s_max: float = Field(30.0, ge=0)
    classes: dict[str, RequestClass] = {"default": RequestClass()}

    @field_validator("tenant_weights", "tenant_max_tokens")
    @classmethod
    def _are_tenants(cls, values: dict[str, float]) -> dict[str, float]:
        check_words(TENANT, values)
        return values

    @field_validator("classes")
    @classmethod
    def _are_classes(cls, classes: dict[str, RequestClass]) -> dict[str, RequestClass]:
        check_words(CLASS, classes)
        return classes

    @field_validator("classes")
    @classmethod
    def _has_default(cls, classes: dict[str, RequestClass]) -> dict[str, RequestClass]:
        return {"default": RequestClass(), **classes}
