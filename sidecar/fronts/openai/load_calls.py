"""vLLM's load calls, `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, with vLLM's statuses and texts.

Trainers post them to one URL after each step. `/load_lora_adapter` is prime-rl's own: it always loads in place. A call
is carried out even if its client leaves: a trainer that has lost its patience tries again, and finds it done.

vLLM's texts for load calls, which trainers' clients read, and the status and type of each.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sidecar.access.access import OURSELVES, Caller
from sidecar.access.principal import Action, Resource, Sort
from sidecar.access.resources import adapter_resource, summary
from sidecar.adapters.copying import config_in
from sidecar.adapters.folder import NoAdapter
from sidecar.adapters.names import shown
from sidecar.adapters.origins.allowing import AllowList
from sidecar.backends.registry import is_base_model
from sidecar.config import Config
from sidecar.config.openai import LOADS
from sidecar.errors import Family, Reason, Refused, SidecarError
from sidecar.fronts.openai.errors import Failure, failure_of_error
from sidecar.fronts.questions import ask
from sidecar.model.reference import BASE_NAMES
from sidecar.shell.gateway import Gateway
from sidecar.shell.loading import AlreadyLoaded, Loaded, Loading, RefusedByEngines
from sidecar.shell.managing import CONFIRM
from sidecar.state.records import Record
from sidecar.telling.endings import Voice

BAD_REQUEST, INVALID_INPUT, NOT_FOUND = "Bad Request", "InvalidUserInput", "NotFoundError"
INTERNAL = "InternalServerError"
STATUSES = {BAD_REQUEST: 400, INVALID_INPUT: 400, NOT_FOUND: 404, INTERNAL: 500}
OF_ENGINES = "Call to add_lora method failed: "
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_MODULES_THAT_MAY_BE_SAVED = ("classifier", "score")


def added(name: str) -> str:
    return f"Success: LoRA adapter '{name}' added successfully."


def removed(name: str) -> str:
    return f"Success: LoRA adapter '{name}' removed successfully."


def failed(kind: str, message: str, param: str | None = None, retry_s: float | None = None) -> Failure:
    """Return an error in vLLM's form. Only the four kinds that vLLM answers such calls with are used."""
    error = {"message": message, "type": kind, "param": param, "code": STATUSES[kind]}
    again = () if retry_s is None else ((b"retry-after", str(max(1, round(retry_s))).encode()),)
    return Failure(STATUSES[kind], json.dumps({"error": error}).encode(), again)


def nothing_given() -> Failure:
    return failed(INVALID_INPUT, "Both 'lora_name' and 'lora_path' must be provided.")


def no_name_given() -> Failure:
    return failed(INVALID_INPUT, "'lora_name' needs to be provided to unload a LoRA adapter.")


def base_conflict(name: str) -> Failure:
    return failed(INVALID_INPUT, f"The lora adapter '{name}' conflicts with a served base model.")


def already_loaded(name: str) -> Failure:
    return failed(
        INVALID_INPUT,
        f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
        "'load_inplace' to True.",
    )


def not_found(name: str, path: str) -> Failure:
    return failed(NOT_FOUND, f"Loading lora {name} failed: No adapter found for {path}")


def unknown(name: str) -> Failure:
    return failed(NOT_FOUND, f"The lora adapter '{name}' cannot be found.")


def not_added(cause: str) -> Failure:
    """Return the error for an adapter that is not taken, by us or by an engine, whose own text stays as it is."""
    if OF_ENGINES in cause:
        return failed(INTERNAL, cause[cause.index(OF_ENGINES) :])
    text = f"Worker failed with error '{cause}', please check the stack trace above for the root cause"
    return failed(INTERNAL, OF_ENGINES + text)


def vllm_causes(config: Mapping[str, Any], rank_max: int | None) -> str:
    """Return vLLM's words for what it refuses in an adapter_config.json; "" if that is nothing."""
    causes = []
    saved = config.get("modules_to_save")
    refused = [each for each in saved if each not in _MODULES_THAT_MAY_BE_SAVED] if isinstance(saved, list) else []
    if refused:
        causes.append(
            'vLLM only supports modules_to_save being either None or ["classifier", "score"] for classification '
            f"models. Unsupported modules_to_save: {refused}"
        )
    if config.get("use_dora"):
        causes.append("vLLM does not yet support DoRA.")
    if config.get("lora_bias"):
        causes.append("vLLM does not support LoRA bias (lora_bias).")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        causes.append(f"vLLM does not support init_lora_weights={init!r}.")
    patterns = config.get("rank_pattern")
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    rank = max((rank for rank in ranks if isinstance(rank, int)), default=0)
    if rank_max is not None and rank > rank_max:
        causes.append(f"LoRA rank {rank} is greater than max_lora_rank {rank_max}.")
    if config.get("bias", "none") != "none":
        causes.append("Adapter bias is not supported.")
    return " ".join(causes)


logger = logging.getLogger(__name__)

LOAD, UNLOAD, LOAD_IN_PLACE = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter"
PATHS = (LOAD, UNLOAD, LOAD_IN_PLACE)
OFF = (
    "here operators add and remove adapters, by registering them or in the folder that is served, and "
    "openai.load_calls: true lets trainers do it by these calls; /v1/models lists those that there are"
)
"""What to do instead, where load calls are not served."""
BODY_BYTES_MAX = 64 << 10
CALLS_MAX = 64
"""Calls that may be under way or wait."""
CLIENT_ID = VERB = "load call"
PATH_CHARACTERS_MAX = 4096
TEXT = b"text/plain; charset=utf-8"
_VALUE_CHARACTERS_MAX = 200


class LoadBody(BaseModel):
    """The fields of a load. vLLM ignores others, and so are they here."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadBody(BaseModel):
    lora_name: str


Fields = TypeVar("Fields", bound=BaseModel)


class _Unreadable(Exception):
    """A body that is not JSON, or has wrong fields."""

    def __init__(self, problems: Sequence[Mapping[str, Any]]) -> None:
        label = "error" if len(problems) == 1 else "errors"
        lines = [f"{len(problems)} validation {label}:", *(f"  {dict(problem)}" for problem in problems)]
        super().__init__("\n".join(lines))
        self.param = str(problems[0]["loc"])


class LoadCalls:
    """Answers load calls over a gateway."""

    def __init__(self, gateway: Gateway, config: Config) -> None:
        self._gateway = gateway
        self._hide_backend = config.hide_backend
        voice = Voice.of_clients(config.hide_backend)
        self._loading = Loading(
            gateway,
            lambda question: ask(gateway, question, CLIENT_ID, OURSELVES, LOADS, voice),
            config.openai.versions_kept,
        )
        self._under_way = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    async def all_over(self) -> None:
        """Return when no call is under way."""
        await self._is_idle.wait()

    async def answer(self, path: str, body: bytes, caller: Caller, request_id: str) -> Failure:
        """Carry out a caller's call and return its response."""
        if self._under_way >= CALLS_MAX:
            return failed(INTERNAL, f"{CALLS_MAX} load calls are under way; try again later", retry_s=1)
        self._under_way += 1
        self._is_idle.clear()
        try:
            if path == UNLOAD:
                unload = _read(UnloadBody, body)
                return await self._changing(unload.lora_name, caller, request_id, lambda caller: self._unload(unload))
            load = _read(LoadBody, body)
            in_place = load.load_inplace or path == LOAD_IN_PLACE
            return await self._changing(
                load.lora_name, caller, request_id, lambda caller: self._load(load, in_place, caller, request_id)
            )
        except _Unreadable as error:
            return failed(BAD_REQUEST, str(error), error.param)
        except SidecarError as error:
            return failure_of_error(error)
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._is_idle.set()

    async def _changing(
        self, name: str, caller: Caller, request_id: str, change: Callable[[Caller], Awaitable[Failure]]
    ) -> Failure:
        """Make a change if the caller may, when it begins and when it is stored, and record it."""
        access, registry = self._gateway.access, self._gateway.catalogue.registry
        before = registry.get(name)
        caller = self._permitted(name, caller, request_id)
        CONFIRM.set(lambda: self._confirm(name, caller, request_id))
        failure = await change(caller)
        why = "" if failure.status < 300 else failure.body.decode(errors="replace")
        was, now = summary(before), summary(registry.get(name))
        await access.changed(caller, VERB, Action.REGISTER, _resource(name, before), was, now, request_id, why)
        return failure

    def _confirm(self, name: str, caller: Caller, request_id: str) -> None:
        self._gateway.access.check(caller)
        self._permitted(name, caller, request_id)

    def _permitted(self, name: str, caller: Caller, request_id: str) -> Caller:
        """Return the caller, in observe mode with a denial recorded. Raises Refused(NOT_ALLOWED) in enforce mode."""
        access, resource = self._gateway.access, _resource(name, self._gateway.catalogue.registry.get(name))
        principal = access.judged(caller)
        decision = None if principal is None else access.decide(principal, Action.REGISTER, resource)
        if decision is None or decision.allowed:
            return caller
        access.denied(caller, Action.REGISTER, resource, decision.by, request_id, VERB)
        if access.mode == "enforce":
            why = f'you may not load or unload "{name[:80]}"; ask your operator with id "{request_id}"'
            raise Refused(Reason.NOT_ALLOWED, why)
        return replace(caller, is_recorded=True)

    async def _load(self, fields: LoadBody, in_place: bool, caller: Caller, request_id: str) -> Failure:
        name, path = fields.lora_name, fields.lora_path
        if not name or not path:
            return nothing_given()
        if name in BASE_NAMES or is_base_model(self._gateway.state, name):
            return base_conflict(name)
        if len(path) > PATH_CHARACTERS_MAX:
            return failed(INVALID_INPUT, f"the path has {len(path)} characters", "lora_path")
        if not path.startswith(("/", "~")):
            why = f"{shown(path, _VALUE_CHARACTERS_MAX)} is not an absolute path; give that of the adapter's folder"
            return failed(INVALID_INPUT, why, "lora_path")
        allow = self._gateway.access.folders_of(caller, self._gateway.sources.allow, path, request_id)
        try:
            loaded = await self._loading.load(name, path, in_place, allow)
        except SidecarError as error:
            logger.info("%s was not loaded from %s: %s", name[:128], path[:200], error.message)
            return await self._failure_of(error, name, path, allow)
        return Failure(200, added(name).encode(), tuple(self._origin(loaded)), TEXT)

    async def _unload(self, fields: UnloadBody) -> Failure:
        name = fields.lora_name
        if not name:
            return no_name_given()
        try:
            await self._loading.unload(name)
        except SidecarError as error:
            return await self._failure_of(error, name, "", self._gateway.sources.allow)
        return Failure(200, removed(name).encode(), media_type=TEXT)

    async def _failure_of(self, error: SidecarError, name: str, path: str, allow: AllowList) -> Failure:
        """Return vLLM's form of an error. What may pass is a 500, which clients of vLLM try again."""
        if isinstance(error, AlreadyLoaded):
            return already_loaded(name)
        if isinstance(error, NoAdapter):
            return not_found(name, path)
        if isinstance(error, RefusedByEngines):
            return not_added(error.message)
        if error.reason in (Reason.NOT_ALLOWED, Reason.UNAUTHENTICATED):
            return failure_of_error(error)
        if error.reason is Reason.UNKNOWN_ADAPTER and not path:
            return unknown(name)
        if error.reason is Reason.ORIGIN_NOT_ALLOWED:
            return failed(INVALID_INPUT, error.message, "lora_path")
        if error.reason in (Reason.INVALID_NAME, Reason.MANAGED_ELSEWHERE):
            return failed(INVALID_INPUT, error.message, "lora_name")
        if error.family is Family.INVALID:
            try:
                config = await asyncio.to_thread(config_in, allow.open(name, path))
            except SidecarError:  # the folder has gone, or is another one
                config = {}
            return not_added(f"{vllm_causes(config, self._rank_max())} {error.message}".strip())
        return failed(INTERNAL, error.message, retry_s=error.retry_after_s or 1.0)

    def _rank_max(self) -> int | None:
        """Return the highest rank that an engine takes; None if one may take any."""
        ranks = [backend.facts.rank_max for backend in self._gateway.state.backends.values()]
        return None if not ranks or None in ranks else max(rank for rank in ranks if rank is not None)

    def _origin(self, loaded: Loaded) -> Iterator[tuple[bytes, bytes]]:
        """Yield headers that say which version it is, and which engines have it and which do not."""
        yield b"x-lora-version", loaded.version.encode()
        for name, backends in (
            (b"x-lora-backends", sorted(loaded.backends)),
            (b"x-lora-without", sorted(loaded.without)),
        ):
            if backends:
                value = str(len(backends)) if self._hide_backend else ", ".join(backends)[:_VALUE_CHARACTERS_MAX]
                yield name, value.encode("latin-1", "replace")


def _resource(name: str, record: Record | None) -> Resource:
    """Return what the policy is asked about. A name that is not published yet is like a new one."""
    return Resource(Sort.ADAPTER, name) if record is None or record.is_unseen else adapter_resource(record)


def _read(kind: type[Fields], body: bytes) -> Fields:
    """Return the fields of a body. Raises _Unreadable."""
    try:
        content = json.loads(body, object_pairs_hook=_members)
    except (ValueError, RecursionError) as error:
        at = getattr(error, "pos", 0)
        why = {"error": getattr(error, "msg", "it is not UTF-8")}
        raise _Unreadable([_problem("json_invalid", f"body.{at}", "JSON decode error", {}) | {"ctx": why}]) from error
    if not isinstance(content, dict):
        text = "Input should be a valid dictionary or object to extract fields from"
        raise _Unreadable([_problem("model_attributes_type", "body", text, content)])
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        found = error.errors(include_url=False)
        raise _Unreadable(
            [
                _problem(each["type"], ".".join(map(str, ("body", *each["loc"]))), each["msg"], each["input"])
                for each in found
            ]
        ) from error


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's members. Raises _Unreadable for one that is given twice: parsers differ in which counts."""
    if len(members := dict(pairs)) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        text = "Value error, it is given twice; say it once"
        raise _Unreadable([_problem("value_error", f"body.{name[:_VALUE_CHARACTERS_MAX]}", text, members[name])])
    return members


def _problem(kind: str, place: str, text: str, value: object) -> dict[str, Any]:
    shown = f"<{type(value).__name__} of {len(value)} items>" if isinstance(value, (list, dict)) else str(value)
    return {"type": kind, "loc": place, "msg": text, "input": shown[:_VALUE_CHARACTERS_MAX]}
