"""The routes of an emulated vLLM."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sidecar.lab.engine.http.json_text import as_json
from sidecar.lab.engine.openai.chat import full_text, plain_tokens, prompt_of, token_strings
from sidecar.lab.engine.openai.errors import ApiError, EngineDead
from sidecar.lab.engine.openai.fields import (
    DetokenizeFields,
    LoadFields,
    TokenizeFields,
    UnloadFields,
    missing,
    read_fields,
    read_json,
)
from sidecar.lab.engine.openai.loop import VllmDriver
from sidecar.lab.engine.openai.metrics import CONTENT_TYPE, Metrics
from sidecar.lab.engine.openai.options import VllmOptions
from sidecar.lab.engine.openai.rust import BODY_BYTES_MAX
from sidecar.lab.engine.openai.serving import Serving
from sidecar.lab.engine.tokens import ByteTokenizer

Endpoint = Callable[[Request], Awaitable[Response]]


class Routes:
    """The endpoints. `died` is called after a client was told that the engine is dead."""

    def __init__(
        self,
        options: VllmOptions,
        serving: Serving,
        driver: VllmDriver,
        metrics: Metrics,
        died: Callable[[], None],
    ) -> None:
        self._options = options
        self._serving = serving
        self._driver = driver
        self._metrics = metrics
        self._died = died
        self._root = driver.engine.spec.shape.name
        self._longest = driver.engine.spec.longest_sequence_tokens

    def app(self) -> Starlette:
        """Return the application."""
        serving = self._serving
        posts = {"/v1/completions": serving.complete, "/v1/chat/completions": serving.chat}
        posts |= {"/tokenize": self._tokenize, "/detokenize": self._detokenize}
        if self._options.runtime_lora:
            posts |= {"/v1/load_lora_adapter": self._load, "/v1/unload_lora_adapter": self._unload}
        gets = {"/v1/models": self._models, "/health": self._health, "/version": self._version}
        gets |= {"/metrics": self._scrape} | ({"/server_info": self._info} if self._options.dev_mode else {})
        routes = [Route(path, self._guarded(endpoint), methods=["POST"]) for path, endpoint in posts.items()]
        routes += [Route(path, self._guarded(endpoint), methods=["GET"]) for path, endpoint in gets.items()]
        if not self._options.rust_frontend:
            routes.append(Route("/ping", self._guarded(self._health), methods=["GET", "POST"]))
        return Starlette(routes=routes, exception_handlers={HTTPException: _framework_error})

    def _guarded(self, endpoint: Endpoint) -> Endpoint:
        async def guarded(request: Request) -> Response:
            if not self._may_enter(request):
                return _json({"error": "Unauthorized"}, 401)
            try:
                self._check_size(request)
                return await endpoint(request)
            except ApiError as error:
                if isinstance(error, EngineDead):
                    self._died()
                return _json(error.content, error.status)

        return guarded

    def _check_size(self, request: Request) -> None:
        """Refuse a large body unread; the server then closes the connection under it."""
        if self._options.rust_frontend and int(request.headers.get("content-length", 0)) > BODY_BYTES_MAX:
            raise ApiError("Failed to buffer the request body: length limit exceeded", kind="Bad Request")

    def _may_enter(self, request: Request) -> bool:
        key = self._options.api_key
        if key is None or not request.url.path.startswith("/v1"):
            return True
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(given.encode(), key.encode())

    async def _health(self, request: Request) -> Response:
        return Response(status_code=503 if self._driver.is_dead else 200)

    async def _version(self, request: Request) -> Response:
        version = self._options.vllm_version
        return _json({"version": version} | ({"rust_frontend_version": version} if self._options.rust_frontend else {}))

    async def _info(self, request: Request) -> Response:
        options = self._options
        sizes = {"max_loras": options.max_loras, "max_cpu_loras": options.cpu_loras}
        config = sizes | {"max_lora_rank": options.max_lora_rank} if options.enable_lora else None
        return _json({"vllm_config": {"lora_config": config}})

    async def _scrape(self, request: Request) -> Response:
        return Response(self._metrics.scrape(), headers={"content-type": CONTENT_TYPE})

    async def _models(self, request: Request) -> Response:
        names = self._options.names
        card = _rust_card if self._options.rust_frontend else _card
        cards = [card(name, self._root, None, self._longest) for name in names]
        cards += [card(copy.name, copy.path, names[0], None) for copy in self._serving.adapters.copies.values()]
        return _json({"object": "list", "data": cards})

    async def _load(self, request: Request) -> Response:
        fields = read_fields(LoadFields, await _content(request))
        return self._done(await self._serving.adapters.load(fields))

    async def _unload(self, request: Request) -> Response:
        fields = read_fields(UnloadFields, await _content(request))
        return self._done(await self._serving.adapters.unload(fields))

    def _done(self, text: str) -> Response:
        """Return what a successful call is told; the Python server leaves its type out."""
        return Response(text, media_type="text/plain" if self._options.rust_frontend else None)

    async def _tokenize(self, request: Request) -> Response:
        fields = read_fields(TokenizeFields, await _content(request))
        self._serving.adapters.find(fields.model)
        if fields.prompt is not None:
            with_start = fields.add_special_tokens is not False
            tokens = ByteTokenizer().encode(fields.prompt) if with_start else plain_tokens(fields.prompt)
        elif fields.messages is not None:
            tokens = prompt_of(fields.messages, fields.add_generation_prompt)
        else:
            raise missing("prompt", "messages")
        strings = token_strings(tokens) if fields.return_token_strs else None
        found = {"count": len(tokens), "max_model_len": self._longest, "tokens": tokens, "token_strs": strings}
        return _json(found)

    async def _detokenize(self, request: Request) -> Response:
        fields = read_fields(DetokenizeFields, await _content(request))
        self._serving.adapters.find(fields.model)
        return _json({"prompt": full_text(fields.tokens)})


async def _content(request: Request) -> Any:
    return read_json(request.headers.get("content-type", ""), await request.body())


def _card(name: str, root: str, parent: str | None, longest: int | None) -> dict[str, Any]:
    now = int(time.time())
    permission = {
        "id": f"modelperm-{uuid.uuid4().hex[:16]}",
        "object": "model_permission",
        "created": now,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": now,
        "owned_by": "vllm",
        "root": root,
        "parent": parent,
        "max_model_len": longest,
        "permission": [permission],
    }


def _rust_card(name: str, root: str, parent: str | None, longest: int | None) -> dict[str, Any]:
    card = _card(name, root, parent, longest) | {"owned_by": "vllm-frontend-rs"}
    del card["permission"]
    return card


def _json(content: Any, status: int = 200) -> Response:
    return Response(as_json(content), status, media_type="application/json")


async def _framework_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _json({"detail": error.detail}, error.status_code)
    response.headers.update(error.headers or {})
    return response
