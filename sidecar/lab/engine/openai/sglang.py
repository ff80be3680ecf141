"""An emulated SGLang: what it does otherwise than vLLM (texts of 0.5.23).

A load is into the host's memory, under one lock that an unload shares; both wait for the requests of what they take
away. A request names an adapter as `BASE:NAME`, and any other unknown name is the base model. A request for an unloaded
name loads it again from its path. An adapter that does not fit ends the server at its first request.

Simpler than the real one: the base model always takes one of the slots, and who waits for a slot waits in vLLM's order.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from sidecar.lab.engine.http.driver import EngineDied
from sidecar.lab.engine.http.json_text import event
from sidecar.lab.engine.http.server import Endpoint, as_response, started
from sidecar.lab.engine.http.work import TextWork, Token
from sidecar.lab.engine.kserve.options import SGLANG
from sidecar.lab.engine.kserve.work import Progress
from sidecar.lab.engine.openai.adapters import Adapters, Copy
from sidecar.lab.engine.openai.bodies import Bodies, ChatBodies, CompletionBodies, Head, Json, Piece, usage_of
from sidecar.lab.engine.openai.errors import ApiError
from sidecar.lab.engine.openai.fields import (
    ChatFields,
    CompletionFields,
    LoadFields,
    Sampling,
    UnloadFields,
    read_fields,
)
from sidecar.lab.engine.openai.folder import (
    CONFIG,
    WEIGHTS,
    Adapter,
    BadAdapter,
    Lora,
    Tensor,
    digest_of,
    pairs_of,
    tensors_in,
)
from sidecar.lab.engine.openai.loop import VllmDriver
from sidecar.lab.engine.openai.options import VllmOptions
from sidecar.lab.engine.openai.pickled import BadPickle, read_pickle
from sidecar.lab.engine.openai.request import EngineRequest, TooLong
from sidecar.lab.engine.openai.server import Routes, VllmServer, content_of
from sidecar.lab.engine.openai.serving import Serving
from sidecar.lab.engine.packed import Factors, PackedAdapter
from sidecar.lab.engine.pages import Row
from sidecar.lab.engine.rounding import rounded
from sidecar.lab.engine.shape import HF_MODULES, module_dims
from sidecar.lab.engine.spec import EngineSpec

VERSION = "0.5.23"
HEALTH_S = 1.0
"""What `/health`, which generates a token, takes at least."""
TENSORS = "__tensor__"
"""The path of an adapter that came as tensors."""
UNLIMITED = 1 << 20
_VLLMS = ("vllm_version", "rust_frontend", "runner", "allowed_prefix", "dev_mode", "runtime_lora", "multimodal")
_STACKED = ({"q_proj", "k_proj", "v_proj"}, ("q_proj", "v_proj")), ({"gate_proj", "up_proj"}, ())
"""Projections that are stacked, and those of them that a load wants."""
NO_POOL = (
    "is incompatible with the current LoRA memory pool configuration. Please ensure that the LoRA adapter's rank is "
    "within the configured `--max-lora-rank` and that the target modules are included in `--lora-target-modules`."
)


@dataclass(frozen=True, kw_only=True)
class SglangOptions(VllmOptions):
    """All options of one emulated SGLang: those of `VllmOptions` but the ones about vLLM's own.

    * `max_loras` is --max-loras-per-batch, of which the base model takes one, `max_cpu_loras` --max-loaded-loras, and
      `seats` --max-running-requests.
    """

    protocol: str = SGLANG
    max_lora_rank: int = 64
    max_loras: int = 8
    tokenizer_workers: int = 1
    tp_size: int = 1
    dp_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for each in fields(VllmOptions):
            if each.name in _VLLMS and getattr(self, each.name) != each.default:
                raise ValueError(f"--{each.name.replace('_', '-')} is vLLM's; SGLang has none of it")
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ValueError(
                f"max_cpu_loras {self.max_cpu_loras}: SGLang does not start with fewer than max_loras, {self.max_loras}"
            )
        if self.max_loras < 2:
            raise ValueError(f"max_loras {self.max_loras}: give 2 or more, for the base model takes a slot")

    @property
    def cpu_loras(self) -> int:
        return UNLIMITED  # the engine itself drops none


class SglangCompletionFields(CompletionFields):
    """`POST /v1/completions`."""

    greedy_n: ClassVar = True
    rid: str | None = None
    lora_path: str | None = None


class SglangChatFields(ChatFields):
    """`POST /v1/chat/completions`."""

    greedy_n: ClassVar = True
    rid: str | None = None
    lora_path: str | None = None


class TensorFields(BaseModel):
    """`POST /load_lora_adapter_from_tensors`; a pickle for each tensor-parallel rank, in base64."""

    lora_name: str
    config_dict: dict[str, Any]
    serialized_named_tensors: list[str]


class AbortFields(BaseModel):
    """`POST /abort_request`."""

    rid: str = ""


class UnknownName(ApiError):
    """An unload of a name that is not loaded."""


class _SglangBodies(Bodies):
    """What completions and chats share."""

    nulls: ClassVar[dict[str, None]] = {}
    """Members of a chunk that say nothing."""

    def usage(self, works: Sequence[TextWork]) -> bytes:
        usage = _usage(works, 0).items()
        told = {name: count for name, count in usage if not (self.nulls and count is None)}
        return event(self._chunk([]) | {"usage": told})

    def chunk(self, piece: Piece, is_first: bool) -> bytes:
        chunk = self._chunk([self.choice(piece, is_first)]) | self.nulls
        if self.head.shows_usage_always:
            chunk["usage"] = _usage([piece.work], piece.work.sent)
        return event(chunk)

    def _whole(self, choices: list[Json], works: Sequence[TextWork], extra: Json) -> bytes:
        body = self._chunk(choices) | {"object": self.kind, "usage": _usage(works, 0)}
        versions = [{"version": "default", "start": 0, "end": len(works[0].tokens)}]
        body["metadata"] = {"weight_version": "default", "weight_versions": versions}
        return json.dumps(body, separators=(",", ":")).encode()

    def _end(self, piece: Piece) -> Json:
        return {"logprobs": None, "finish_reason": piece.finish_reason, "matched_stop": piece.stop_reason}


class SglangCompletionBodies(_SglangBodies, CompletionBodies):
    """The bodies of `/v1/completions`."""

    nulls: ClassVar = {"usage": None}

    def choice(self, piece: Piece, is_first: bool) -> Json:
        ids: Json = {"token_ids": piece.tokens} if self.head.shows_ids else {}
        if ids and is_first:
            ids["prompt_token_ids"] = piece.work.generation.tokens
        return {"index": piece.work.place, "text": piece.text} | self._end(piece) | ids

    def whole(self, works: Sequence[TextWork], pieces: Sequence[Piece]) -> bytes:
        return self._whole([self.choice(piece, True) for piece in pieces], works, {})


class SglangChatBodies(_SglangBodies, ChatBodies):
    """The bodies of `/v1/chat/completions`: an event for the role, and one for each end."""

    def opening(self, works: Sequence[TextWork]) -> list[bytes]:
        delta = {"reasoning_content": None, "role": self.head.role, "content": ""}
        return [event(self._chunk([self._choice(work.place, delta)])) for work in works]

    def chunk(self, piece: Piece, is_first: bool) -> bytes:
        news = super().chunk(piece, is_first)
        if piece.finish_reason is None:
            return news
        return news + event(self._chunk([self._choice(piece.work.place, {"reasoning_content": None}, piece)]))

    def choice(self, piece: Piece, is_first: bool) -> Json:
        return self._choice(piece.work.place, {"reasoning_content": None, "content": piece.text})

    def whole(self, works: Sequence[TextWork], pieces: Sequence[Piece]) -> bytes:
        choices = [
            {
                "index": piece.work.place,
                "message": {"role": self.head.role, "content": piece.text, "reasoning_content": None},
                **self._end(piece),
            }
            for piece in pieces
        ]
        return self._whole(choices, works, {})

    def _choice(self, place: int, delta: Json, piece: Piece | None = None) -> Json:
        end: Json = {"logprobs": None, "finish_reason": None, "matched_stop": None}
        return {"index": place, "delta": delta} | (end if piece is None else self._end(piece))


def _usage(works: Sequence[TextWork], tokens: int) -> Json:
    prompts = {work.batch_row: len(work.generation.tokens) for work in works}
    made = tokens or sum(len(work.tokens) for work in works)
    details = {"prompt_tokens_details": None, "reasoning_tokens": 0, "completion_tokens_details": None}
    return usage_of(sum(prompts.values()), made) | details


@dataclass(eq=False)
class SglangCopy(Copy):
    """An adapter in the host's memory. One that is `deadly` ends the server at its first request."""

    deadly: str = ""


class SglangAdapters(Adapters):
    """The registry of names, least recently asked for first.

    `remove` takes a copy out of the engine. `loaded_max` is --max-loaded-loras.
    """

    def __init__(
        self,
        options: SglangOptions,
        spec: EngineSpec,
        put: Callable[[Copy], Awaitable[None]],
        remove: Callable[[Copy], Awaitable[bool]],
    ) -> None:
        super().__init__(options.names, spec, options.fail_load, put, options.load_ms / 1e3)
        self.copies = OrderedDict()
        self.is_enabled = options.enable_lora
        self._remove = remove
        self._max = options.max_cpu_loras or UNLIMITED
        self._lock = asyncio.Lock()
        self._paths: dict[str, str] = {}
        """Where every name was loaded from, unloaded ones too."""

    async def load(self, fields: LoadFields) -> str:
        """Register an adapter from its folder. Raises ApiError."""
        async with self._lock:
            await self._register(fields.lora_name, fields.lora_path)
        return ""

    async def load_tensors(self, fields: TensorFields) -> None:
        """Register an adapter from pickles. Raises ApiError, BadPickle."""
        async with self._lock:
            tensors = {
                name: tensor_of(values) for name, values in read_pickle(fields.serialized_named_tensors[0]).items()
            }
            await self._register(fields.lora_name, TENSORS, (fields.config_dict, tensors))

    async def unload(self, fields: UnloadFields) -> str:
        """Forget a name, and free its weights once no request has them. Raises ApiError."""
        name = fields.lora_name
        async with self._lock:
            if name not in self.copies:
                loaded = f"Loaded LoRAs: odict_keys({list(self.copies)})"
                raise UnknownName(f"LoRA with name {name} does not exist. {loaded}")
            await self._drop(name)
        return ""

    async def asked(self, name: str | None) -> Copy | None:
        """Return the adapter of a request, loading it again if it was unloaded. Raises ApiError."""
        if name is None:
            return None
        if name not in self._paths:
            listed = f"dict_keys({list(self._paths)})"
            raise ApiError(f"Got LoRA adapter that has never been loaded: {name}\nAll loaded adapters: {listed}.")
        if name not in self.copies:
            async with self._lock:
                if name not in self.copies:
                    try:
                        await self._register(name, self._paths[name])
                    except ApiError as error:
                        raise ApiError(f"Failed to implicitly load LoRA adapter {name}: {error}") from error
        self.copies[name] = self.copies.pop(name)
        return self.copies[name]

    async def _register(
        self, name: str, path: str, sent: tuple[dict[str, Any], dict[str, Tensor]] | None = None
    ) -> None:
        if not self.is_enabled:
            raise ApiError("LoRA is not enabled. Please set `--enable-lora` to enable LoRA.")
        if name in self.copies:
            raise ApiError(f"Failed to load LoRA adapter {name} because it is already loaded")
        if name in self._fail_load:
            raise ApiError("CUDA out of memory.")
        try:
            config, tensors = await asyncio.to_thread(_read, path) if sent is None else sent
            adapter, deadly = adapter_of(name, config, tensors, self._spec)
        except BadAdapter as error:
            raise ApiError(str(error)) from error
        if self._load_s:
            await asyncio.sleep(self._load_s)
        self._numbers += 1
        copy = SglangCopy(self._numbers, name, path, adapter, is_new=True, is_named=True, deadly=deadly)
        while len(self.copies) >= self._max:
            await self._drop(next(iter(self.copies)))
        if not deadly:
            await self._put(copy)
        self.copies[name], self._paths[name] = copy, path

    async def _drop(self, name: str) -> None:
        copy = self.copies.pop(name)
        while copy.users:
            await asyncio.sleep(0.002)
        copy.is_named = False
        await self._remove(copy)
        copy.drop_if_unused()


def tensor_of(values: np.ndarray[Any, Any]) -> Tensor:
    dtype = {"float16": "F16", "uint16": "BF16", "float32": "F32"}[values.dtype.name]
    return Tensor(dtype, values.shape, np.ascontiguousarray(values).tobytes())


def _read(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a folder's configuration and tensors. Raises BadAdapter."""
    folder = Path(path)
    if path == TENSORS or not folder.is_dir():
        raise BadAdapter(
            f"Repo id must be in the form 'repo_name' or 'namespace/repo_name': '{path}'. Use `repo_type` argument if "
            "needed."
        )
    try:
        return json.loads((folder / CONFIG).read_text()), tensors_in((folder / WEIGHTS).read_bytes())
    except (OSError, ValueError) as error:
        raise BadAdapter(str(error)) from error


def adapter_of(name: str, config: dict[str, Any], tensors: dict[str, Tensor], spec: EngineSpec) -> tuple[Adapter, str]:
    """Return an adapter and what ends the server at its first request, "" if nothing does. Raises BadAdapter.

    Patterns of ranks and scales, rsLoRA, and tensors beside A and B are not looked at.
    """
    if config.get("use_dora"):
        raise BadAdapter(f"Failed to load {name} because LoRA serving currently doesn't support DoRA adapters")
    if config.get("peft_type") != "LORA":
        raise BadAdapter("")
    rank, alpha = config["r"], config["lora_alpha"]
    if rank > spec.max_lora_rank:
        raise BadAdapter(f"LoRA adapter {name} with rank {rank} {NO_POOL}")
    lora = Lora(rank, alpha)
    ours = {key: tensor for key, tensor in tensors.items() if ".lora_" in key and ".layers." in key}
    strange = [key for key in ours if key.split(".lora_")[0].rpartition(".")[2] not in HF_MODULES]
    if strange:
        return Adapter((), PackedAdapter({}), 0), f"Cannot find target module name for {strange[0]}"
    for layer in sorted({key.split(".layers.")[1].partition(".")[0] for key in ours}):
        deadly = _unstacked(layer, ours)
        if deadly:
            return Adapter((), PackedAdapter({}), 0), deadly
    factors: dict[tuple[int, str], Factors] = {}
    for key, pair in sorted(pairs_of(ours).items()):
        dims = module_dims(spec.shape)[key[1]]
        if pair["A"].shape != (rank, dims.in_dim) or pair["B"].shape != (dims.out_dim, rank):
            sizes = f"A {pair['A'].shape}, B {pair['B'].shape}"
            return Adapter((), PackedAdapter({}), 0), f"LoRA buffer shape does not match weight shape: {sizes}"
        B = rounded(pair["B"] * np.float32(alpha / rank), spec.dtype)
        factors[key] = Factors(rounded(pair["A"], spec.dtype), np.ascontiguousarray(B.T))
    dims_of = module_dims(spec.shape)
    rows = tuple(Row(dims_of[module].module_id, layer, rank) for layer, module in factors)
    return Adapter(rows, PackedAdapter(factors), digest_of(name, lora, ours)), ""


def _unstacked(layer: str, tensors: dict[str, Tensor]) -> str:
    """Return what ends the server of a layer that lacks a projection for another one. Raises BadAdapter for q and v."""
    paths = {key.split(".lora_")[0]: key for key in tensors if f".layers.{layer}." in key}
    has = {path.rpartition(".")[2]: key for path, key in paths.items()}
    attention = has.keys() & {"q_proj", "k_proj", "v_proj"}
    missing = [name for name in ("q_proj", "v_proj") if name not in has]
    if attention and missing:
        lacks = next(iter(has[name] for name in attention)).replace(next(iter(attention)), missing[0])
        raise BadAdapter(repr(lacks))
    if "up_proj" in has and "gate_proj" not in has:
        return f"Cannot find target module name for {has['up_proj']}"
    return ""


class SglangServing(Serving):
    """Generation: the name after the base's, an id that the client may choose, SGLang's bodies."""

    adapters: SglangAdapters
    completion_fields, chat_fields = SglangCompletionFields, SglangChatFields

    def _bodies(self) -> tuple[type[Bodies], type[Bodies]]:
        return SglangCompletionBodies, SglangChatBodies

    async def find(self, fields: Sampling) -> Copy | None:
        assert isinstance(fields, (SglangCompletionFields, SglangChatFields))
        _, separator, name = (fields.model or "").partition(":")
        return await self.adapters.asked(name if separator and name else fields.lora_path)

    def head(self, prefix: str, request: Request, fields: Sampling) -> Head:
        assert isinstance(fields, (SglangCompletionFields, SglangChatFields))
        head = super().head(prefix, request, fields)
        return replace(head, answer_id=fields.rid or uuid.uuid4().hex, model=fields.model or "")

    async def answer(
        self, request: Request, fields: Sampling, asked: EngineRequest, copy: Copy | None, bodies: Bodies
    ) -> Response:
        wanted = getattr(fields, "max_completion_tokens", None) or getattr(fields, "max_tokens", None)
        for prompt, limit in zip(asked.prompts, asked.max_tokens, strict=True):
            if wanted is not None and wanted > limit:
                longest = self._driver.engine.spec.longest_sequence_tokens
                raise ApiError(
                    f"Requested token count exceeds the model's maximum context length of {longest} tokens. You "
                    f"requested a total of {len(prompt) + wanted} tokens: {len(prompt)} tokens from the input messages "
                    f"and {wanted} tokens for the completion. Please reduce the number of tokens in the input messages "
                    "or the completion to fit within the limit."
                )
        return await super().answer(request, fields, replace(asked, fault=None), copy, bodies)

    def _good(self, progress: Progress) -> Token:
        if progress.error is None and not isinstance(progress, Token):  # it was aborted
            work = progress.work
            return Token(work, final=True, finish_reason="abort")
        return super()._good(progress)


class SglangRoutes(Routes):
    """The endpoints."""

    _options: SglangOptions
    _serving: SglangServing
    _driver: SglangDriver

    def _paths(self) -> tuple[dict[str, Endpoint], dict[str, Endpoint]]:
        posts: dict[str, Endpoint] = {
            "/v1/completions": self._serving.complete,
            "/v1/chat/completions": self._serving.chat,
            "/tokenize": self._tokenize,
            "/load_lora_adapter": self._load,
            "/load_lora_adapter_from_tensors": self._load_tensors,
            "/unload_lora_adapter": self._unload,
            "/abort_request": self._abort,
        }
        gets: dict[str, Endpoint] = {
            "/v1/models": self._models,
            "/health": self._health,
            "/server_info": self._info,
            "/v1/loads": self._loads,
        }
        return posts, gets

    def _is_locked(self, path: str) -> bool:
        return path != "/health"

    def _error(self, error: ApiError) -> Response:
        shown = {"object": "error", **error.content["error"]}
        if isinstance(error, TooLong):
            size = f"({error.count} tokens) is longer than the model's context length ({error.longest} tokens)"
            shown |= {"message": f"The input {size}.", "param": None}
        return as_response(shown, error.status)

    async def _health(self, request: Request) -> Response:
        await asyncio.sleep(HEALTH_S * min(1.0, self._options.time_scale))
        return Response()

    async def _models(self, request: Request) -> Response:
        names = self._options.names
        common = {"object": "model", "created": 0, "owned_by": "sglang"}
        base = {"id": names[0], **common, "root": names[0], "parent": None, "max_model_len": self._longest}
        adapters = [
            {"id": copy.name, **common, "root": copy.path, "parent": names[0], "max_model_len": None}
            for copy in self._serving.adapters.copies.values()
        ]
        return as_response({"object": "list", "data": [base, *adapters]})

    async def _info(self, request: Request) -> Response:
        options = self._options
        return as_response(
            {
                "version": VERSION,
                "served_model_name": options.names[0],
                "dtype": options.dtype,
                "enable_lora": options.enable_lora,
                "max_lora_rank": options.max_lora_rank,
                "lora_target_modules": ["all"],
                "max_loras_per_batch": options.max_loras,
                "max_loaded_loras": options.max_cpu_loras,
                "tokenizer_worker_num": options.tokenizer_workers,
                "tp_size": options.tp_size,
                "dp_size": options.dp_size,
                "internal_states": [{"effective_max_running_requests_per_dp": options.seats}],
            }
        )

    async def _loads(self, request: Request) -> Response:
        counters = self._driver.engine.counters
        load = {
            "num_running_reqs": counters.scheduled,
            "num_waiting_reqs": counters.waiting + counters.active - counters.scheduled,
            "num_used_tokens": counters.kv_used_blocks * self._options.tokens_per_block,
            "max_total_num_tokens": counters.kv_max_blocks * self._options.tokens_per_block,
            "lora": {"slots_used": counters.device_pages_used, "slots_total": self._options.max_loras},
        }
        return as_response({"version": VERSION, "loads": [load]})

    async def _load(self, request: Request) -> Response:
        fields = read_fields(LoadFields, await content_of(request))
        return await self._told(self._serving.adapters.load(fields))

    async def _load_tensors(self, request: Request) -> Response:
        fields = read_fields(TensorFields, await content_of(request))
        try:
            if len(fields.serialized_named_tensors) < self._options.tp_size:
                raise BadPickle("list index out of range")
            return await self._told(self._serving.adapters.load_tensors(fields))
        except BadPickle as error:
            self._driver.end(f"a payload that cannot be read: {error}")
            return Response(status_code=500)

    async def _unload(self, request: Request) -> Response:
        fields = read_fields(UnloadFields, await content_of(request))
        return await self._told(self._serving.adapters.unload(fields))

    async def _told(self, call: Awaitable[Any]) -> Response:
        text, listed = "", True
        try:
            await call
        except ApiError as error:
            text, listed = str(error), not isinstance(error, UnknownName)
        loaded = {copy.name: copy.path for copy in self._serving.adapters.copies.values()} if listed else None
        told = {"rid": None, "http_worker_ipc": None, "success": not text, "error_message": text}
        return as_response(told | {"loaded_adapters": loaded}, 400 if text else 200)

    async def _abort(self, request: Request) -> Response:
        fields = read_fields(AbortFields, await content_of(request))
        self._driver.abort(fields.rid)
        return Response()


class SglangDriver(VllmDriver):
    """The scheduler's loop. `died` is called when it has ended: the process ends with it."""

    died: Callable[[], None]

    def end(self, text: str) -> None:
        """End the engine before its next step."""
        self._post(partial(self._end, text))

    def _end(self, text: str) -> NoReturn:
        raise EngineDied(text)

    def abort(self, rid: str) -> None:
        """End the requests whose ids begin so."""
        self.cancel([number for number, work in self._works.items() if work.triton_id.startswith(rid)])

    async def _bring(self, numbers: Sequence[int], request_ids: Sequence[int]) -> None:
        for request_id in request_ids:
            copy = self._sequence_of(request_id).copy
            if isinstance(copy, SglangCopy) and copy.deadly:
                raise EngineDied(copy.deadly)
        await super()._bring(numbers, request_ids)

    def _break(self, error: str) -> None:
        self.died()  # first: no client is told
        super()._break(error)


class SglangServer(VllmServer):
    """A running emulated SGLang; made by `serve_sglang`."""

    driver = SglangDriver
    _driver: SglangDriver

    def _routes(self, options: VllmOptions, spec: EngineSpec) -> Routes:
        assert isinstance(options, SglangOptions)
        self._driver.died = lambda: self._http.cut()
        serving = SglangServing(self._driver, options, "")
        self.adapters = serving.adapters = SglangAdapters(options, spec, serving.put, serving.remove)
        return SglangRoutes(options, serving, self._driver, self._metrics, self._end)


async def serve_sglang(options: SglangOptions) -> SglangServer:
    """Start an emulated SGLang and return when it takes requests. Raises as `started`."""
    return await started(SglangServer, options)
