"""The alert rules: promtool takes them, each fires when it should and not else, and what they read is really there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.helm.alert_cases import CASES, OTHER, POD, Series
from tests.e2e.helm.installed import CHART
from tests.e2e.helm.rendering import Object, Renderer, one
from tests.kit.promtool import promtool

RULES = CHART / "files" / "rules.yaml"


def alerts(objects: list[Object]) -> dict[str, Any]:
    """Return a release's alerts by name."""
    groups = one(objects, "PrometheusRule")["spec"]["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def recorded(objects: list[Object]) -> dict[str, set[str]]:
    """Return the labels of a release's recorded series by their names."""
    found: dict[str, set[str]] = {}
    for group in one(objects, "PrometheusRule")["spec"]["groups"]:
        for rule in group["rules"]:
            if "record" in rule:
                found.setdefault(rule["record"], set()).update(rule.get("labels", ()), kept_by(rule["expr"]))
    return found


def kept_by(expression: str) -> set[str]:
    return set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", expression))))


@pytest.fixture(scope="module")
def rules(newest: Renderer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rules as the chart renders them, as a file of Prometheus."""
    objects = newest.objects({"monitoring": {"rules": {"enabled": True}}})
    path = tmp_path_factory.mktemp("rules") / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": one(objects, "PrometheusRule")["spec"]["groups"]}))
    return path


def test_check(rules: Path) -> None:
    """Prometheus can read them, as they stand in the chart and as they are rendered."""
    assert yaml.safe_load(rules.read_text()) == yaml.safe_load(RULES.read_text())
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", str(rules))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case(newest: Renderer) -> None:
    """None is left untested."""
    assert alerts(newest.objects({"monitoring": {"rules": {"enabled": True}}})).keys() == CASES.keys()


def test_alerts_fire_and_do_not(rules: Path, tmp_path: Path) -> None:
    """Each alert fires with the series that it is for, and is silent with those that are near to them."""
    tests = []
    for name, case in CASES.items():
        tests += [_unit(name, case.fires, case.minutes, fires=True), _unit(name, case.quiet, case.minutes, fires=False)]
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": tests}))
    done = promtool("test", "rules", str(file))
    assert done.returncode == 0, done.stdout + done.stderr


def test_open_requests_are_recorded_by_pod(rules: Path, tmp_path: Path) -> None:
    """What the HPA reads: every open call of a gateway counts, also where no engine's queue is its own."""
    series = {f"lora_sidecar_open_calls{{{POD}}}": "30x5", f"lora_sidecar_open_calls{{{OTHER}}}": "4x5"}
    series |= {f'lora_sidecar_queued_requests{{{POD},backend="gpu-0"}}': "7x5"}
    samples = [
        {"labels": f"lora_sidecar_open_requests{{{pod}}}", "value": value} for pod, value in ((POD, 30), (OTHER, 4))
    ]
    unit = {
        "interval": "1m",
        "input_series": [{"series": each, "values": values} for each, values in series.items()],
        "promql_expr_test": [{"expr": "lora_sidecar_open_requests", "eval_time": "5m", "exp_samples": samples}],
    }
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": [unit]}))
    done = promtool("test", "rules", str(file))
    assert done.returncode == 0, done.stdout + done.stderr


BURNS, SHRINKS = "LoraSidecarErrorBudgetBurns", "LoraSidecarErrorBudgetShrinks"
CLEAN_MIN = 3 * 24 * 60
"""Three days of a thousand requests a minute and no errors come before everything."""
TELLS: list[tuple[str, list[tuple[float, int]], list[tuple[int, set[str]]]]] = [
    # Each part is a share of errors for so many minutes. An alert fires after window * factor * 0.001 / share.
    ("an outage", [(1.0, 30)], [(0, set()), (5, {BURNS, SHRINKS})]),
    ("a tenth", [(0.1, 120)], [(5, set()), (10, {BURNS})]),
    ("ten times the budget's pace", [(0.01, 10 * 60)], [(210, set()), (220, {BURNS})]),
    ("four times", [(0.004, 24 * 60)], [(17 * 60, set()), (19 * 60, {SHRINKS})]),
    ("twice", [(0.002, 60 * 60)], [(35 * 60, set()), (37 * 60, {SHRINKS})]),
    ("half the pace", [(0.0005, 72 * 60)], [(71 * 60, set())]),
    ("an outage that is over", [(1.0, 10), (0.0, 600)], [(10, {BURNS, SHRINKS}), (45, {SHRINKS}), (9 * 60, set())]),
    ("a short burst", [(0.05, 5), (0.0, 120)], [(5, set()), (60, set())]),
]


WITH_OUTCOMES = [("failed", *case) for case in TELLS] + [(outcome, *TELLS[0]) for outcome in ("expired", "refused")]


@pytest.mark.parametrize(
    ("outcome", "parts", "expected"),
    [(outcome, parts, expected) for outcome, _, parts, expected in WITH_OUTCOMES],
    ids=[f"{name}, {outcome}" for outcome, name, *_ in WITH_OUTCOMES],
)
def test_the_budget_of_errors(
    tmp_path: Path,
    outcome: str,
    parts: list[tuple[float, int]],
    expected: list[tuple[int, set[str]]],
) -> None:
    """Alerts come when the table of the SRE workbook says, and go when errors do; a refusal is no error."""
    series = {f'lora_sidecar_requests_total{{{POD},outcome="{outcome}"}}': _counted([(0, CLEAN_MIN), *parts])}
    good = [(1.0, CLEAN_MIN), *((1 - share, minutes) for share, minutes in parts)]
    series[f'lora_sidecar_requests_total{{{POD},outcome="ok"}}'] = _counted(good)
    expression = 'count by (alertname) (ALERTS{alertname=~"LoraSidecarErrorBudget.*",alertstate="firing"})'
    if outcome == "refused":
        expected = [(minute, set()) for minute, _ in expected]
    unit = {
        "interval": "1m",
        "input_series": [{"series": each, "values": values} for each, values in series.items()],
        "promql_expr_test": [
            {
                "expr": expression,
                "eval_time": f"{CLEAN_MIN + minute}m",
                "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(firing)],
            }
            for minute, firing in expected
        ],
    }
    [group] = [each for each in yaml.safe_load(RULES.read_text())["groups"] if each["name"] == "lora-sidecar.objective"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [group]}))  # all rules for days take a minute
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "5m", "tests": [unit]}))
    done = promtool("test", "rules", str(file))
    assert done.returncode == 0, done.stdout + done.stderr


def _counted(parts: list[tuple[float, int]]) -> str:
    """Return a counter of which each part adds a share of a thousand a minute."""
    texts, count = [], 0
    for share, minutes in parts:
        step = round(share * 1000)
        texts.append(f"{count}+{step}x{minutes - 1}")
        count += step * minutes
    return " ".join(texts)


def test_a_case_can_fail(rules: Path, tmp_path: Path) -> None:
    """An alert that is expected and does not fire is seen."""
    tests = [_unit("LoraSidecarQuarantine", CASES["LoraSidecarQuarantine"].quiet, 60, fires=True)]
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": tests}))
    assert promtool("test", "rules", str(file)).returncode != 0


def _unit(name: str, series: Series, minutes: int, *, fires: bool) -> dict[str, Any]:
    expression = f'count by (alertname) (ALERTS{{alertname="{name}",alertstate="firing"}})'
    samples = [{"labels": f'{{alertname="{name}"}}', "value": 1}] if fires else []
    return {
        "interval": "1m",
        "name": f"{name} {'fires' if fires else 'is silent'}",
        "input_series": [{"series": each, "values": values} for each, values in series.items()],
        "promql_expr_test": [{"expr": expression, "eval_time": f"{minutes}m", "exp_samples": samples}],
    }


def test_texts_name_labels_that_there_are(newest: Renderer) -> None:
    """A summary shows only labels that the expression keeps: others would be empty."""
    objects = newest.objects({"monitoring": {"rules": {"enabled": True}}})
    records = recorded(objects)
    for name, alert in alerts(objects).items():
        read = [records[series] for series in re.findall(r"[\w:]+", alert["expr"]) if series in records]
        kept = kept_by(alert["expr"]).union(*read)
        shown = set(re.findall(r"\$labels\.(\w+)", " ".join(alert["annotations"].values())))
        assert shown <= kept, name
        assert alert["labels"]["severity"] in ("info", "warning", "critical"), name
        assert {"summary", "action"} <= alert["annotations"].keys(), name


def test_dashboards_are_rendered(helm: Renderer) -> None:
    """Grafana finds both, as they are in the chart, under names that no other release has."""
    objects = helm.objects({"monitoring": {"dashboard": {"enabled": True}}})
    found = one(objects, "ConfigMap", "-dashboard")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert {name: json.loads(text) for name, text in found["data"].items()} == {
        f"pool-lora-sidecar{suffix}.json": json.loads((CHART / "files" / f"dashboard{suffix}.json").read_text())
        for suffix in ("", "-tenants")
    }


def test_panels_are_promql(tmp_path: Path) -> None:
    """Prometheus can read the queries of every dashboard; what Grafana puts in is put in."""
    values = {"$namespace": "lora", "$service": "pool", "$tenant": "acme|globex"}
    values |= {"$__rate_interval": "1m", "$__range": "1h"}
    rules = []
    for file in sorted((CHART / "files").glob("dashboard*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel.get("targets", []):
                expression = target["expr"]
                for variable, value in values.items():
                    expression = expression.replace(variable, value)
                assert "$" not in expression, panel["title"]
                rules.append({"record": f"panel:{len(rules)}", "expr": expression})
    assert len(rules) > 60
    file = tmp_path / "panels.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = promtool("check", "rules", str(file))
    assert done.returncode == 0, done.stdout + done.stderr


def test_another_time_for_the_first_token(newest: Renderer) -> None:
    """Nothing else becomes another."""
    for seconds, bucket in ((2.5, "2.5"), (60, "60.0")):
        objects = newest.objects({"monitoring": {"rules": {"enabled": True, "firstTokenSeconds": seconds}}})
        expected = yaml.safe_load(RULES.read_text().replace('le="10.0"', f'le="{bucket}"'))
        assert one(objects, "PrometheusRule")["spec"]["groups"] == expected["groups"]


def test_disabled(newest: Renderer) -> None:
    """An alert that is not wanted is left out, and the others stay."""
    values = {
        "monitoring": {"rules": {"enabled": True, "disabled": ["LoraSidecarBacklog"], "labels": {"release": "p"}}}
    }
    objects = newest.objects(values)
    assert alerts(objects).keys() == CASES.keys() - {"LoraSidecarBacklog"}
    assert one(objects, "PrometheusRule")["metadata"]["labels"]["release"] == "p"
