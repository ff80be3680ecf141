"""Objectives by class and tenant: what is recorded of them, and when their alert comes, as promtool works it out.

The figures are those of Google's SRE workbook, chapter 5: an objective whose misses come at 14.4 times its pace for an
hour, or at 6 times for six hours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kit.promtool import promtool

RULES = Path(__file__).parents[2] / "deploy" / "helm" / "lora-sidecar" / "files" / "rules.yaml"
POD = 'namespace="lora",service="pool",pod="pool-0"'
Counts = list[tuple[int, int]]
"""So many more a minute, for so many minutes."""


def counted(parts: Counts) -> str:
    """Return a counter's values, minute by minute."""
    texts, count = [], 0
    for step, minutes in parts:
        texts.append(f"{count}+{step}x{minutes - 1}")
        count += step * minutes
    return " ".join(texts)


def shares(parts: list[tuple[int, int, int]]) -> tuple[str, str]:
    """Return counters of what is bad and of what is good, from (of so many a minute, so many bad, minutes)."""
    return (
        counted([(bad, minutes) for _, bad, minutes in parts]),
        counted([(total - bad, minutes) for total, bad, minutes in parts]),
    )


def series_of(slo: str, scope: str, name: str, parts: list[tuple[int, int, int]]) -> dict[str, str]:
    """Return what a sidecar counts of one class or tenant."""
    bad, good = shares(parts)
    labels = f'{POD},{scope}="{name}"'
    if slo == "errors":
        metric = f"lora_sidecar_{scope}_requests_total"
        refused = f'{metric}{{{labels},outcome="refused"}}'
        return {
            f'{metric}{{{labels},outcome="{outcome}"}}': values for outcome, values in (("failed", bad), ("ok", good))
        } | {refused: bad}
    if slo == "bounds":
        other = "tenant" if scope == "class" else "class"
        labels += f',{other}="any"'
        return {
            f'lora_sidecar_wait_bounds_total{{{labels},kept="{kept}"}}': v
            for kept, v in (("false", bad), ("true", good))
        }
    metric = "lora_sidecar_first_token_seconds"
    total = counted([(total, minutes) for total, _, minutes in parts])
    return {
        f'{metric}_bucket{{{labels},le="5.0"}}': counted([(0, minutes) for _, _, minutes in parts]),
        f'{metric}_bucket{{{labels},le="10.0"}}': good,
        f'{metric}_bucket{{{labels},le="+Inf"}}': total,
        f"{metric}_count{{{labels}}}": total,
    }


KINDS = [("errors", "class"), ("errors", "tenant"), ("bounds", "class"), ("bounds", "tenant"), ("first_token", "class")]
BUDGETS = {"errors": 0.001, "bounds": 0.01, "first_token": 0.01}


def ask(folder: Path, series: dict[str, str], asked: list[tuple[str, int, list[tuple[str, float]]]]) -> None:
    """Work expressions out after so many minutes; fail if promtool finds others than the samples that are expected."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    [group] = [each for each in groups if each["name"] == "lora-sidecar.objectives"]
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": [group]}))
    unit: dict[str, Any] = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": expression,
                "eval_time": f"{minute}m",
                "exp_samples": [{"labels": labels, "value": value} for labels, value in samples],
            }
            for expression, minute, samples in asked
        ],
    }
    file = folder / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "5m", "tests": [unit]}))
    done = promtool("test", "rules", str(file))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("slo", "scope"), KINDS)
def test_a_share_of_misses_is_recorded(slo: str, scope: str, tmp_path: Path) -> None:
    """By class or tenant alone, over each window; a refusal counts neither way."""
    series = series_of(slo, scope, "acme", [(1000, 20, 500)]) | series_of(slo, scope, "blue", [(1000, 0, 500)])
    labels = f'namespace="lora",service="pool",slo="{slo}",scope="{scope}",{scope}='
    asked = [
        (
            f'round(lora_sidecar:slo_misses:ratio_{window}{{scope="{scope}"}}, 0.0001)',
            450,
            [(f'{{{labels}"acme"}}', 0.02), (f'{{{labels}"blue"}}', 0)],
        )
        for window in ("5m", "30m", "1h", "6h")
    ]
    asked += [
        (
            f'lora_sidecar:slo_requests:increase_{window}{{{scope}="acme"}}',
            450,
            [(f'lora_sidecar:slo_requests:increase_{window}{{{labels}"acme"}}', count)],
        )
        for window, count in (("1h", 60_000), ("6h", 360_000))
    ]
    ask(tmp_path, series, asked)


@pytest.mark.parametrize(("slo", "scope"), KINDS)
def test_the_alert_names_who_burns(slo: str, scope: str, tmp_path: Path) -> None:
    """One class or tenant of two; it ends soon after the misses do."""
    total = 100_000
    bad = round(16 * BUDGETS[slo] * total)
    series = series_of(slo, scope, "acme", [(total, 0, 360), (total, bad, 60), (total, 0, 360)])
    series |= series_of(slo, scope, "blue", [(total, 0, 780)])
    firing = f'sum by (slo, scope, {scope}) (ALERTS{{alertname="LoraSidecarObjectiveBurns",alertstate="firing"}})'
    burns = [(f'{{slo="{slo}",scope="{scope}",{scope}="acme"}}', 1.0)]
    ask(tmp_path, series, [(firing, 355, []), (firing, 400, []), (firing, 420, burns), (firing, 450, [])])


@pytest.mark.parametrize("pace", [5, 8])
def test_a_slow_burn(pace: int, tmp_path: Path) -> None:
    """At 8 times its pace, six hours are at 6 times after three quarters of them; at 5 times they never are."""
    bad = round(pace * BUDGETS["errors"] * 1000)
    series = series_of("errors", "tenant", "acme", [(1000, 0, 360), (1000, bad, 400)])
    firing = 'count(ALERTS{alertname="LoraSidecarObjectiveBurns",alertstate="firing"})'
    ask(tmp_path, series, [(firing, 360 + 260, []), (firing, 360 + 280, [("{}", 1.0)] if pace == 8 else [])])


def test_few_requests_are_not_judged(tmp_path: Path) -> None:
    """Of one request in ten minutes, each of which fails, nobody is told; of two a minute, somebody is."""
    seldom, often = f'{POD},tenant="seldom"', f'{POD},tenant="often"'
    series = {
        f'lora_sidecar_tenant_requests_total{{{seldom},outcome="failed"}}': " ".join(
            str(minute // 10) for minute in range(400)
        ),
        f'lora_sidecar_tenant_requests_total{{{often},outcome="failed"}}': counted([(2, 400)]),
    }
    firing = 'sum by (tenant) (ALERTS{alertname="LoraSidecarObjectiveBurns",alertstate="firing"})'
    ask(tmp_path, series, [(firing, 390, [('{tenant="often"}', 1.0)])])
