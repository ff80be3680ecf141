"""Check what is declared of a server whose requests carry adapters, and which tells nothing of LoRA: by an adapter that
must change its answers, and against those to be served.
"""

from __future__ import annotations

from collections.abc import Sequence

from sidecar.adapters.base_model import BaseModel
from sidecar.backends.checks.finding import Finding, State, failed, ok, skipped, warning
from sidecar.backends.checks.staged import FOLDER_FIX
from sidecar.backends.openai.checks.declared import judged_rank
from sidecar.backends.openai.checks.look import Look
from sidecar.backends.openai.dialect import Measures
from sidecar.backends.openai.probe import prober_of
from sidecar.backends.openai.trtllm import DIALECT, LoraConfig
from sidecar.core.facts import Adapter

WHERE = (
    "read max_loras, max_lora_rank and lora_target_modules in the file of trtllm-serve's --extra_llm_api_options, or "
    'in its log: "LoRA device Cache can hold N max sized LoRAs", "Initialized CUDA Graph LoRA manager, max N adapters, '
    'max rank R"'
)
PROBE_S = 30.0


async def lora(look: Look) -> Finding:
    """Show what is declared of the engine's adapters, and where to compare it."""
    config = look.entry.lora_config
    if config is None:
        return skipped("not declared, so it serves its base model only", f"config.yaml: lora_config: {{…}}; {WHERE}")
    modules = ", ".join(config.lora_target_modules) or "all modules"
    return ok(
        f"declared: {config.max_loras} at once (max_loras), rank {config.max_lora_rank} (max_lora_rank), {modules}; "
        f"the server tells none of it: {WHERE}"
    )


async def adapter(look: Look) -> Finding:
    """Check that the engine computes with an adapter: one that must change its answers."""
    prober = prober_of(look.dialect, look.server, look.entry, PROBE_S)
    if prober is None:
        return skipped("not tried: no folder is named that both see, or the base model's files are not named")
    if not prober.modules:
        return warning("the declared modules are those of experts only, for which no adapter can be made to try it")
    if not await _is_idle(look):  # at once with `max_loras` others it would fail them all
        busy = "requests are running" if look.has_statistics else "whether requests are running is not known"
        return warning(
            f"not tried: {busy}, and an adapter more than max_loras fails all that run; the sidecar tries it itself "
            "when it reaches the engine",
            *(() if look.has_statistics else (look.dialect.metrics_fix,)),
        )
    found = await prober.problem(str(look.version))
    if found:
        return failed(found, *_fixes(found))
    return ok(f"one of {', '.join(prober.modules)} changes its answers; it stays in the engine's memory")


async def _is_idle(look: Look) -> bool:
    """Return True if the engine makes no step: /metrics is emptied, and waits for one for two seconds."""
    if not look.has_statistics:
        return False
    await look.dialect.measures(look.server)
    return await look.dialect.measures(look.server) == Measures()


def _fixes(found: str) -> Sequence[str]:
    if "switched off" in found:
        return ("trtllm-serve MODEL --extra_llm_api_options FILE, and in FILE lora_config: {…}",)
    return FOLDER_FIX if "does not exist" in found else (WHERE,)


async def memory(look: Look) -> Finding:
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


async def rank(look: Look) -> Finding:
    """Check that the adapters to be served fit."""
    config = look.entry.lora_config
    assert config is not None
    return judged_adapters(config, look.target.base, look.target.served)


def judged_adapters(config: LoraConfig, base: BaseModel | None, served: tuple[Adapter, ...]) -> Finding:
    """Judge max_lora_rank and lora_target_modules against the adapters to be served."""
    finding = judged_rank(DIALECT, config.max_lora_rank, served)
    if finding.state is not State.OK:
        return finding
    known = frozenset() if base is None else frozenset(config.modules_of(base))
    missing = sorted({module for adapter in served for module in adapter.modules} - known) if known else []
    if missing:
        return failed(
            f"served adapters adapt {', '.join(missing)}, which the engine would leave out, and are refused",
            "lora_config: {lora_target_modules: […]}   (in trtllm-serve's file and in config.yaml)",
        )
    return finding
