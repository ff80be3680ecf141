"""`/openapi.json`: what the http listener serves under its configuration, for tools that read OpenAPI.

Shapes of headers, bounds of bodies, methods of paths and the fields of load calls are those by which requests are
checked. Of bodies only the members are described that every kind of engine reads; others pass.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.metadata import version
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from sidecar.backends.openai.paths import (
    CHAT,
    CLASSIFY,
    COMPLETIONS,
    EMBEDDINGS,
    MESSAGES,
    POOLING,
    RERANK,
    RESPONSES,
    ROWS,
    SCORE,
    ApiPath,
)
from sidecar.config import Config, identities
from sidecar.config.identities import Shape
from sidecar.fronts.callers import REQUEST_ID_KEY
from sidecar.fronts.generate.forms import INT32_MAX
from sidecar.fronts.openai import load_calls
from sidecar.fronts.openai.body import MEMBERS_MAX, MODEL_CHARACTERS_MAX
from sidecar.fronts.openai.headers import HEADERS

Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=INT32_MAX)]], Field(min_length=1)]
PRINTABLE = r"^([!-~]([ -~]*[!-~])?)?$"
"""A header's value as every client can send it: one line of ASCII without blanks at the ends, or nothing."""
MODEL_NAME = r"^[^/]+(/[^/]+)*$"


class _Object(BaseModel):
    """An object that may have more members than are named here."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"maxProperties": MEMBERS_MAX})


class StreamOptions(_Object):
    include_usage: bool | None = None


class _OfModel(_Object):
    model: Annotated[str, Field(min_length=1, max_length=MODEL_CHARACTERS_MAX)]


class CommonRequest(_OfModel):
    """What completions and chats have in common."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stop: Text | list[Text] | None = None
    user: str | None = None
    kv_transfer_params: None = None


class CompletionRequest(CommonRequest):
    prompt: Text | TokenIds | Texts | Annotated[list[TokenIds], Field(min_length=1)]


class Message(_Object):
    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(CommonRequest):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None


class ResponsesRequest(_OfModel):
    """Of a conversation that the client keeps: `store` is false, said or not."""

    input: Text | Annotated[list[Message], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    store: Literal[False] | None = None
    stream: bool | None = None


class MessagesRequest(_OfModel):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)]
    system: str | None = None
    stream: bool | None = None


class InputRequest(_OfModel):
    """What is embedded, classified or pooled."""

    input: Text | TokenIds | Texts | Annotated[list[TokenIds], Field(min_length=1)]


class ScoreRequest(_OfModel):
    queries: Text | Texts
    documents: Text | Texts


class RerankRequest(_OfModel):
    query: Text
    documents: Texts
    top_n: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None


class Usage(_Object):
    """`prompt_tokens_estimated` and `completion_tokens_estimated` are true where nothing has counted the tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_estimated: bool = False
    completion_tokens_estimated: bool = False


class Choice(_Object):
    index: int
    finish_reason: str | None = None


class Answer(_Object):
    """A completion or a chat; a stream has the events of OpenAI's API, and an error as its last event."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class Told(_Object):
    """An answer in the engine's own form, but for the model's name."""

    model: str


class Model(_Object):
    """An adapter, one of its versions, or a base model, which has no `parent`."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Cause(_Object):
    """`code` is the status; `reason` the word for programs, of errors of the sidecar's own."""

    message: str
    type: str
    param: str | None = None
    code: int | str | None
    reason: str | None = None


class Error(_Object):
    error: Cause


class EngineError(_Object):
    """An error in an engine's own form, passed on."""

    message: str


class Version(BaseModel):
    version: str


REQUESTS: dict[str, type[BaseModel]] = {
    COMPLETIONS: CompletionRequest, CHAT: ChatRequest, RESPONSES: ResponsesRequest, MESSAGES: MessagesRequest,
    EMBEDDINGS: InputRequest, CLASSIFY: InputRequest, POOLING: InputRequest, SCORE: ScoreRequest, RERANK: RerankRequest,
}  # fmt: skip
MODELS = (*dict.fromkeys(REQUESTS.values()), Answer, Told, Model, ModelList, Error, EngineError, Version)


def description_of(config: Config, served: frozenset[str]) -> bytes:
    """Return the document as JSON; `served` are the paths of models that some engine has."""
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "lora-sidecar",
            "version": _version(),
            "description": "The OpenAI API: `model` names an adapter, one of its versions, or the base model. Engines "
            "that take text only refuse token ids, and members that they have no input for.",
        },
        "paths": _paths(config, served),
        "components": {"schemas": _schemas(config.openai.load_calls)},
    }
    if config.identity.mode == "enforce":
        document["components"]["securitySchemes"] = {"credential": {"type": "http", "scheme": "bearer"}}
    return json.dumps(document).encode()


@cache
def _schemas(load_calls_too: bool) -> dict[str, Any]:
    models = [*MODELS, *((load_calls.LoadBody, load_calls.UnloadBody) if load_calls_too else ())]
    _, schemas = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    found: dict[str, Any] = schemas["$defs"]
    return found


_version = cache(lambda: version("lora-sidecar"))


def _paths(config: Config, served: frozenset[str]) -> dict[str, Any]:
    enforced: dict[str, Any] = {"security": [{"credential": []}]} if config.identity.mode == "enforce" else {}
    headers = [_header(name, shape, config) for name, shape in HEADERS.items()]
    tenant = [each for each in headers if each["name"] == "x-lora-tenant"]
    request_id = _header(REQUEST_ID_KEY, identities.REQUEST_ID, config)
    model = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "pattern": MODEL_NAME}}
    versions = {"name": "versions", "in": "query", "schema": {"type": "string", "examples": ["true"]}}
    events = {"text/event-stream": {"schema": {"type": "string"}}}
    named_events: dict[str, Any] = {"text/event-stream": {"schema": {}}}
    text = {"text/plain": {"schema": {"type": "string"}}}

    def streamed_of(row: ApiPath) -> dict[str, Any]:
        if not row.generates:
            return {}
        return named_events if row.grammar.is_named else events

    def get(summary: str, answer: type[BaseModel], *parameters: Any, **more: Any) -> dict[str, Any]:
        return {"get": _operation(summary, _json(answer), list(parameters)) | more}

    def post(summary: str, body: type[BaseModel], answer: dict[str, Any], *parameters: Any) -> dict[str, Any]:
        asked = {"requestBody": {"required": True, "content": _json(body)}}
        return {"post": _operation(summary, answer, [request_id, *parameters]) | asked | enforced}

    health = _operation("200 if requests can be served, else 503", {}, [])
    paths = {
        **{
            path: post(
                row.summary,
                REQUESTS[path],
                _json(Answer if row.as_text else Told) | streamed_of(row),
                *headers,
            )
            for path, row in ROWS.items()
            if path in served
        },
        "/v1/models": get("List the models that may be named", ModelList, versions, *tenant, **enforced),
        "/v1/models/{model}": get("Show a model", Model, model, *tenant, **enforced),
        "/health": {"get": health},
        "/ping": {"get": health, "post": health},
        "/version": get("Show the sidecar's version", Version),
        "/openapi.json": {"get": _operation("This document", {"application/json": {"schema": {"type": "object"}}}, [])},
    }
    if config.openai.load_calls:
        load = post("Load an adapter", load_calls.LoadBody, text)
        paths |= {load_calls.LOAD: load, load_calls.LOAD_IN_PLACE: load}
        paths[load_calls.UNLOAD] = post("Unload an adapter", load_calls.UnloadBody, text)
    return paths


def _operation(summary: str, content: dict[str, Any], parameters: list[Any]) -> dict[str, Any]:
    answered = {"description": "Answered"} | ({"content": content} if content else {})
    schemas = [content_of["application/json"]["schema"] for content_of in (_json(Error), _json(EngineError))]
    refused = {"description": "Why not", "content": {"application/json": {"schema": {"anyOf": schemas}}}}
    return {"summary": summary, "parameters": parameters, "responses": {"200": answered, "default": refused}}


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}


def _header(name: str, shape: Shape, config: Config) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string", "maxLength": shape.characters_max, "pattern": PRINTABLE}
    if shape is identities.DEADLINE:
        schema = {"type": "integer", "minimum": 1, "exclusiveMaximum": 10**12}
    elif shape is identities.CLASS and config.identity.mode != "enforce":  # it is read without a credential
        schema = {"type": "string", "enum": sorted({"default", *config.queue.classes})}
    return {"name": name, "in": "header", "schema": schema}
