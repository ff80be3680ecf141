"""Every metric and label that an alert, a panel or a scaler reads is in what a serving sidecar shows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

from sidecar.shell.metric_table import METRICS
from sidecar.shell.series import WAIT_BUCKETS_S
from tests.kit.emulated import running_engine
from tests.kit.peft_files import write_adapter
from tests.kit.serving import serving

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "lora-sidecar"
SCRAPED = {"namespace", "service", "pod", "le"}
"""Labels that come from how it is scraped, and from histograms."""
RECORDED = {"slo", "scope", "class", "tenant"}
"""Labels of what rules record of objectives."""
NAME = re.compile(r"\blora_sidecar_\w+")
KEPT = re.compile(r"\b(?:by|on) \(([^)]*)\)")
MATCHED = re.compile(r"(lora_sidecar_\w+)\{([^}]*)\}")


def panels() -> Iterator[dict[str, Any]]:
    """Yield the panels of every dashboard."""
    files = sorted((CHART / "files").glob("dashboard*.json"))
    assert len(files) == 2
    for file in files:
        yield from json.loads(file.read_text())["panels"]


def queries() -> Iterator[tuple[str, str]]:
    """Yield where each query is, and the query."""
    rules = [
        rule for group in yaml.safe_load((CHART / "files/rules.yaml").read_text())["groups"] for rule in group["rules"]
    ]
    for rule in rules:
        yield rule.get("alert") or rule["record"], rule["expr"]
    for panel in panels():
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    scaling = (CHART / "templates/scaling.yaml").read_text()
    for query in re.findall(r"query: >-\n(.*?)\n +threshold:", scaling, re.DOTALL):
        yield "engineScaling", query


async def test_metrics_are_in_a_scrape(tmp_path: Path) -> None:
    """Each name is a family, or a part of one, of a sidecar that serves and has answered."""
    write_adapter(tmp_path / "sql")
    async with running_engine(compute="none") as engine, serving([engine], tmp_path) as sidecar:
        await sidecar.ask("sql")
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"http://{sidecar.sidecar.http_address}/metrics")).text
    shown = set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE))
    samples = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    known = shown | samples | {f"{name}_bucket" for name in shown}
    asked = {(where, name) for where, query in queries() for name in NAME.findall(query)}
    assert len(asked) > 80
    assert {(where, name) for where, name in asked if name not in known} == set()
    assert {"lora_sidecar_dispatches_total", "lora_sidecar_load_seconds_bucket", "lora_sidecar_seats"} <= samples


def test_labels_are_the_metrics() -> None:
    """Each label that a query keeps, matches or shows is one of a metric that it reads."""
    labels = {metric.name: {*metric.labels, *SCRAPED} for metric in METRICS}
    for where, query in queries():
        own = (RECORDED if "lora_sidecar:slo_" in query else set()).union(
            *(labels[_family(name)] for name in NAME.findall(query))
        )
        for kept in KEPT.findall(query):
            assert {label.strip() for label in kept.split(",") if label.strip()} <= own, f"{where}: {kept}"
        for name, matchers in MATCHED.findall(query):
            matched = set(re.findall(r"(\w+)=~?\"", matchers))
            assert matched <= labels[_family(name)], f"{where}: {matchers}"


def test_legends_show_what_is_kept() -> None:
    """A legend's labels are among those that its query keeps."""
    for panel in panels():
        for target in panel.get("targets", []):
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            kept = {label.strip() for group in KEPT.findall(target["expr"]) for label in group.split(",")}
            assert shown <= kept, panel["title"]


def test_first_tokens_are_judged_at_a_bucket() -> None:
    """Each time that the chart takes is a bucket of the histogram; the rules as they are have the default."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    times = schema["properties"]["monitoring"]["properties"]["rules"]["properties"]["firstTokenSeconds"]["enum"]
    assert set(times) <= set(WAIT_BUCKETS_S)
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    default = float(values["monitoring"]["rules"]["firstTokenSeconds"])
    assert set(re.findall(r'le="([^"]*)"', (CHART / "files/rules.yaml").read_text())) == {str(default)}


def _family(name: str) -> str:
    return re.sub(r"_(bucket|sum|count)$", "", name)
