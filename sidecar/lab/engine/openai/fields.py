"""The bodies of requests: their fields and types, and vLLM's refusals of invalid ones.

A field that is not named here is ignored, as vLLM ignores unknown fields.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, Field, ValidationError
from pydantic_core import ErrorDetails

from sidecar.lab.engine.http.fields import SharedFields
from sidecar.lab.engine.openai.errors import ApiError

_SHOWN_ERRORS = 10
_SHOWN_CHARACTERS = 200
# In an error's location pydantic puts the branches of a union beside the names of fields.
_BRANCH = re.compile(r"[\[\]{}()]|^(str|int|float|bool|list|dict|none|nullable)$")

TokenId = Annotated[int, Field(ge=0)]


class StreamOptions(BaseModel):
    """What a stream reports beside the answer."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class Sampling(SharedFields):
    """The fields of both kinds of generation. None means that the client did not choose."""

    greedy_n: ClassVar[bool] = False
    """Whether several answers may be asked for without sampling."""

    model: str | None = None
    frequency_penalty: float | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    prompt_logprobs: int | None = None
    repetition_penalty: float | None = None
    request_id: str | None = None
    return_token_ids: bool | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = Field(default_factory=list)
    stream_options: StreamOptions | None = None
    top_k: int | None = None
    structured_outputs: dict[str, Any] | None = None


class CompletionFields(Sampling):
    """`POST /v1/completions`."""

    prompt: list[TokenId] | list[list[TokenId]] | str | list[str] | None = None
    echo: bool | None = False
    logprobs: int | None = None
    max_tokens: int | None = 16
    n: int = 1
    suffix: str | None = None
    add_special_tokens: bool = True


class Message(BaseModel):
    """One message of a conversation: a text, or parts of which only texts are accepted."""

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatFields(Sampling):
    """`POST /v1/chat/completions`."""

    messages: list[Message]
    logprobs: bool | None = False
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = 1
    echo: bool = False
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    add_generation_prompt: bool = True


class LoadFields(BaseModel):
    """`POST /v1/load_lora_adapter`."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


class UnloadFields(BaseModel):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: str
    lora_int_id: int | None = None


class TokenizeFields(BaseModel):
    """`POST /tokenize` for a text or for a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool | None = False


class DetokenizeFields(BaseModel):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId]


Fields = TypeVar("Fields", bound=BaseModel)


def read_json(content_type: str, body: bytes) -> Any:
    """Return a request's body. Raises ApiError if it is not JSON or not declared as JSON."""
    if content_type.lower().partition(";")[0] != "application/json":
        raise _refused(["Unsupported Media Type: Only 'application/json' is allowed"])
    if not body:
        raise _refused([_shown("missing", ["body"], "Field required", None)], "body")
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        where = f"body.{error.pos}"
        shown = _shown("json_invalid", ["body", error.pos], "JSON decode error", {}, {"error": error.msg})
        raise _refused([shown], where) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ApiError("There was an error parsing the body", kind="Bad Request") from error


def read_fields(kind: type[Fields], content: Any) -> Fields:
    """Return a body's fields. Raises ApiError that lists the invalid ones."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        if not isinstance(content, dict):
            text = "Input should be a valid dictionary or object to extract fields from"
            raise _refused([_shown("model_attributes_type", ["body"], text, content)], "body") from error
        raise _refused([_shown_error(each) for each in errors], _place(["body", *errors[0]["loc"]])) from error


def missing(*names: str) -> ApiError:
    """Return the refusal of a body that has none of these fields."""
    errors = [_shown("missing", ["body", name], "Field required", {}) for name in names]
    return _refused(errors, f"body.{names[0]}")


def _refused(errors: Sequence[str], param: str | None = None) -> ApiError:
    label = "error" if len(errors) == 1 else "errors"
    lines = [f"{len(errors)} validation {label}:", *(f"  {error}" for error in errors[:_SHOWN_ERRORS])]
    if len(errors) > _SHOWN_ERRORS:
        lines.append(f"  ...and {len(errors) - _SHOWN_ERRORS} more {label}")
    return ApiError("\n".join(lines), kind="Bad Request", param=param)


def _shown_error(error: ErrorDetails) -> str:
    return _shown(error["type"], ["body", *error["loc"]], error["msg"], error["input"], error.get("ctx"))


def _shown(
    kind: str, place: Sequence[int | str], text: str, value: object, context: dict[str, Any] | None = None
) -> str:
    shown: dict[str, Any] = {"type": kind, "loc": _place(place), "msg": text, "input": _summary(value)}
    return str(shown if context is None else shown | {"ctx": context})


def _place(parts: Sequence[int | str]) -> str:
    named = [str(part) for part in parts if not _BRANCH.search(str(part))]
    return ".".join(named or map(str, parts))


def _summary(value: object) -> str:
    if isinstance(value, (list, dict)):
        return f"<{type(value).__name__} of {len(value)} items>"
    text = str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}...[truncated]"
