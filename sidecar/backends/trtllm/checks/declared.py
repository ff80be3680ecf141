"""Check what is declared of a trtllm-serve, which tells nothing of LoRA, by an adapter and against those served."""

from __future__ import annotations

from collections.abc import Sequence

from sidecar.adapters.base_model import BaseModel
from sidecar.backends.checks.finding import Finding, failed, ok, skipped, warning
from sidecar.backends.checks.staged import FOLDER_FIX, folder_at
from sidecar.backends.trtllm.api import Measures
from sidecar.backends.trtllm.checks.look import TrtllmLook
from sidecar.backends.trtllm.checks.server import STATISTICS_FIX
from sidecar.backends.trtllm.kind import LoraConfig
from sidecar.backends.trtllm.probe import Prober
from sidecar.core.facts import Adapter

ADAPTERS_FIX = "config.yaml: adapters_dir: PATH   (or {ours: PATH here, engine: PATH in the engine's container})"
WHERE = (
    "read max_loras, max_lora_rank and lora_target_modules in the file of trtllm-serve's --extra_llm_api_options, or "
    'in its log: "LoRA device Cache can hold N max sized LoRAs", "Initialized CUDA Graph LoRA manager, max N adapters, '
    'max rank R"'
)
PROBE_S = 30.0


async def folder(look: TrtllmLook) -> Finding:
    """Check the folder shared with the engine."""
    shared = look.target.adapters_dir
    if shared is None:
        return skipped("no folder is named that both see, so it serves its base model only", ADAPTERS_FIX)
    return folder_at(shared)


async def lora(look: TrtllmLook) -> Finding:
    """Show what is declared of the engine's adapters, and where to compare it."""
    config = look.entry.lora_config
    if config is None:
        return skipped("not declared, so it serves its base model only", f"config.yaml: lora_config: {{…}}; {WHERE}")
    modules = ", ".join(config.lora_target_modules) or "all modules"
    return ok(
        f"declared: {config.max_loras} at once (max_loras), rank {config.max_lora_rank} (max_lora_rank), {modules}; "
        f"the server tells none of it: {WHERE}"
    )


async def adapter(look: TrtllmLook) -> Finding:
    """Check that the engine computes with an adapter: one that must change its answers."""
    config, shared, base = look.entry.lora_config, look.target.adapters_dir, look.target.base
    assert config is not None
    assert shared is not None
    assert base is not None
    prober = Prober(look.api, shared, base, config, PROBE_S)
    if not prober.modules:
        return warning("the declared modules are those of experts only, for which no adapter can be made to try it")
    if not await _is_idle(look):  # at once with `max_loras` others it would fail them all
        busy = "requests are running" if look.has_statistics else "whether requests are running is not known"
        return warning(
            f"not tried: {busy}, and an adapter more than max_loras fails all that run; the sidecar tries it itself "
            "when it reaches the engine",
            *(() if look.has_statistics else (STATISTICS_FIX,)),
        )
    found = await prober.problem(await look.api.version())
    if found:
        return failed(found, *_fixes(found))
    return ok(f"one of {', '.join(prober.modules)} changes its answers; it stays in the engine's memory")


async def _is_idle(look: TrtllmLook) -> bool:
    """Return True if the engine makes no step: /metrics is emptied, and waits for one for two seconds."""
    if not look.has_statistics:
        return False
    await look.api.measures()
    return await look.api.measures() == Measures()


def _fixes(found: str) -> Sequence[str]:
    if "switched off" in found:
        return ("trtllm-serve MODEL --extra_llm_api_options FILE, and in FILE lora_config: {…}",)
    return FOLDER_FIX if "does not exist" in found else (WHERE,)


async def memory(look: TrtllmLook) -> Finding:
    """Check the room for adapters in the engine's host memory."""
    config = look.entry.lora_config
    assert config is not None
    return judged_memory(config, look.entry.host_versions_max)


def judged_memory(config: LoraConfig, host_versions_max: int | None) -> Finding:
    """Judge max_cpu_loras and host_versions_max."""
    wanted = 2 * config.max_loras
    if config.max_cpu_loras is None or config.max_cpu_loras < wanted:
        said = "not declared" if config.max_cpu_loras is None else f"{config.max_cpu_loras} declared"
        return warning(
            f"max_cpu_loras is {said}; a full host cache ends the engine, so it should be {wanted} at least",
            f"lora_config: {{max_cpu_loras: {wanted}}}   (in trtllm-serve's file and in config.yaml)",
        )
    if host_versions_max is None:
        return warning(
            "the engine keeps each adapter version that it has seen in host memory until it is restarted, and no limit "
            "is set",
            "config.yaml: host_versions_max: how many fit, twice their size each",
        )
    return ok(f"{config.max_cpu_loras} (max_cpu_loras); {host_versions_max} versions until it is to be restarted")


async def seats(look: TrtllmLook) -> Finding:
    """Check that it is known how many requests run at once."""
    declared, told = look.facts.seats, look.seats
    if declared is None and told is None:
        return warning(
            "max_batch_size is neither declared nor told", "config.yaml: engine: {seats: its max_batch_size}"
        )
    if declared is not None and told is not None and declared > told:
        return failed(f"{declared} declared, and it tells {told}", f"config.yaml: engine: {{seats: {told}}}")
    return ok(f"{declared or told} (max_batch_size)")


async def rank(look: TrtllmLook) -> Finding:
    """Check that the adapters to be served fit."""
    config = look.entry.lora_config
    assert config is not None
    return judged_adapters(config, look.target.base, look.target.served)


def judged_adapters(config: LoraConfig, base: BaseModel | None, served: tuple[Adapter, ...]) -> Finding:
    """Judge max_lora_rank and lora_target_modules against the adapters to be served."""
    largest = max((adapter.rank_max for adapter in served), default=0)
    if largest > config.max_lora_rank:
        over = sum(1 for adapter in served if adapter.rank_max > config.max_lora_rank)
        return failed(
            f"{over} of the {len(served)} served adapters have a larger rank than {config.max_lora_rank}, up to "
            f"{largest}, and are refused",
            f"lora_config: {{max_lora_rank: {largest}}}   (in trtllm-serve's file and in config.yaml)",
        )
    known = frozenset() if base is None else frozenset(config.modules_of(base))
    missing = sorted({module for adapter in served for module in adapter.modules} - known) if known else []
    if missing:
        return failed(
            f"served adapters adapt {', '.join(missing)}, which the engine would leave out, and are refused",
            "lora_config: {lora_target_modules: […]}   (in trtllm-serve's file and in config.yaml)",
        )
    return ok(f"{config.max_lora_rank} (max_lora_rank)" + (f"; {len(served)} adapters are served" if served else ""))
