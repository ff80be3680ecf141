"""Check a vLLM's answers: as the base model, and with a tiny adapter that is staged, loaded, asked and removed.

This engine dies if the files of a registered name are gone. So the name is unloaded first, and the files are removed
only when no request of ours can still be on its way to them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sidecar.backends.checks.finding import BUSY_FIX, LOAD_S, RUN_S, Finding, failed, milliseconds, ok, skipped, warning
from sidecar.backends.checks.port import CONNECT_S
from sidecar.backends.checks.staged import FOLDER_FIX, RANK, Staged, can_be_made, folder_at, not_made, staged
from sidecar.backends.http_client import TimedOut, WireError
from sidecar.backends.vllm.api import NOT_ENABLED, tells_of_death
from sidecar.backends.vllm.checks.declared import SIZES_FIX, SIZES_UNKNOWN
from sidecar.backends.vllm.checks.look import Reply, VllmLook
from sidecar.backends.vllm.checks.registered import (
    LOAD_NOTHING_S,
    LOG_FIX,
    LORA_FIX,
    NOT_FOUND,
    OUTSIDE,
    nowhere,
    outside,
    unload_line,
)

UNLOAD_S = 10.0
OTHER_MODULES = ("expected target modules", "unexpected modules")


async def folder(look: VllmLook) -> Finding:
    """Check that there is a folder to stage adapters in; without one only the base model is served."""
    shared_dir = look.target.adapters_dir
    if shared_dir is None:
        return warning(
            "no folder is named that the sidecar and the engine both see, so that no adapter can be loaded",
            *FOLDER_FIX,
            "or --adapters-dir PATH (or PATH:PATH in the engine's container)   (of this command)",
        )
    return folder_at(shared_dir)


async def base(look: VllmLook) -> Finding:
    """Check that the engine answers one token as the base model."""
    try:
        reply = await look.answer(look.base, RUN_S)
    except TimedOut:
        return failed(
            f"no token within {RUN_S:g} s, though the server says that it lives: the engine is overloaded or hangs",
            "vllm:num_requests_waiting and vllm:iteration_tokens_total tell which; restart vLLM if that stands still",
        )
    if reply.is_ok:
        return ok(f"one token in {milliseconds(reply.took_s)}")
    if tells_of_death(reply.text):
        return failed(f"the engine is dead: {reply.line}", "start vLLM again, and read the end of its log")
    return failed(f"the engine refuses a request of one token: {reply.line}", LOG_FIX)


async def adapter(look: VllmLook) -> Finding:
    """Check that the engine loads a tiny PEFT adapter from the shared folder and answers by its name."""
    shared_dir, base_model = look.target.adapters_dir, look.target.base
    if shared_dir is None:
        return skipped("not looked at: no folder is named that both see")
    if look.without_files:
        return skipped(
            f"not loaded: it could take the place of {look.without_files[0]} in the engine's memory, whose files have "
            "gone, and the next request for that would be the engine's end"
        )
    if base_model is None:
        return warning(f"no adapter can be made: {SIZES_UNKNOWN}", f"{SIZES_FIX}   (or --base)")
    if not can_be_made(base_model):
        return not_made()
    rank = min(RANK, look.facts.rank_max or RANK)
    async with staged(shared_dir, base_model, rank) as tiny, _forgotten(look, tiny):
        finding = await _loaded_and_answered(look, tiny)
    if tiny.stays:
        return warning(
            f"{finding.text}; the engine did not say that it has forgotten {look.name}, so its files stay in "
            f"{tiny.shared_dir.ours}",
            unload_line(look, look.name),
            f"rm -r {tiny.shared_dir.ours}   (after that)",
        )
    return finding


async def _loaded_and_answered(look: VllmLook, tiny: Staged) -> Finding:
    body = {"lora_name": look.name, "lora_path": tiny.shared_dir.engine_path(tiny.key)}
    look.is_asking = True
    try:
        loaded = await look.post("/v1/load_lora_adapter", body, LOAD_S)
    except TimedOut:
        return failed(f"no answer to a load within {LOAD_S:g} s", BUSY_FIX)
    if not loaded.is_ok:
        look.is_asking = False
        return _not_loaded(look, loaded)
    try:
        reply = await look.answer(look.name, RUN_S)
    except TimedOut:
        return warning(
            f"loaded in {milliseconds(loaded.took_s)}, and no token within {RUN_S:g} s: its slots are all in use, or "
            "it hangs",
            BUSY_FIX,
        )
    look.is_asking = False
    if not reply.is_ok:
        return failed(f"loaded, and a request by its name is refused: {reply.line}", LOG_FIX)
    return ok(f"staged, loaded in {milliseconds(loaded.took_s)}, one token in {milliseconds(reply.took_s)}, unloaded")


def _not_loaded(look: VllmLook, reply: Reply) -> Finding:
    text = f"the engine does not take it: {reply.line}"
    shared_dir = look.target.adapters_dir
    assert shared_dir is not None
    if OUTSIDE.search(reply.text):
        return outside(shared_dir, reply)
    if NOT_FOUND.search(reply.text):
        seen = "" if str(shared_dir.ours) == shared_dir.engine.rstrip("/") else f" as {shared_dir.engine}"
        return failed(f"the engine does not see what is staged in {shared_dir.ours}{seen}", *FOLDER_FIX)
    if NOT_ENABLED.search(reply.text):
        return failed("the engine was started without LoRA", LORA_FIX)
    if "max_lora_rank" in reply.text:
        return failed(text, "vllm serve --max-lora-rank R, or config.yaml: engine: {rank_max: the engine's}")
    if any(words in reply.text for words in OTHER_MODULES):
        return warning(
            "the engine reads what is staged; its model's modules are called otherwise than a Llama's, so no answer "
            f"is proven: {reply.line}",
            "sidecar adapters verify NAME   (with an adapter of yours)",
        )
    if "size mismatch" in reply.text or "shape" in reply.text:
        return failed(
            f"{text}; the engine serves another model than base_model.config says",
            "config.yaml: base_model: {config: the folder of the model that vLLM serves}",
        )
    return failed(text, LOG_FIX)


@asynccontextmanager
async def _forgotten(look: VllmLook, tiny: Staged) -> AsyncIterator[None]:
    """Make the engine forget the name however the block ends; otherwise keep the files."""
    try:
        yield
    finally:
        await _forget(look, tiny)


async def _forget(look: VllmLook, tiny: Staged) -> None:
    try:
        is_forgotten = await look.api.forget(look.name, tiny.shared_dir.engine_path(tiny.key), UNLOAD_S)
        if look.is_asking:
            # The engine withdraws our unanswered request before it looks at anything that comes later.
            await look.post("/v1/load_lora_adapter", nowhere(look), LOAD_NOTHING_S)
        tiny.stays = not is_forgotten
    except TimedOut:
        tiny.stays = True
    except WireError:
        tiny.stays = await _lives(look)  # a dead engine has forgotten everything


async def _lives(look: VllmLook) -> bool:
    try:
        return (await look.client.get("/version", CONNECT_S)).is_ok
    except WireError:
        return False
