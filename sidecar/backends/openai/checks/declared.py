"""Check how a server was started: what its metrics say, what is declared, and what follows if neither does.

Slots are vLLM's `max_loras`, adapters kept in memory its `max_cpu_loras`, seats its `max_num_seqs`: a dialect's
`options` have the names of its server.
"""

from __future__ import annotations

from collections.abc import Iterator

from sidecar.backends.checks.finding import Finding, failed, ok, skipped, warning
from sidecar.backends.checks.staged import FOLDER_FIX, folder_at
from sidecar.backends.openai.checks.look import Look
from sidecar.backends.openai.dialect import Dialect, Measures
from sidecar.core.config import CoreConfig
from sidecar.core.facts import Adapter, EngineFacts

ADAPTERS_FIX = "config.yaml: adapters_dir: PATH   (or {ours: PATH here, engine: PATH in the engine's container})"
KV_FIX = "config.yaml: engine: {kv_tokens: the engine's KV blocks × tokens a block}"
RUST_KV = "; its Rust front end publishes neither this nor the KV size, ever: declare kv_tokens, too"


def _fix(dialect: Dialect, key: str) -> str:
    return f"config.yaml: engine: {{{key}: the engine's {dialect.flag(key)}}}"


def undeclared(dialect: Dialect, facts: EngineFacts, has_folder: bool) -> Iterator[str]:
    """Yield what a registering server's entry does not declare, what follows, and the key to set."""
    unknown = {
        "device_pages": f"{_slots_unknown(dialect)}{'' if facts.kv_tokens else RUST_KV}",
        "host_pages": _memory_unknown(dialect, facts.device_pages),
        "seats": _seats_unknown(dialect),
        "rank_max": _rank_unknown(dialect),
    }
    if not has_folder:
        yield f"no folder is shared with the engine, so it serves its base model only; {_key(ADAPTERS_FIX)}"
    yield from (f"{text}; {_key(_fix(dialect, key))}" for key, text in unknown.items() if getattr(facts, key) is None)


def _key(fix: str) -> str:
    return f"backends[].{fix.removeprefix('config.yaml: ')}"


def _slots_unknown(dialect: Dialect) -> str:
    return (
        f"how many adapters run at once ({dialect.options['device_pages']}) is not declared, and {dialect.model.title} "
        "says it only after its first request: until then it is learned, from one at a time"
    )


def _memory_unknown(dialect: Dialect, slots: int | None) -> str:
    kept, of_slots = dialect.options["host_pages"], dialect.options["device_pages"]
    found = f", {slots}" if slots else ""
    if not dialect.host_is_slots:
        return f"{kept} is not declared, so it keeps all that it is given"
    return f"{kept} is not declared, so it is taken for {of_slots}{found}, as {dialect.model.title} does"


def _seats_unknown(dialect: Dialect) -> str:
    core = CoreConfig()
    sent = core.seats_default + int(core.seats_default * core.seat_slack)
    return (
        f"{dialect.options['seats']} is neither declared nor published: at most {sent} requests are sent at once, "
        "whatever it takes"
    )


def _rank_unknown(dialect: Dialect) -> str:
    return (
        f"the largest rank ({dialect.options['rank_max']}) is neither declared nor published: an adapter of a larger "
        "one fails when it is loaded, instead of being refused when it is registered"
    )


async def folder(look: Look) -> Finding:
    """Check that there is a folder to stage adapters in; without one only the base model is served."""
    shared_dir = look.target.adapters_dir
    if shared_dir is None and look.dialect.carries:
        return skipped("no folder is named that both see, so it serves its base model only", ADAPTERS_FIX)
    if shared_dir is None and not look.facts.reads_files:
        return ok("none is needed: weights are sent over HTTP")
    if shared_dir is None:
        return warning(
            "no folder is named that the sidecar and the engine both see, so that no adapter can be loaded",
            *FOLDER_FIX,
            "or --adapters-dir PATH (or PATH:PATH in the engine's container)   (of this command)",
        )
    return folder_at(shared_dir)


async def metrics(look: Look) -> Finding:
    """Check that steps and KV size are published."""
    found, fix = await look.dialect.measures(look.server), look.dialect.metrics_fix
    if found == Measures():
        return warning(
            f"{look.title} publishes no measures: KV size is not known, and an engine that hangs or restarts is "
            "noticed by its silence alone (progress_timeout_s)",
            fix,
        )
    kv_tokens = look.facts.kv_tokens or found.kv_tokens
    if found.steps is None and not look.dialect.counts_steps:
        return ok(f"{kv_tokens} KV tokens; it counts no steps: one that hangs is found by a request for one token")
    if found.steps is None:
        return warning("steps are not counted, so an engine that hangs is noticed late", fix)
    look.has_statistics = True
    if kv_tokens is None:
        by = " by its Rust front end" if look.is_rust else ""
        return warning(
            f"{found.steps} steps so far; KV size is not published{by}, so it is not bounded what is sent", KV_FIX
        )
    only = "; reading /metrics empties it, so nothing else may" if look.dialect.reading_empties else ""
    return ok(f"{kv_tokens} KV tokens, {found.steps} steps so far{only}")


async def slots(look: Look) -> Finding:
    """Check that the declared slots are right; the metrics have them after the first request."""
    declared, option = look.facts.device_pages, look.dialect.options["device_pages"]
    if declared is None and look.found.slots is not None:
        return ok(f"{look.found.slots} for adapters, by {option}")
    if not look.is_rust:
        return judged_slots(look.dialect, declared, await _slots(look))
    if declared is None:
        return warning(
            f"{option} is not declared, and its Rust front end does not publish it: it is learned, from one adapter at "
            "a time",
            _fix(look.dialect, "device_pages"),
        )
    return ok(f"{declared} declared ({option}); its Rust front end does not say it")


async def _slots(look: Look) -> int | None:
    return look.found.slots or (await look.dialect.measures(look.server)).slots


def judged_slots(dialect: Dialect, declared: int | None, found: int | None) -> Finding:
    """Judge the slots: the declared number against the published one."""
    option, right = dialect.options["device_pages"], f"config.yaml: engine: {{device_pages: {found}}}"
    if declared is None and found is None:
        return warning(_slots_unknown(dialect), _fix(dialect, "device_pages"))
    if declared is None:
        return warning(
            f"{option} is {found}, and not declared: after a restart of the engine it is learned anew, from one "
            "adapter at a time",
            right,
        )
    if found is None:
        return ok(f"{declared} declared ({option}); the engine has not said it yet")
    if declared > found:
        return failed(
            f"{option} is {found} and {declared} are declared: a sidecar that serves uses the smaller number",
            f"{right}, or {dialect.at_engine('device_pages', declared)}",
        )
    if declared < found:
        return warning(
            f"{option} is {found} and {declared} are declared: {found - declared} slots are never used", right
        )
    return ok(f"{found} ({option}), as declared")


async def memory(look: Look) -> Finding:
    """Check how many adapters are kept in memory, and whether that is enough for those to be served."""
    slots = look.facts.device_pages or await _slots(look)
    declared = look.facts.host_pages or look.found.host_pages
    return judged_memory(look.dialect, declared, slots, look.target.served)


def judged_memory(dialect: Dialect, declared: int | None, slots: int | None, served: tuple[Adapter, ...]) -> Finding:
    """Judge the number of adapters in memory, which no metric has."""
    option = dialect.options["host_pages"]
    if declared is not None and slots is not None and declared < slots:
        return failed(
            f"{declared} are declared ({option}) and {dialect.options['device_pages']} is {slots}: "
            f"{dialect.model.title} does not start with fewer",
            _fix(dialect, "host_pages"),
        )
    kept = declared or slots
    text = f"{declared} declared ({option})" if declared else _memory_unknown(dialect, slots)
    if kept is not None and len(served) > kept:
        return warning(
            f"{text}; {len(served)} adapters are served: the others are given to it again when they are asked for",
            dialect.setting("host_pages", len(served)),
        )
    return ok(text if not served else f"{text}; {len(served)} adapters are served")


async def seats(look: Look) -> Finding:
    """Check that it is known how many requests run at once."""
    declared, told, option = look.facts.seats, look.found.seats, look.dialect.options["seats"]
    if declared is None and told is None:
        return warning(_seats_unknown(look.dialect), _fix(look.dialect, "seats"))
    if declared is not None and told is not None and declared > told:
        return failed(f"{declared} declared, and it tells {told}", look.dialect.setting("seats", told))
    return ok(f"{declared} declared ({option})" if declared is not None else f"{told} ({option})")


async def rank(look: Look) -> Finding:
    """Check that the largest rank is known, and that the adapters to be served do not exceed it."""
    return judged_rank(look.dialect, look.facts.rank_max or look.found.rank_max, look.target.served)


def judged_rank(dialect: Dialect, declared: int | None, served: tuple[Adapter, ...]) -> Finding:
    """Judge the largest rank against the adapters to be served."""
    option, ranks = dialect.options["rank_max"], dialect.ranks
    largest = max((adapter.rank_max for adapter in served), default=0)
    if declared is None:
        of_served = f"; the served adapters' is {largest}" if largest else ""
        return warning(f"{_rank_unknown(dialect)}{of_served}", _fix(dialect, "rank_max"))
    if largest > declared:
        over = sum(1 for adapter in served if adapter.rank_max > declared)
        enough = next((each for each in ranks if each >= largest), max(ranks, default=largest))
        return failed(
            f"{declared} declared ({option}), and {over} of the {len(served)} served adapters have more, up to "
            f"{largest}, and are refused",
            dialect.setting("rank_max", enough),
        )
    if ranks and declared not in ranks:
        return warning(
            f"{declared} declared, and {dialect.model.title}'s {option} is one of {', '.join(map(str, ranks))}",
            _fix(dialect, "rank_max"),
        )
    return ok(f"{declared} declared ({option})" + (f"; {len(served)} adapters are served" if served else ""))
