"""Check that adapters can be loaded into a server that serves, and which ones are registered already."""

from __future__ import annotations

import asyncio
import re
from http import HTTPStatus

from sidecar.adapters.staging import AdaptersDir
from sidecar.backends.checks.finding import Finding, Target, failed, ok
from sidecar.backends.checks.staged import can_be_made, is_forgotten
from sidecar.backends.openai.checks.look import CHECK_NAME, Answered, Look, log_fix
from sidecar.backends.openai.dialect import Dialect
from sidecar.backends.openai.vllm import NOT_ENABLED

LOAD_NOTHING_S = 10.0
LISTED = 4
ROUTES_FIX = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve …   (forbids --api-server-count above 1)"
PREFIXES = "VLLM_RUNTIME_LORA_ALLOWED_PATH_PREFIXES"
OUTSIDE = re.compile(rf"{PREFIXES}|outside the configured allowed prefixes")
"""The Rust front end's refusals of a folder, whatever is in it."""
_OF_A_SIDECAR = re.compile(r".+@[0-9a-f]{12}(\.g\d+)?\Z")


async def updating(look: Look) -> Finding:
    """Check that adapters can be loaded while it serves.

    It is asked for an adapter without a name. If no adapter will be loaded later, it is also asked for one in a missing
    folder: only the engine itself answers that, with a long complaint in its log.
    """
    if not look.dialect.refuses_nameless:
        found = look.found if look.entry is None else await look.dialect.identify(look.server, look.entry)
        if found.takes_none:
            return failed(found.takes_none, look.dialect.enable)
        return ok("an adapter shows it, below")
    reply = await look.load("", "", LOAD_NOTHING_S)
    if not reply.has_error and reply.status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
        return failed(f"adapters cannot be loaded while it serves: it has no {look.dialect.load_path}", ROUTES_FIX)
    if NOT_ENABLED.search(reply.text):
        return failed("the engine was started without LoRA", look.dialect.enable)
    if reply.is_ok or reply.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return failed(f"it does not load adapters: {reply.line}", log_fix(look))
    target = look.target
    no_files = look.dialect.no_files
    if no_files is not None and (target.adapters_dir is None or not can_be_made(target.base)):
        reply = await look.load(look.name, nowhere(look), LOAD_NOTHING_S)
        if NOT_ENABLED.search(reply.text):
            return failed("the engine was started without LoRA", look.dialect.enable)
        if target.adapters_dir is not None and OUTSIDE.search(reply.text):
            return outside(target.adapters_dir, reply)
        if not (no_files.search(reply.text) or OUTSIDE.search(reply.text)):
            return failed(f"it does not load adapters: {reply.line}", log_fix(look))
    return ok("adapters are loaded and unloaded while it serves")


def nowhere(look: Look) -> str:
    """Return a path whose load reaches the engine and changes nothing: there is no adapter.

    The Rust front end lets no path through that does not exist.
    """
    shared_dir = look.target.adapters_dir
    return shared_dir.engine if look.is_rust and shared_dir is not None else f"/nowhere/{look.name}"


def outside(shared_dir: AdaptersDir, reply: Answered) -> Finding:
    """Return what is wrong if the Rust front end does not load from the shared folder."""
    return failed(
        f"its Rust front end loads nothing from {shared_dir.engine}: {reply.line}",
        f"{PREFIXES}={shared_dir.engine} vllm serve …   (folders with : between them, each of which has to exist)",
    )


async def registered(look: Look) -> Finding:
    """Check the registered names, none of which is touched, and that the files of each exist."""
    await _forget_checks(look)
    without = await asyncio.to_thread(_without_files, look.target, look.adapters)
    if without:
        # A name is unloaded before its files go. One that is still there was not just being removed.
        look.adapters = (await look.dialect.served(look.server)).adapters or {}
    look.without_files = tuple(name for name in without if name in look.adapters)
    if look.without_files:
        names = ", ".join(look.without_files[:LISTED])
        return failed(
            f"{_count(look.adapters)}; the files of {len(look.without_files)} have gone ({names}): an engine that "
            "looks for them again, for a request that names one, dies of it",
            *(unload_line(look, name) for name in look.without_files[:LISTED]),
            "restart the engine: its Rust front end keeps a name whose adapter has left its memory"
            if look.is_rust
            else "or start the sidecar of this engine, which does that",
        )
    return ok(f"{_count(look.adapters)}, left alone" if look.adapters else "none")


async def _forget_checks(look: Look) -> None:
    """Unload what killed checks have left, before their files go."""
    for name, path in list(look.adapters.items()):
        if name.startswith(CHECK_NAME) and await asyncio.to_thread(_is_forgotten, look.target, path):
            await look.dialect.forget(look.server, name, path, LOAD_NOTHING_S)
            del look.adapters[name]


def _is_forgotten(target: Target, engine_path: str) -> bool:
    ours = None if target.adapters_dir is None else target.adapters_dir.ours_of(engine_path)
    return ours is not None and is_forgotten(ours.parent)


def _count(adapters: dict[str, str]) -> str:
    ours = sum(1 for name in adapters if _OF_A_SIDECAR.match(name) or name.startswith(CHECK_NAME))
    others = len(adapters) - ours
    parts = (f"{ours} of a sidecar" if ours else "", f"{others} that others loaded" if others else "")
    return f"{' and '.join(part for part in parts if part)} registered"


def _without_files(target: Target, adapters: dict[str, str]) -> tuple[str, ...]:
    shared_dir = target.adapters_dir
    if shared_dir is None or not shared_dir.ours.is_dir():
        return ()
    found = {name: shared_dir.ours_of(path) for name, path in adapters.items()}
    return tuple(name for name, path in found.items() if path is not None and not path.is_dir())


def unload_line(look: Look, name: str) -> str:
    """Return the command that makes the engine forget a name, or where to look for one of the server's own."""
    if type(look.dialect).unload is not Dialect.unload:
        return f"unload {name} by {look.title}'s own call"
    key = "" if look.target.api_key_file is None else f' -H "Authorization: Bearer $(cat {look.target.api_key_file})"'
    json = '-H "Content-Type: application/json"' + f""" -d '{{"lora_name": "{name}"}}'"""
    return f"curl {look.server.client.url}{look.dialect.unload_path}{key} {json}"
