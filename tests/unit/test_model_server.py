"""`/metrics/model-server` as endpoint pickers read it.

What they expect is written from their sources, which `docs/pickers.md` names: the model server protocol of the Gateway
API Inference Extension, the metrics extractor of llm-d's router, and vLLM's tests of its own metrics of residency.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from sidecar.core import events as ev
from sidecar.core.facts import EngineFacts, NamedVersion
from sidecar.fronts.http.probes import IDLE_SHARE, Kept
from sidecar.shell.metric_table import MODEL_SERVER
from tests.kit.corekit import adapter_of, facts_of, with_facts
from tests.kit.promtool import promtool
from tests.unit.test_metrics import Measured

REQUIRED = {
    # The protocol of the Gateway API Inference Extension, proposal 003: all are gauges.
    "vllm:num_requests_waiting": ("gauge", set()),
    "vllm:num_requests_running": ("gauge", set()),
    "vllm:kv_cache_usage_perc": ("gauge", set()),
    "vllm:lora_requests_info": ("gauge", {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}),
    # Residency, as llm-d's scorer of load state reads it and vLLM's tests expect it.
    "vllm:lora_adapter_loaded": ("gauge", {"adapter_name", "level", "pinned", "rank"}),
    "vllm:num_gpu_loaded_lora_adapters": ("gauge", {"model_name"}),
    "vllm:num_cpu_loaded_lora_adapters": ("gauge", {"model_name"}),
    "vllm:max_gpu_lora_adapters": ("gauge", set()),
    "vllm:lora_adapter_load_seconds": ("histogram", {"transition"}),
}
Families = Mapping[str, Family]


async def scrape(world: Measured) -> Families:
    assert world.metrics is not None
    content_type, body = await world.metrics.model_server.render()
    assert content_type.startswith("text/plain")
    return {family.name: family for family in text_string_to_metric_families(body.decode())}


def first(families: Families, name: str) -> Sample | None:
    """Return the series that llm-d's extractor takes: the first, since none has a time of its own."""
    samples = families[name].samples
    return samples[0] if samples else None


def info(families: Families) -> tuple[int | None, set[str], set[str]]:
    """Return the most adapters, the running and the waiting ones, as llm-d's extractor reads them."""
    latest = max(families["vllm:lora_requests_info"].samples, key=lambda sample: sample.value)
    most = latest.labels["max_lora"]
    lists = (latest.labels[f"{which}_lora_adapters"].split(",") for which in ("running", "waiting"))
    running, waiting = ({name.strip() for name in names if name.strip()} for names in lists)
    return int(most) if most else None, running, waiting


def loaded(families: Families) -> set[tuple[str, str, str]]:
    samples = families["vllm:lora_adapter_loaded"].samples
    assert all(sample.value == 1 for sample in samples)
    return {(s.labels["adapter_name"], s.labels["level"], s.labels["pinned"]) for s in samples}


def values(families: Families, name: str) -> dict[str, float]:
    """Return the values of a family by engine."""
    return {sample.labels["engine"]: sample.value for sample in families[name].samples}


async def served() -> Measured:
    """Return a world that has served two adapters, with a gauge of its engine's KV cache."""
    world = Measured()
    world.register("sql", "french")
    for name in ("sql", "french", ""):
        world.send(name)
    world.run()
    world.feed(ev.BackendMeasured("b0", 8, 1000, 250))
    return world


async def test_names_types_and_labels_are_those_that_pickers_read() -> None:
    families = await scrape(await served())
    assert set(families) == set(REQUIRED) == {metric.name for metric in MODEL_SERVER}
    labels = {metric.name: set(metric.labels) for metric in MODEL_SERVER}
    for name, (kind, required) in REQUIRED.items():
        assert families[name].type == kind, name
        assert families[name].samples, f"{name} has no sample in a world where everything happens"
        for sample in families[name].samples:
            assert required <= set(sample.labels) - {"le"} == labels[name], sample


async def test_lint_finds_nothing_but_the_colon_that_the_names_have() -> None:
    world = await served()
    assert world.metrics is not None
    for page, allowed in ((world.metrics, None), (world.metrics.model_server, "metric names should not contain ':'")):
        _, body = await page.render()
        done = promtool("check", "metrics", text=body.decode())
        found = [line for line in done.stderr.splitlines() if allowed is None or allowed not in line]
        assert (found, done.returncode) == ([], 0 if allowed is None else 3)


async def test_requests_that_wait_and_run() -> None:
    """Those that no engine can take at the moment wait as well."""
    world = Measured(seats=1)
    world.register("sql")
    for name in ("", "", "sql"):
        world.send(name)
    families = await scrape(world)
    for which, count in (("waiting", 2), ("running", 1)):
        sample = first(families, f"vllm:num_requests_{which}")
        assert sample is not None
        assert (sample.value, sample.labels) == (count, {"model_name": "tiny-llama"})
    world.lose("b0")
    sample = first(await scrape(world), "vllm:num_requests_waiting")
    assert sample is not None
    assert sample.value == 3


async def test_adapters_have_their_clients_names() -> None:
    """Those in the GPU's memory run, idle or not; one that waits and is there, too, counts once."""
    world = Measured(seats=1)
    world.register("sql", "french", "legal")
    for name in ("sql", "french"):
        world.send(name)
        world.run()
    assert info(await scrape(world)) == (4, {"sql", "french"}, set())
    world.engines["b0"].frozen = True
    for name in ("", "sql", "legal"):
        world.send(name)
    assert info(await scrape(world)) == (4, {"sql", "french"}, {"legal"})


async def test_residency_by_level_and_pin() -> None:
    """As vLLM's tests have it: the host's count includes those of the GPU, and what was evicted has no series."""
    world = Measured(engines=0)
    world.add_engine("b0", facts_of(host_pages=3, device_pages=2))
    world.register("a", "b", "c")
    for name in ("a", "b", "c"):
        world.send(name)
        world.run()
    world.pin("c", True)
    families = await scrape(world)
    assert loaded(families) == {("a", "cpu", "false"), ("b", "gpu", "false"), ("c", "gpu", "true")}
    assert values(families, "vllm:num_gpu_loaded_lora_adapters") == {"b0": 2}
    assert values(families, "vllm:num_cpu_loaded_lora_adapters") == {"b0": 3}
    assert values(families, "vllm:max_gpu_lora_adapters") == {"b0": 2}
    loads = {sample.name: sample for sample in families["vllm:lora_adapter_load_seconds"].samples}
    assert loads["vllm:lora_adapter_load_seconds_sum"].value == pytest.approx(3 * 0.005)
    assert loads["vllm:lora_adapter_load_seconds_count"].labels["transition"] == "load"
    world.register("d")
    world.send("d")
    world.run()
    assert "a" not in {name for name, _, _ in loaded(await scrape(world))}


async def test_the_rank_is_the_largest_of_the_version_that_is_nearest() -> None:
    """As llm-d's scorer of load state reads it: what an adapter takes in a slot."""
    world = Measured(engines=0)
    world.add_engine("b0", facts_of(host_pages=2, device_pages=1))
    small, large = adapter_of("one", rank=4), adapter_of("two", rank=16)
    for ordinal, adapter, others in ((1, small, ()), (2, large, (NamedVersion(1, small, "file:///sql"),))):
        world.register_as("sql", adapter, *others, ordinal=ordinal)
        world.send("sql")
        world.run()
        [sample] = (await scrape(world))["vllm:lora_adapter_loaded"].samples
        assert (sample.labels["level"], sample.labels["rank"]) == ("gpu", str(adapter.rank_max))


async def test_a_name_has_one_series_however_many_of_its_versions_are_there() -> None:
    """Prometheus drops samples of a page that has a series twice."""
    world = Measured(engines=0)
    world.add_engine("b0", facts_of(host_pages=4, device_pages=2))
    adapters = [adapter_of(name) for name in ("one", "two", "three")]
    others = tuple(NamedVersion(ordinal, each, "file:///sql") for ordinal, each in enumerate(adapters, 1))
    world.register_as("alias", adapters[2])
    for ordinal, adapter in enumerate(adapters, 1):
        world.register_as("sql", adapter, *others[: ordinal - 1], ordinal=ordinal)
        world.send("sql")
        world.run()
    assert values(await scrape(world), "vllm:num_cpu_loaded_lora_adapters") == {"b0": 3}
    assert loaded(await scrape(world)) == {("sql", "gpu", "false"), ("alias", "gpu", "false")}
    world.register_as("sql", adapters[2], *others[:2], ordinal=3, pinned=True)
    assert world.metrics is not None
    for page in (world.metrics, world.metrics.model_server):
        _, body = await page.render()
        series = [
            (sample.name, *sorted(sample.labels.items()))
            for family in text_string_to_metric_families(body.decode())
            for sample in family.samples
        ]
        assert [each for each, times in Counter(series).items() if times > 1] == []
    assert loaded(await scrape(world)) == {("sql", "gpu", "true"), ("alias", "gpu", "false")}


async def test_what_is_unknown_has_no_sample() -> None:
    """Neither a KV cache that is not told, nor slots that are only estimated, nor what a lost engine had."""
    world = Measured(engines=0)
    world.add_engine("b0", with_facts(facts_of(device_pages=None), kv_tokens=1000))
    world.register("sql")
    world.send("sql")
    world.run()
    families = await scrape(world)
    assert first(families, "vllm:kv_cache_usage_perc") is None
    assert not families["vllm:max_gpu_lora_adapters"].samples
    assert info(families) == (None, {"sql"}, set())
    world.feed(ev.BackendMeasured("b0", 8, 1000, 250))
    usage = first(await scrape(world), "vllm:kv_cache_usage_perc")
    assert usage is not None
    assert usage.value == 0.25
    world.add_engine("b1", facts_of())
    assert first(await scrape(world), "vllm:kv_cache_usage_perc") is None
    world.lose("b0")
    families = await scrape(world)
    assert loaded(families) == set()
    assert values(families, "vllm:num_gpu_loaded_lora_adapters") == {"b1": 0}
    world.feed(ev.BackendMeasured("b1", 8, 1000, 0))
    usage = first(await scrape(world), "vllm:kv_cache_usage_perc")
    assert usage is not None
    assert usage.value == 0
    world.feed(ev.BackendMeasured("b1", 8, 1000, None))
    assert first(await scrape(world), "vllm:kv_cache_usage_perc") is None
    world.feed(ev.BackendMeasured("b1", 8, 1000, 500))
    world.bring_up("b0")
    assert first(await scrape(world), "vllm:kv_cache_usage_perc") is None


async def test_each_base_model_has_series_of_its_own() -> None:
    """A request that waits for an engine to come up is one of the base model that it needs."""
    world = Measured(engines=0)
    world.add_engine("b0", facts_of())
    other = with_facts(facts_of(), base_models=("big-llama", "alias"))
    world.add_engine("b1", other)
    world.add_engine("b2", other, owned=False)
    world.register_as("big", adapter_of("big", base_model="big-llama"))
    world.send("big")
    world.run()
    families = await scrape(world)
    assert [sample.labels["model_name"] for sample in families["vllm:num_requests_waiting"].samples] == [
        "tiny-llama", "big-llama",
    ]  # fmt: skip
    assert {sample.labels["engine"] for sample in families["vllm:num_gpu_loaded_lora_adapters"].samples} == {"b0", "b1"}
    world.lose("b1")
    world.send("big")
    counts = {s.labels["model_name"]: s.value for s in (await scrape(world))["vllm:num_requests_waiting"].samples}
    assert counts == {"tiny-llama": 0, "big-llama": 1}


async def test_without_a_backend_and_without_adapters() -> None:
    """An empty pool has nothing that waits or runs, and an engine that takes no adapters tells nothing of them."""
    world = Measured(engines=0)
    sample = first(await scrape(world), "vllm:num_requests_waiting")
    assert sample is not None
    assert (sample.value, sample.labels) == (0, {"model_name": "base"})
    world.add_engine("b0", EngineFacts(base_only=True))
    families = await scrape(world)
    assert not any(family.samples for name, family in families.items() if "lora" in name)


async def test_the_series_of_a_removed_backend_end() -> None:
    world = await served()
    world.remove("b0")
    families = await scrape(world)
    assert not any(sample.labels.get("engine") for family in families.values() for sample in family.samples)


async def test_who_asks_often_gets_the_same_page() -> None:
    """A page that took a second is kept for as long as leaves the process its time; another format is another page."""
    now_s, rendered = 0.0, []

    async def render(accept: str) -> tuple[str, bytes]:
        nonlocal now_s
        now_s += 1
        rendered.append(accept)
        return accept, b"%d" % len(rendered)

    kept = Kept(render, lambda: now_s)
    assert [await kept.page(""), await kept.page("")] == [("", b"1")] * 2
    assert await kept.page("openmetrics") == ("openmetrics", b"2")
    now_s += IDLE_SHARE
    assert await kept.page("openmetrics") == ("openmetrics", b"3")
    assert len(rendered) == 3
