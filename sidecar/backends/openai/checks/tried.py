"""Check a server's answers by the name of a tiny adapter, which is staged, loaded, asked and removed.

vLLM dies if the files of a registered name are gone. So the name is unloaded first, and the files are removed
only when no request of ours can still be on its way to them.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus

from sidecar.backends.checks.finding import BUSY_FIX, LOAD_S, RUN_S, Finding, failed, milliseconds, ok, skipped, warning
from sidecar.backends.checks.staged import FOLDER_FIX, RANK, Staged, ZeroWeights, can_be_made, not_made, staged
from sidecar.backends.http_client import TimedOut, WireError
from sidecar.backends.openai.checks.look import Answered, Look, log_fix, refusal_fix
from sidecar.backends.openai.checks.names import (
    LOAD_NOTHING_S,
    OUTSIDE,
    nowhere,
    outside,
    unload_line,
)
from sidecar.backends.openai.dialect import SIZES_FIX
from sidecar.backends.openai.vllm import NOT_ENABLED
from sidecar.errors import Misused

UNLOAD_S = 10.0
OTHER_MODULES = ("expected target modules", "unexpected modules")


async def adapter(look: Look) -> Finding:
    """Check that the engine loads a tiny PEFT adapter from the shared folder and answers by its name."""
    shared_dir, base_model = look.target.adapters_dir, look.target.base
    if not look.facts.reads_files:
        return await _sent(look)
    if shared_dir is None:
        return skipped("not looked at: no folder is named that both see")
    if look.without_files:
        return skipped(
            f"not loaded: it could take the place of {look.without_files[0]} in the engine's memory, whose files have "
            "gone, and the next request for that would be the engine's end"
        )
    if base_model is None:
        return warning(
            f"no adapter can be made: {look.dialect.sizes_unknown}", f"config.yaml: {SIZES_FIX}   (or --base)"
        )
    if not can_be_made(base_model):
        return not_made()
    rank = min(RANK, look.facts.rank_max or RANK)
    async with staged(shared_dir, base_model, rank) as tiny, _forgotten(look, tiny):
        path = tiny.shared_dir.engine_path(tiny.key)
        finding = await _loaded_and_answered(look, "staged", look.load(look.name, path, LOAD_S))
    if tiny.stays:
        return warning(
            f"{finding.text}; the engine did not say that it has forgotten {look.name}, so its files stay in "
            f"{tiny.shared_dir.ours}",
            unload_line(look, look.name),
            f"rm -r {tiny.shared_dir.ours}   (after that)",
        )
    return finding


async def _sent(look: Look) -> Finding:
    """Check that the engine takes the weights of a tiny adapter and answers by its name."""
    if not can_be_made(look.target.base) or look.facts.modules is None:
        return not_made()
    rank = min(RANK, look.facts.rank_max or RANK)
    with tempfile.NamedTemporaryFile() as file:
        weights = ZeroWeights(file, look.facts.modules, rank)
        sending = look.dialect.send(look.server, look.name, weights, look.found, look.facts, LOAD_S)
        try:
            return await _loaded_and_answered(look, "sent", look.answered(sending, look.dialect.is_loaded))
        finally:
            with suppress(WireError):
                await look.dialect.forget(look.server, look.name, "", UNLOAD_S)


async def _loaded_and_answered(look: Look, how: str, loading: Awaitable[Answered]) -> Finding:
    look.is_asking = True
    try:
        loaded = await loading
    except TimedOut:
        return failed(f"no answer to a load within {LOAD_S:g} s", BUSY_FIX)
    if not loaded.is_ok:
        look.is_asking = False
        return _not_loaded(look, loaded)
    try:
        reply = await look.answer(look.dialect.model_name(look.base, look.name), RUN_S)
    except TimedOut:
        return warning(
            f"loaded in {milliseconds(loaded.took_s)}, and no token within {RUN_S:g} s: its slots are all in use, or "
            "it hangs",
            BUSY_FIX,
        )
    look.is_asking = False
    if not reply.is_ok:
        return failed(f"loaded, and a request by its name is refused: {reply.line}", log_fix(look))
    return ok(f"{how}, loaded in {milliseconds(loaded.took_s)}, one token in {milliseconds(reply.took_s)}, unloaded")


def _not_loaded(look: Look, reply: Answered) -> Finding:
    text = f"the engine does not take it: {reply.line}"
    shared_dir = look.target.adapters_dir
    if reply.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        fix = "config.yaml: api_key_file: a file with the key that does"
        return failed(f"{text}: the configured key does not load adapters", fix)
    if reply.status == HTTPStatus.NOT_FOUND and shared_dir is None:
        return failed(text, f"a {look.title} that has the call, or a proxy that passes it on")
    if shared_dir is None:
        return failed(text, log_fix(look) if reply.status >= HTTPStatus.INTERNAL_SERVER_ERROR else refusal_fix(look))
    if OUTSIDE.search(reply.text):
        return outside(shared_dir, reply)
    if look.dialect.no_files is not None and look.dialect.no_files.search(reply.text):
        seen = "" if str(shared_dir.ours) == shared_dir.engine.rstrip("/") else f" as {shared_dir.engine}"
        return failed(f"the engine does not see what is staged in {shared_dir.ours}{seen}", *FOLDER_FIX)
    if NOT_ENABLED.search(reply.text):
        return failed("the engine was started without LoRA", look.dialect.enable)
    if "max_lora_rank" in reply.text:
        return failed(text, look.dialect.setting("rank_max", "R"))
    if any(words in reply.text for words in OTHER_MODULES):
        return warning(
            "the engine reads what is staged; its model's modules are called otherwise than a Llama's, so no answer "
            f"is proven: {reply.line}",
            "sidecar adapters verify NAME   (with an adapter of yours)",
        )
    if "size mismatch" in reply.text or "shape" in reply.text:
        return failed(
            f"{text}; the engine serves another model than base_model.config says",
            f"config.yaml: base_model: {{config: the folder of the model that {look.title} serves}}",
        )
    return failed(text, log_fix(look))


@asynccontextmanager
async def _forgotten(look: Look, tiny: Staged) -> AsyncIterator[None]:
    """Make the engine forget the name however the block ends; otherwise keep the files."""
    try:
        yield
    finally:
        await _forget(look, tiny)


async def _forget(look: Look, tiny: Staged) -> None:
    try:
        is_forgotten = await look.dialect.forget(
            look.server, look.name, tiny.shared_dir.engine_path(tiny.key), UNLOAD_S
        )
        if look.is_asking:
            # The engine withdraws our unanswered request before it looks at anything that comes later.
            await look.load(look.name, nowhere(look), LOAD_NOTHING_S)
        tiny.stays = not is_forgotten
    except TimedOut:
        tiny.stays = True
    except WireError:
        tiny.stays = await _lives(look)  # a dead engine has forgotten everything


async def _lives(look: Look) -> bool:
    try:
        await look.dialect.recognise(look.server)
        return True
    except (WireError, Misused):
        return False
