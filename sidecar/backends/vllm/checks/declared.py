"""Check how vLLM was started: what its metrics say, what is declared, and what follows if neither does.

Slots are its `max_loras`, adapters kept in memory its `max_cpu_loras`, seats its `max_num_seqs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sidecar.backends.checks.finding import Finding, failed, ok, warning
from sidecar.backends.vllm.api import Measures
from sidecar.backends.vllm.checks.look import VllmLook
from sidecar.core.config import CoreConfig
from sidecar.core.facts import Adapter, EngineFacts

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes as max_lora_rank."""
ADAPTERS_FIX = "config.yaml: adapters_dir: PATH   (or {ours: PATH here, engine: PATH in the engine's container})"
SLOTS_FIX = "config.yaml: engine: {device_pages: the engine's --max-loras}"
KV_FIX = "config.yaml: engine: {kv_tokens: the engine's KV blocks × tokens a block}"
RUST_KV = "; its Rust front end publishes neither this nor the KV size, ever: declare kv_tokens, too"
MEMORY_FIX = "config.yaml: engine: {host_pages: the engine's --max-cpu-loras}"
SEATS_FIX = "config.yaml: engine: {seats: the engine's --max-num-seqs}"
RANK_FIX = "config.yaml: engine: {rank_max: the engine's --max-lora-rank}"
SLOTS_UNKNOWN = (
    "how many adapters run at once (max_loras) is not declared, and vLLM says it only after its first request: until "
    "then it is learned, from one at a time"
)
RANK_UNKNOWN = (
    "the largest rank (max_lora_rank) is neither declared nor published: an adapter of a larger one fails when it is "
    "loaded, instead of being refused when it is registered"
)
SIZES_UNKNOWN = (
    "the sizes of its base model are not known: vLLM takes an adapter of smaller ones in silence and answers wrongly, "
    "so it is tried with loads that it must refuse, which its log tells of; over several GPUs not all sizes are found"
)
SIZES_FIX = "config.yaml: base_model: {name: …, config: the folder of the model}"


def sizes_unknown(backends: Iterable[str]) -> str:
    """Return the warning that adapters' sizes cannot be checked for these backends."""
    return f"{', '.join(backends)}: {SIZES_UNKNOWN}; {_key(SIZES_FIX)}"


def undeclared(facts: EngineFacts, has_folder: bool) -> Iterator[str]:
    """Yield what a vLLM's entry does not declare, what follows, and the key to set."""
    if not has_folder:
        yield f"no folder is shared with the engine, so it serves its base model only; {_key(ADAPTERS_FIX)}"
    if facts.device_pages is None:
        yield f"{SLOTS_UNKNOWN}{'' if facts.kv_tokens else RUST_KV}; {_key(SLOTS_FIX)}"
    if facts.host_pages is None:
        yield f"{_memory_unknown(facts.device_pages)}; {_key(MEMORY_FIX)}"
    if facts.seats is None:
        yield f"{_seats_unknown()}; {_key(SEATS_FIX)}"
    if facts.rank_max is None:
        yield f"{RANK_UNKNOWN}; {_key(RANK_FIX)}"


def _key(fix: str) -> str:
    return f"backends[].{fix.removeprefix('config.yaml: ')}"


def _memory_unknown(slots: int | None) -> str:
    return f"max_cpu_loras is not declared, so it is taken for max_loras{f', {slots}' if slots else ''}, as vLLM does"


def _seats_unknown() -> str:
    core = CoreConfig()
    sent = core.seats_default + int(core.seats_default * core.seat_slack)
    return (
        f"max_num_seqs is neither declared nor published: at most {sent} requests are sent at once, whatever it takes"
    )


async def metrics(look: VllmLook) -> Finding:
    """Check that steps and KV size are published."""
    found = await look.api.measures()
    if found == Measures():
        return warning(
            "/metrics has none of vLLM's: KV size is not known, and an engine that hangs or restarts is noticed late",
            "vllm serve without --disable-log-stats, and have a proxy pass /metrics on",
        )
    kv_tokens = look.facts.kv_tokens or found.kv_tokens
    text = f"{kv_tokens} KV tokens, {found.steps} steps so far"
    if found.steps is None:
        return warning(
            "steps are not counted (vllm:iteration_tokens_total), so an engine that hangs is noticed late",
            "vllm serve without --disable-log-stats",
        )
    if kv_tokens is None:
        return warning(
            f"{found.steps} steps so far; KV size is not published{_by(look)} (vllm:cache_config_info), so it is not "
            "bounded what is sent",
            KV_FIX,
        )
    return ok(text)


def _by(look: VllmLook) -> str:
    return " by its Rust front end" if look.version.is_rust else ""


async def slots(look: VllmLook) -> Finding:
    """Check that the declared slots are right; the metrics have them after the first request."""
    declared = look.facts.device_pages
    if look.version.is_rust:
        if declared is None:
            return warning(
                "max_loras is not declared, and its Rust front end does not publish it: it is learned, from one "
                "adapter at a time",
                SLOTS_FIX,
            )
        return ok(f"{declared} declared (max_loras); its Rust front end does not say it")
    return judged_slots(declared, (await look.api.measures()).slots)


def judged_slots(declared: int | None, found: int | None) -> Finding:
    """Judge max_loras: the declared number against the published one."""
    if declared is None and found is None:
        return warning(SLOTS_UNKNOWN, SLOTS_FIX)
    if declared is None:
        return warning(
            f"max_loras is {found}, and not declared: after a restart of the engine it is learned anew, from one "
            "adapter at a time",
            f"config.yaml: engine: {{device_pages: {found}}}",
        )
    if found is None:
        return ok(f"{declared} declared (max_loras); the engine has not said it yet")
    if declared > found:
        return failed(
            f"max_loras is {found} and {declared} are declared: a sidecar that serves uses the smaller number",
            f"config.yaml: engine: {{device_pages: {found}}}, or vllm serve --max-loras {declared}",
        )
    if declared < found:
        return warning(
            f"max_loras is {found} and {declared} are declared: {found - declared} slots are never used",
            f"config.yaml: engine: {{device_pages: {found}}}",
        )
    return ok(f"{found} (max_loras), as declared")


async def memory(look: VllmLook) -> Finding:
    """Check how many adapters are kept in memory, and whether that is enough for those to be served."""
    found = look.facts.device_pages or (await look.api.measures()).slots
    return judged_memory(look.facts.host_pages, found, look.target.served)


def judged_memory(declared: int | None, slots: int | None, served: tuple[Adapter, ...]) -> Finding:
    """Judge max_cpu_loras, which no metric has."""
    if declared is not None and slots is not None and declared < slots:
        return failed(
            f"{declared} are declared (max_cpu_loras) and max_loras is {slots}: vLLM does not start with fewer",
            MEMORY_FIX,
        )
    kept = declared or slots
    text = f"{declared} declared (max_cpu_loras)" if declared else _memory_unknown(slots)
    if kept is not None and len(served) > kept:
        return warning(
            f"{text}; {len(served)} adapters are served: the others are read from the folder when they are asked for",
            f"vllm serve --max-cpu-loras {len(served)}, and config.yaml: engine: {{host_pages: {len(served)}}}",
        )
    return ok(text if not served else f"{text}; {len(served)} adapters are served")


async def seats(look: VllmLook) -> Finding:
    """Check that it is known how many requests run at once."""
    declared = look.facts.seats
    return warning(_seats_unknown(), SEATS_FIX) if declared is None else ok(f"{declared} declared (max_num_seqs)")


async def rank(look: VllmLook) -> Finding:
    """Check that the largest rank is known, and that the adapters to be served do not exceed it."""
    return judged_rank(look.facts.rank_max, look.target.served)


def judged_rank(declared: int | None, served: tuple[Adapter, ...]) -> Finding:
    """Judge max_lora_rank against the adapters to be served."""
    largest = max((adapter.rank_max for adapter in served), default=0)
    if declared is None:
        of_served = f"; the served adapters' is {largest}" if largest else ""
        return warning(f"{RANK_UNKNOWN}{of_served}", RANK_FIX)
    if largest > declared:
        over = sum(1 for adapter in served if adapter.rank_max > declared)
        enough = next((each for each in RANKS if each >= largest), RANKS[-1])
        return failed(
            f"{declared} declared (max_lora_rank), and {over} of the {len(served)} served adapters have more, up to "
            f"{largest}",
            f"vllm serve --max-lora-rank {enough}, and config.yaml: engine: {{rank_max: {enough}}}",
        )
    if declared not in RANKS:
        return warning(
            f"{declared} declared, and vLLM's max_lora_rank is one of {', '.join(map(str, RANKS))}",
            RANK_FIX,
        )
    return ok(f"{declared} declared (max_lora_rank)")
