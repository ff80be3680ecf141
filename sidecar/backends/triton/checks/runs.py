"""Check the engine's answers: as the base model, with a tiny adapter by each transport or from files, to an unknown id.

Every question is one token of one dummy prompt, with an id of its own and a time limit.
"""

from __future__ import annotations

import secrets
import struct
from dataclasses import dataclass
from time import monotonic
from typing import Any

import grpc.aio

from sidecar.backends import faults, wire
from sidecar.backends.checks.finding import BUSY_FIX, LOAD_S, RUN_S, Finding, failed, milliseconds, ok, skipped, warning
from sidecar.backends.checks.staged import FOLDER_FIX, can_be_made, folder_at, not_made, staged
from sidecar.backends.triton.checks.engine import DECLARE
from sidecar.backends.triton.checks.look import Look
from sidecar.backends.triton.checks.memory import region
from sidecar.backends.triton.checks.model import CACHES_FIX, TYPE_OF_DTYPE
from sidecar.backends.triton.checks.tiny import TinyAdapter, tiny_adapter
from sidecar.backends.triton.dialects import LlmApi, TensorRtLlm
from sidecar.backends.triton.probe import answer_of, is_late
from sidecar.core.effects import Load
from sidecar.core.enums import Fault
from sidecar.core.facts import Packed, task_id_of

TEXT_MAX = 240
BY_GRPC, BY_SHARED_MEMORY = "gRPC", "shared memory"


@dataclass(frozen=True)
class Answer:
    """How a question ended. `error` is None for a token; `in_time` is False for no answer."""

    error: str | None
    took_s: float
    in_time: bool = True

    @property
    def fault(self) -> Fault:
        return faults.classify(self.error or "") if self.in_time else Fault.NO_ANSWER

    @property
    def line(self) -> str:
        """The engine's error as one line: the last one, where a traceback has its cause."""
        lines = [line.strip() for line in (self.error or "").splitlines() if line.strip()]
        line = lines[-1] if lines else "an error without a text"
        return line if len(line) <= TEXT_MAX else f"{line[:TEXT_MAX]}…"


async def ask(look: Look, request: Any, timeout_s: float) -> Answer:
    """Send a request of ours to the engine and wait for its end."""
    began = monotonic()
    try:
        error = await answer_of(look.stub, request, look.config.model_transaction_policy.decoupled, timeout_s)
    except grpc.aio.AioRpcError as failure:
        text = f"no answer within {timeout_s:g} s" if is_late(failure) else failure.details() or failure.code().name
        return Answer(text, monotonic() - began, in_time=not is_late(failure))
    return Answer(error, monotonic() - began)


async def base(look: Look) -> Finding:
    """Check that the engine answers one token as the base model."""
    dialect = LlmApi(None) if look.is_llm_api else TensorRtLlm()
    answer = await ask(look, dialect.probe(look.target.model, new_id()), RUN_S)
    if answer.error is None:
        return ok(f"one token in {milliseconds(answer.took_s)}")
    if not answer.in_time:
        return failed(
            f"no token within {RUN_S:g} s, though server and model say that they are ready: the engine is overloaded "
            "or hangs",
            "nv_trt_llm_request_metrics and its iteration_counter tell which; restart tritonserver if it stands still",
        )
    if answer.fault is Fault.QUEUE_FULL:
        return warning("its queue is full, so nothing is proven", BUSY_FIX)
    return failed(f"the engine refuses a request of one token: {answer.line}", "read the end of the server's log")


async def adapter(look: Look) -> Finding:
    """Check that the engine takes a tiny adapter's weights by gRPC."""
    tiny = tiny_adapter(look.facts)
    if tiny is None:
        return skipped("no adapter can be made for an engine whose modules and layers are not known", DECLARE)
    answer = await ask(look, with_adapter(look, tiny, BY_GRPC), LOAD_S)
    if answer.error is None:
        look.loaded = tiny
    return _loaded(look, tiny, answer, BY_GRPC)


async def adapter_shared(look: Look) -> Finding:
    """Check that the engine takes the weights from a region of ours."""
    tiny = look.loaded
    if not look.sees_our_memory:
        return skipped("not looked at: the server does not see our shared memory")
    if tiny is None:
        return skipped("not looked at: no adapter was loaded")
    async with region(look, tiny.weights) as name:
        answer = await ask(look, with_adapter(look, tiny, BY_SHARED_MEMORY, name), LOAD_S)
    return _loaded(look, tiny, answer, BY_SHARED_MEMORY)


def with_adapter(look: Look, tiny: TinyAdapter, way: str, in_region: str | None = None) -> Any:
    """Return a request with a tiny adapter's id and weights: in the message, or in a region."""
    request = with_id(look, tiny.task_id(way))
    wire.add_weights(request, tiny.shape, tiny.dtype, tiny.config, in_region, len(tiny.weights))
    if in_region is None:
        request.raw_input_contents.append(tiny.weights)
    return request


def with_id(look: Look, task_id: int) -> Any:
    """Return a request of one token that names an adapter by its id alone."""
    request = wire.load_head(look.target.model, new_id())
    request.inputs.add(name="lora_task_id", datatype="UINT64", shape=[1, 1])
    request.raw_input_contents.append(struct.pack("<Q", task_id))
    return request


def _loaded(look: Look, tiny: TinyAdapter, answer: Answer, way: str) -> Finding:
    rows, _ = tiny.shape
    if answer.error is None:
        size = f"{len(tiny.weights) / 2**10:.0f} KiB of {tiny.dtype}"
        return ok(f"{rows} rows, {size}, loaded and answered in {milliseconds(answer.took_s)} by {way}")
    return refused_load(look, answer)


def refused_load(look: Look, answer: Answer) -> Finding:
    """Return why a load failed, and what would change that."""
    text = f"the engine does not take it: {answer.line}"
    if not answer.in_time:
        return failed(f"no answer to a load within {LOAD_S:g} s", BUSY_FIX)
    if answer.fault is Fault.FULL:
        return warning(
            "its adapter cache is full of adapters that are in use, so nothing is proven",
            BUSY_FIX,
        )
    if answer.fault is Fault.QUEUE_FULL:
        return warning("its queue is full, so nothing is proven", BUSY_FIX)
    if "same data type as base model" in answer.line or "LoRA weights dtype" in answer.line:
        sent = look.facts.dtype
        right = TYPE_OF_DTYPE["bfloat16" if sent == "float16" else "float16"]
        return failed(text, f"the engine is not {sent}: config.pbtxt, input lora_weights: data_type: {right}")
    if any(part in answer.line for part in ("not enabled", "low_rank", "to few values", "layerId")):
        return failed(f"{text}; what is declared of the engine is not what it was built with", DECLARE)
    return failed(text, "read the end of the server's log")


async def resident(look: Look) -> Finding:
    """Check that the adapter stays in the cache, so that its id alone suffices."""
    if look.loaded is None:
        return skipped("not looked at: no adapter was loaded")
    answer = await ask(look, with_id(look, look.loaded.task_id(BY_GRPC)), RUN_S)
    if answer.error is None:
        return ok(f"its id alone was answered in {milliseconds(answer.took_s)}")
    caches = look.facts.caches
    if answer.fault is Fault.MISS and caches > 1:
        return warning(f"its id alone met another of the {caches} caches, which has not got it", CACHES_FIX)
    if answer.fault is Fault.MISS:
        return failed(
            "loaded, and gone with the next request: the cache holds too few adapters for what runs there",
            "config.pbtxt: a larger lora_cache_host_memory_bytes",
        )
    return failed(f"its id alone is refused: {answer.line}", "read the end of the server's log")


async def unknown_id(look: Look) -> Finding:
    """Check that an unknown id is refused with a text that is recognised: heals rest on that."""
    answer = await ask(look, with_id(look, secrets.randbits(63) | 1), RUN_S)
    if answer.error is None:
        return failed(
            "an id that it never got was answered, as the base model, in silence: the engine has no LoRA",
            "build it with trtllm-build --lora_plugin auto --lora_target_modules … --max_lora_rank …",
        )
    if answer.fault is Fault.MISS:
        return ok("an id that it never got is refused in known words, so evictions are healed")
    if answer.fault in (Fault.NO_ANSWER, Fault.QUEUE_FULL, Fault.FULL):
        return warning(f"the engine is too busy, so nothing is proven: {answer.line}", BUSY_FIX)
    return warning(
        "an id that it never got is refused in words that are not known, so that evictions would fail requests instead "
        f"of being healed: {answer.line}",
        "use a TensorRT-LLM of 0.9 or later, and report the text",
    )


def new_id() -> str:
    """Return a unique request id."""
    return f"lora-sidecar-check-{secrets.token_hex(6)}"


async def folder(look: Look) -> Finding:
    """Check that there is a folder to stage adapters in, and that it can be written to."""
    shared_dir = look.target.adapters_dir
    if shared_dir is None:
        return failed("the engine reads adapters from files, and no folder is configured that both see", *FOLDER_FIX)
    return folder_at(shared_dir)


async def adapter_files(look: Look) -> Finding:
    """Check that the engine loads a tiny PEFT adapter from the folder and answers with it."""
    shared_dir, base = look.target.adapters_dir, look.target.base
    assert shared_dir is not None
    if not can_be_made(base):
        return not_made()
    assert base is not None
    async with staged(shared_dir, base) as tiny:
        load = Load(0, look.target.id, "lora-sidecar-check", tiny.digest, Packed(tiny.key, task_id_of(tiny.key), 0, 0))
        answer = await ask(look, LlmApi(tiny.shared_dir).load(look.target.model, load), LOAD_S)
    if answer.error is None:
        return ok(f"staged, loaded by the engine and answered in {milliseconds(answer.took_s)}")
    if "does not exist" in (answer.error or ""):
        return failed(f"the engine does not see what is staged in {shared_dir.ours}: {answer.line}", *FOLDER_FIX)
    return refused_load(look, answer)
