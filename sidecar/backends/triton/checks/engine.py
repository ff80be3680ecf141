"""Check what is known of the engine, and how many adapters its caches hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sidecar.backends.checks.finding import Finding, Target, failed, ok, warning
from sidecar.backends.engine_facts import from_llmapi_config, from_model_config, merge
from sidecar.backends.triton.checks.look import Look
from sidecar.backends.triton.checks.model import kind_of
from sidecar.backends.triton.checks.tiny import rows_of
from sidecar.backends.triton.dialects import TRITON_LLMAPI
from sidecar.core.facts import DTYPE_BYTES, Adapter, EngineFacts, PageShape, pages_of

DECLARE = "config.yaml: engine: {config: /path/to/the/engine's/config.json}   (or --engine-config)"
ADAPTERS_WANTED = 2
"""With fewer in the cache, every other adapter's request is a load."""
_WAYS = 8
"""How many adapters of the largest rank the proposed cache holds."""


def facts_from(target: Target, config: Any) -> EngineFacts:
    """Fill the declared facts with the model's config. Of two dtypes the model's counts: weights are sent in it."""
    kind = kind_of(config)
    declared, found = target.facts, from_llmapi_config() if kind == TRITON_LLMAPI else from_model_config(config)
    merged = merge(target.id, replace(declared, dtype=None), replace(found, dtype=None))
    return replace(merged, dtype=found.dtype or declared.dtype, kind=kind, reads_files=kind == TRITON_LLMAPI)


async def engine(look: Look) -> Finding:
    """Check what is known of the engine's build: its largest rank, modules and layers."""
    facts = look.facts
    if look.is_llm_api:
        return _base_model(look.target)
    missing = [
        name
        for name, value in (("max rank", facts.rank_max), ("modules", facts.modules), ("layers", facts.layers))
        if not value
    ]
    known = _known(facts)
    if missing:
        return warning(
            f"{', '.join(missing)} not known, so adapters are not checked against "
            f"{'it' if len(missing) == 1 else 'them'}{f'; known: {known}' if known else ''}",
            DECLARE,
        )
    return ok(known)


def _base_model(target: Target) -> Finding:
    if target.base is None:
        return warning(
            "the base model is not known, so adapters are not checked against it",
            "config.yaml: base_model: {name: …, config: the folder of the model}",
        )
    return ok(f"{target.base.layers} layers, {target.base.heads.query} heads, as the base model's config.json says")


def _known(facts: EngineFacts) -> str:
    parts = (
        f"rank at most {facts.rank_max}" if facts.rank_max else "",
        f"{', '.join(facts.modules)}" if facts.modules else "",
        f"{facts.layers} layers" if facts.layers else "",
        f"tp {facts.tp}" if facts.tp > 1 else "",
    )
    return "; ".join(part for part in parts if part)


async def cache(look: Look) -> Finding:
    """Check how many adapters fit the engine's host cache."""
    facts = replace(look.facts, dtype=look.facts.dtype if look.facts.dtype in DTYPE_BYTES else "float16")
    page, total = facts.page, facts.host_pages_total
    if page is None or total is None:
        size = f"{(facts.host_bytes or 0) / 2**20:.0f} MiB"
        return warning(f"how many adapters its host cache of {size} holds cannot be said without the modules", DECLARE)
    return _served(facts, page, total, look.target.served) if look.target.served else _by_rank(facts, page, total)


def _by_rank(facts: EngineFacts, page: PageShape, total: int) -> Finding:
    largest = facts.rank_max or facts.cached_rank_max
    text = f"{_size(facts, page, total)}: " + " or ".join(
        f"{fit} of rank {rank}" for rank in _ranks(facts, largest) if (fit := total // pages_of_rank(facts, rank)) or 1
    )
    fit, pages = total // pages_of_rank(facts, largest), pages_of_rank(facts, largest)
    if fit < ADAPTERS_WANTED:
        judge = warning if fit else failed
        return judge(f"{text}; an adapter of the largest rank takes {pages}", *_larger(facts, page, _WAYS * pages))
    return ok(text)


def _served(facts: EngineFacts, page: PageShape, total: int, served: tuple[Adapter, ...]) -> Finding:
    pages = {adapter.digest: pages_of(adapter.rows, facts) for adapter in served}
    needed, largest = sum(pages.values()), max(pages.values())
    text = f"{_size(facts, page, total)}; the {len(pages)} served adapters take {needed}"
    if largest > total:
        return failed(f"{text}, the largest alone {largest}", *_larger(facts, page, needed))
    if needed <= total:
        return ok(f"{text}: all fit")
    at_once = _fitting(sorted(pages.values()), total)
    text = f"{text}: at most {at_once} at once, others take their place when they are asked for"
    return warning(text, *_larger(facts, page, needed)) if at_once < ADAPTERS_WANTED else ok(text)


def _fitting(pages: list[int], total: int) -> int:
    count = 0
    for each in pages:
        total -= each
        count += total >= 0
    return count


def _size(facts: EngineFacts, page: PageShape, total: int) -> str:
    kib = page.width * page.slots * DTYPE_BYTES[facts.layout.dtype] / 2**10
    return f"{total} host pages of {f'{kib / 2**10:.3g} MiB' if kib >= 2**10 else f'{kib:.3g} KiB'}"


def _ranks(facts: EngineFacts, largest: int) -> list[int]:
    return sorted({rank for rank in (facts.optimal_rank, largest) if rank <= largest})


def _larger(facts: EngineFacts, page: PageShape, pages: int) -> list[str]:
    wanted = pages * page.width * page.slots * DTYPE_BYTES[facts.layout.dtype]
    return [
        'config.pbtxt: parameters { key: "lora_cache_host_memory_bytes" value: { string_value: '
        f'"{wanted}" }} }}   (holds {pages} pages)'
    ]


def pages_of_rank(facts: EngineFacts, rank: int) -> int:
    """Return the pages of an adapter of this rank on all modules and layers."""
    return pages_of(tuple(rows_of(facts, rank, range(facts.layers or 0))), facts)
