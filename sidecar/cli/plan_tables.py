"""Format a plan's JSON object as tables and sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType

from sidecar.cli.show import count, duration, size, table

NONE = "–"
Record = dict[str, Any]


def summary(result: Record) -> str:
    """Return the plan in a sentence or two."""
    plan, load = result["plan"], result["load"]
    pool = _pool(plan)
    rate = result["predicted"]["throughput_tokens_per_s"]["median"]
    one = plan["backends"] == 1
    verdict = ("meets" if one else "meet") if result["meets"] else ("does not meet" if one else "do not meet")
    engine = f"{result['model']} on {result['gpu']}, by step times of {result['engine']}"
    return (
        f"{engine}; {count(load['adapters'], 'adapter')}, {load['workload']}\n"
        f"{pool} {verdict} {_wanted(result)}: {rate:,.0f} output tokens/s, waits {_waits(result)}"
    )


def missed(result: Record) -> str:
    """Return why there is no plan: the nearest one and what limits it."""
    return (
        f"nothing that was tried meets {_wanted(result)}; "
        f"nearest: {_pool(result['plan'])} ({_reached(result)}), bound by "
        f"{result['binds_because']}; what would help: {result['would_help']}"
    )


def engine_lines(result: Record) -> Iterator[tuple[str, str]]:
    """Yield an engine's settings, and the room that they leave."""
    plan = result["plan"]
    yield "engines", f"{plan['backends']:,}"
    fit = plan["adapters_fit"]
    most = "no limit is known" if fit is None else f"at most {fit:,} fit"
    yield "adapter slots", f"{plan['slots']:,} of {result['load']['adapters']:,}; {most}"
    yield "pages of an adapter", _pages(result)
    yield from _settings(result["settings"]["engine"])
    yield "GPU memory of adapters", size(plan["device_bytes"])
    if plan["version_bytes"] is not None:
        kept = f"{size(plan['version_bytes'])} of host memory for each, until it is restarted"
        yield "versions kept for ever", f"{plan['versions_max']:,} fit (host_versions_max); {kept}"
    kv = plan["kv_tokens"]
    yield "KV left", "no limit is known" if kv is None else f"{kv:,} tokens, {plan['kv_seats']:,.0f} requests"
    yield "seats", f"{plan['seats']:,}, mean batch {result['predicted']['mean_batch']['median']:,.0f}"
    yield "bound by", result["binds_because"]
    if not result["meets"]:
        yield "what would help", result["would_help"]


def _settings(settings: Record, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield settings by name, those of a section as "section.name"."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{name}.")
        elif isinstance(value, list):
            yield prefix + name, ", ".join(map(str, value))
        else:
            yield prefix + name, NONE if value is None else "yes" if value is True else str(value)


def sidecar_lines(result: Record) -> Iterator[tuple[str, str]]:
    """Yield the sidecar's settings."""
    settings = result["settings"]["sidecar"]
    store, limits = settings["store"], settings["queue"]["classes"]["default"]
    yield "store.memory_bytes", f"{store['memory_bytes']} ({size(store['memory_bytes'])})"
    yield "store.disk_bytes", f"{store['disk_bytes']} ({size(store['disk_bytes'])}: every adapter in two versions)"
    yield "queue_wait_s_max", f"{limits['queue_wait_s_max']:g}"
    yield "patience_s", f"{limits['patience_s']:g}"


def curve(result: Record) -> RenderableType:
    """Return throughput and waits by slots, with the plan marked."""
    rows = [
        [
            f"{point['slots']:,}{' ◄' if point['slots'] == result['plan']['slots'] else ''}",
            size(point["device_bytes"]),
            NONE if point["kv_tokens"] is None else f"{point['kv_tokens']:,}",
            NONE if point["kv_seats"] is None else f"{point['kv_seats']:,.0f}",
            f"{point['bound_tokens_per_s']:,.0f}",
            f"{point['throughput_tokens_per_s']:,.0f}",
            f"{point['mean_batch']:,.0f}",
            _seconds(point["wait_p99_s"]),
            _seconds(point["wait_max_s"]),
            point["binds"],
        ]
        for point in result["curve"]
    ]
    heads = [">adapters", ">KV tokens", ">KV seats", ">bound tok/s", ">tok/s", ">batch", ">p99 wait", ">longest"]
    return table(["slots", *heads, "bound by"], rows)


def trust(result: Record) -> Iterator[tuple[str, str]]:
    """Yield the basis of a plan, and its uncertainty."""
    rests, samples = result["rests_on"], result["predicted"]["samples"]
    yield (
        "samples",
        f"{len(samples)} of {rests['requests_of_a_sample']:,} requests; {rests['simulations']} simulations, "
        f"{rests['requests_simulated']:,} requests",
    )
    yield "tokens/s", _range(result["predicted"]["throughput_tokens_per_s"], lambda value: f"{value:,.0f}")
    yield "p99 wait", _range(result["predicted"]["wait_p99_s"], _seconds)
    yield "longest wait", _range(result["predicted"]["wait_max_s"], _seconds)
    yield "room to grow", _spare(result)
    yield "if steps take 10 % longer", _slower(result)
    errors = rests["interpolation_error"]
    yield (
        "cost file",
        f"{rests['cost']}; between its points decode steps err by up to {errors['decode']:.0%} and prompts by up to "
        f"{errors['prefill']:.0%} where `sidecar calibrate` made it; its sources are in --json",
    )
    yield "cost of adapters", _loss(rests["lora_loss"])
    for warning in result["warnings"]:
        yield "beware", warning
    for note in result["notes"]:
        yield "note", note


def _pool(plan: Record) -> str:
    each = " each" if plan["backends"] > 1 else ""
    return f"{count(plan['backends'], 'engine')} with {count(plan['slots'], 'adapter slot')}{each}"


def _wanted(result: Record) -> str:
    goal = result["goal"]
    parts = [
        f"a p99 wait of {goal['wait_p99_s']:g} s" if goal["wait_p99_s"] is not None else "",
        f"a longest wait of {goal['wait_max_s']:g} s" if goal["wait_max_s"] is not None else "",
        f"{goal['throughput_tokens_per_s']:,.0f} tokens/s" if goal["throughput_tokens_per_s"] is not None else "",
    ]
    return " and ".join(part for part in parts if part)


def _reached(result: Record) -> str:
    predicted = result["predicted"]
    worst = {key: predicted[key]["most"] for key in ("wait_p99_s", "wait_max_s")}
    return (
        f"p99 wait {_seconds(worst['wait_p99_s'])}, longest {_seconds(worst['wait_max_s'])}, "
        f"{predicted['throughput_tokens_per_s']['least']:,.0f} tokens/s"
    )


def _waits(result: Record) -> str:
    predicted = result["predicted"]
    p99_s, longest_s = (predicted[key]["median"] for key in ("wait_p99_s", "wait_max_s"))
    return f"{_seconds(p99_s)} at p99, {_seconds(longest_s)} at most"


def _pages(result: Record) -> str:
    plan = result["plan"]
    each = ", ".join(f"rank {rank}: {pages}" for rank, pages in plan["pages_by_rank"].items())
    where = f"{plan['device_pages']:,} on the GPU, {plan['host_pages']:,} in host memory"
    return f"{each}, of {size(plan['page_bytes'])}; {where}"


def _spare(result: Record) -> str:
    load, spare = result["load"], result["predicted"]["spare_tokens_per_s"]
    asked = load["asked_tokens_per_s"]
    if asked is None:
        return f"by the bound, {spare:,.0f} tokens/s with {load['in_flight']:,} in flight"
    return f"by the bound, {spare:,.0f} tokens/s, {spare / asked:.1f} × what is asked for"


def _slower(result: Record) -> str:
    slower = result["slower"]
    verdict = "meets the goal" if slower["meets"] else "misses the goal"
    reached = f"{slower['throughput_tokens_per_s']:,.0f} tokens/s, p99 wait {_seconds(slower['wait_p99_s'])}"
    return f"{verdict}: {reached} on the first sample"


def _loss(loss: Record) -> str:
    share = f"{loss['share']:.1%} of throughput"
    if loss["published_range"] is None:
        return f"{share}; no range of it is published"
    low, high = loss["published_range"]
    factors = f"throughput {loss['throughput_low']:.2f} to {loss['throughput_high']:.2f} of what is said here"
    assumed = "; measured with another model or GPU, and assumed for this" if loss["assumed"] else ""
    return f"{share}, published as {low:.1%} to {high:.1%}: {factors}{assumed}"


def _range(spread: Record, form: Any) -> str:
    values = [NONE if spread[key] is None else form(spread[key]) for key in ("median", "least", "most")]
    if values[1] == values[2]:
        return f"{values[0]} in every sample"
    return f"median {values[0]}, from {values[1]} to {values[2]}"


def _seconds(value: float | None) -> str:
    """Return a wait in seconds, even for several minutes, because limits are in seconds."""
    if value is None:
        return "no end"
    return f"{value:,.0f} s" if value >= 9.95 else duration(value)
