"""Start and stop an emulated vLLM.

The routes of an emulated vLLM.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from sidecar.lab.engine.http.server import (
    Endpoint,
    EngineServer,
    application,
    as_response,
    engine_of,
    http_server,
    started,
)
from sidecar.lab.engine.kserve.faults import Faults
from sidecar.lab.engine.kserve.served import ServedLog
from sidecar.lab.engine.openai.adapters import Adapters
from sidecar.lab.engine.openai.apis import Apis
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
from sidecar.lab.engine.openai.options import POOLING, VllmOptions, vllm_spec_of
from sidecar.lab.engine.openai.rust import BODY_BYTES_MAX, RustAdapters
from sidecar.lab.engine.openai.serving import Serving
from sidecar.lab.engine.spec import EngineSpec
from sidecar.lab.engine.tokens import ByteTokenizer


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
        posts, gets = self._paths()
        guarded = ({path: self._guarded(endpoint) for path, endpoint in each.items()} for each in (posts, gets))
        return application(*guarded)

    def _paths(self) -> tuple[dict[str, Endpoint], dict[str, Endpoint]]:
        """Return the endpoints for POST and for GET."""
        serving, apis = self._serving, Apis(self._serving)
        posts: dict[str, Endpoint] = {"/v1/completions": serving.complete, "/v1/chat/completions": serving.chat}
        if self._options.runner == POOLING:
            posts = apis.pooling()
        elif not self._options.rust_frontend:
            posts |= apis.generating()
        posts |= {"/tokenize": self._tokenize, "/detokenize": self._detokenize}
        if self._options.runtime_lora:
            posts |= {"/v1/load_lora_adapter": self._load, "/v1/unload_lora_adapter": self._unload}
        gets: dict[str, Endpoint] = {"/v1/models": self._models, "/health": self._health, "/version": self._version}
        gets |= {"/metrics": self._scrape} | ({"/server_info": self._info} if self._options.dev_mode else {})
        if not self._options.rust_frontend:
            posts["/ping"] = gets["/ping"] = self._health
        return posts, gets

    def _guarded(self, endpoint: Endpoint) -> Endpoint:
        async def guarded(request: Request) -> Response:
            if not self._may_enter(request):
                return as_response({"error": "Unauthorized"}, 401)
            try:
                self._check_size(request)
                return await endpoint(request)
            except ApiError as error:
                if isinstance(error, EngineDead):
                    self._died()
                return self._error(error)

        return guarded

    def _error(self, error: ApiError) -> Response:
        return as_response(error.content, error.status)

    def _check_size(self, request: Request) -> None:
        """Refuse a large body unread; the server then closes the connection under it."""
        if self._options.rust_frontend and int(request.headers.get("content-length", 0)) > BODY_BYTES_MAX:
            raise ApiError("Failed to buffer the request body: length limit exceeded", kind="Bad Request")

    def _may_enter(self, request: Request) -> bool:
        key = self._options.api_key
        if key is None or not self._is_locked(request.url.path):
            return True
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(given.encode(), key.encode())

    def _is_locked(self, path: str) -> bool:
        """Return True if a path wants the key."""
        return path.startswith("/v1")

    async def _health(self, request: Request) -> Response:
        return Response(status_code=503 if self._driver.is_dead else 200)

    async def _version(self, request: Request) -> Response:
        version = self._options.vllm_version
        return as_response(
            {"version": version} | ({"rust_frontend_version": version} if self._options.rust_frontend else {})
        )

    async def _info(self, request: Request) -> Response:
        options = self._options
        sizes = {"max_loras": options.max_loras, "max_cpu_loras": options.cpu_loras}
        config = sizes | {"max_lora_rank": options.max_lora_rank} if options.enable_lora else None
        return as_response({"vllm_config": {"lora_config": config}})

    async def _scrape(self, request: Request) -> Response:
        return Response(self._metrics.scrape(), headers={"content-type": CONTENT_TYPE})

    async def _models(self, request: Request) -> Response:
        names = self._options.names
        card = _rust_card if self._options.rust_frontend else _card
        cards = [card(name, self._root, None, self._longest) for name in names]
        cards += [card(copy.name, copy.path, names[0], None) for copy in self._serving.adapters.copies.values()]
        return as_response({"object": "list", "data": cards})

    async def _load(self, request: Request) -> Response:
        fields = read_fields(LoadFields, await content_of(request))
        return self._done(await self._serving.adapters.load(fields))

    async def _unload(self, request: Request) -> Response:
        fields = read_fields(UnloadFields, await content_of(request))
        return self._done(await self._serving.adapters.unload(fields))

    def _done(self, text: str) -> Response:
        """Return what a successful call is told; the Python server leaves its type out."""
        return Response(text, media_type="text/plain" if self._options.rust_frontend else None)

    async def _tokenize(self, request: Request) -> Response:
        fields = read_fields(TokenizeFields, await content_of(request))
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
        return as_response(found)

    async def _detokenize(self, request: Request) -> Response:
        fields = read_fields(DetokenizeFields, await content_of(request))
        self._serving.adapters.find(fields.model)
        return as_response({"prompt": full_text(fields.tokens)})


async def content_of(request: Request) -> Any:
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


WATCHDOG_S = 5.0
"""How often vLLM checks whether its engine has died without a client being told."""


class VllmServer(EngineServer):
    """A running emulated vLLM; made by `serve_vllm`. It ends by itself when its engine dies."""

    driver = VllmDriver
    _driver: VllmDriver

    def __init__(self, options: VllmOptions, listening: socket.socket) -> None:
        super().__init__(options, listening)
        spec = vllm_spec_of(options)
        self._log = ServedLog(options.served_log)
        self._metrics = Metrics(options.names[0], spec, options.rust_frontend, options.enable_lora)
        engine, compute = engine_of(options, spec, options.mixing_breaks_base)
        self._driver = self.driver(engine, compute, Faults(options), self._log, self._metrics, options.slow_factor)
        self._http = http_server(options, self._routes(options, spec).app())

    def _routes(self, options: VllmOptions, spec: EngineSpec) -> Routes:
        serving = Serving(self._driver, options, _fingerprint(options.vllm_version, spec))
        self.adapters = serving.adapters = _adapters_of(options, spec, serving)
        return Routes(options, serving, self._driver, self._metrics, self._end)

    async def start(self) -> None:
        await super().start()
        self._watching = asyncio.create_task(self._watch())

    def _hang_up(self) -> None:
        """End what is still open, and tell running requests that their engine is dead."""
        self._http.force_exit = True
        self._watching.cancel()

    def _end(self) -> None:
        """Stop the server after a client was told that the engine is dead; the Rust front end lingers."""
        self._http.should_exit = not self.options.rust_frontend

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCHDOG_S)
            if self._driver.is_dead:
                self._leave()


async def serve_vllm(options: VllmOptions) -> VllmServer:
    """Start an emulated vLLM and return when it takes requests. Raises as `started`."""
    return await started(VllmServer, options)


def _adapters_of(options: VllmOptions, spec: EngineSpec, serving: Serving) -> Adapters:
    common = options.names, spec, options.fail_load, serving.put, options.load_ms / 1e3
    adapters: Adapters
    if options.rust_frontend:
        adapters = RustAdapters(*common, serving.remove, [Path(prefix) for prefix in options.allowed_prefix])
    else:
        adapters = Adapters(*common)
        adapters.keeps_in_place = options.is_older
    adapters.is_enabled = options.enable_lora
    if options.multimodal:
        text_only = () if options.is_older else adapters.prefixes
        adapters.prefixes = ("language_model.model.", "model.language_model.", *text_only)
    return adapters


def _fingerprint(version: str, spec: EngineSpec) -> str:
    return f"vllm-{version}-{hashlib.sha256(repr(spec).encode()).hexdigest()[:8]}"
