"""The bodies of requests: their fields and types. What is not named here is refused, inside `lora_request` too.

The fields are those of main; an older server has fewer. Whatever no LoRA gateway sends may have any type here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from sidecar.lab.engine.http.fields import SharedFields

CHECK_PATH = "check_path"
"""The validation context's key: whether an adapter's path is checked here."""


@dataclass(slots=True)
class LoraRequest:
    """An adapter: the number that identifies it for ever, and where it is. The name is for logs."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    lora_ckpt_source: Literal["hf", "nemo"] = "hf"


def _with_path(request: LoraRequest | None, info: ValidationInfo) -> LoraRequest | None:
    is_checked = info.context is None or info.context[CHECK_PATH]
    if request is not None and is_checked and not os.path.exists(request.lora_path):  # noqa: PTH110 - as the server does
        raise ValueError(f"lora_path ({request.lora_path}) does not exist.")
    return request


class Strict(BaseModel):
    """A body that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class StreamOptions(Strict):
    """What a stream reports beside the answer. None for `continuous_usage_stats` leaves it to the era."""

    include_usage: bool | None = True
    continuous_usage_stats: bool | None = None


class Sampling(Strict, SharedFields):
    """The fields of both kinds of generation."""

    model: str
    frequency_penalty: float | None = 0.0
    n: int = 1
    presence_penalty: float | None = 0.0
    stream_options: StreamOptions | None = None
    user: str | None = None
    lora_request: Annotated[LoraRequest | None, AfterValidator(_with_path)] = None
    prompt_ignore_length: int | None = 0
    best_of: int | None = None
    top_k: int = 0
    top_p_min: float = 0.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    thinking_token_budget: int | None = None
    disaggregated_params: dict[str, Any] | None = None
    priority: Annotated[float, Field(ge=0, le=1)] | None = None
    conversation_params: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_stream_options(cls, content: Any) -> Any:
        if content.get("stream_options") and not content.get("stream"):
            raise ValueError("Stream options can only be defined when stream is true.")
        return content


class CompletionFields(Sampling):
    """`POST /v1/completions`."""

    prompt: list[int] | list[list[int]] | str | list[str]
    echo: bool | None = False
    logprobs: int | None = None
    max_tokens: int | None = None
    suffix: str | None = None
    return_context_logits: bool = False
    detokenize: bool = True
    add_special_tokens: bool = True

    @model_validator(mode="before")
    @classmethod
    def _check_suffix(cls, content: Any) -> Any:
        if content.get("suffix"):
            raise ValueError("suffix is not supported")
        return content


class Message(BaseModel):
    """One message of a conversation; fields of any name may accompany it."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None

    @property
    def text(self) -> str:
        """The content; parts of it that are no text are left out."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(str(part["text"]) for part in self.content if part.get("type") == "text")


class ChatFields(Sampling):
    """`POST /v1/chat/completions`."""

    messages: list[Message]
    prompt_token_ids: list[int] | None = None
    prompt_token_ids_b64: str | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = 0
    max_completion_tokens: int | None = Field(
        default=None, validation_alias=AliasChoices("max_tokens", "max_completion_tokens")
    )
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = "none"
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = "low"
    thinking: dict[str, Any] | None = None
    echo: bool = False
    add_generation_prompt: bool = True
    add_special_tokens: bool = False
    documents: list[dict[str, str]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    injected_chat_template_kwargs: list[str] | None = None
    media_io_kwargs: dict[str, dict[str, Any]] | None = None
    cache_salt: str | None = None
    agent_hierarchy: list[Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
