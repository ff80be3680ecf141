"""What KEDA is told about engines is what it takes, and asks for as many engines as are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from tests.e2e.helm.rendering import NAMESPACE, Object, Renderer, one
from tests.kit.promtool import promtool

COUNT = {"type": "integer", "minimum": 0}
TRIGGER = {
    "type": "object",
    "required": ["metadata", "type"],
    "additionalProperties": False,
    "properties": {
        "type": {"const": "prometheus"},
        "metricType": {"enum": ["AverageValue", "Value"]},
        "metadata": {
            "type": "object",
            "required": ["serverAddress", "query", "threshold"],
            "additionalProperties": False,
            "properties": {name: {"type": "string"} for name in ("serverAddress", "query", "threshold")},
        },
    },
}
SPEC = {
    "type": "object",
    "required": ["scaleTargetRef", "triggers"],
    "additionalProperties": False,
    "properties": {
        "scaleTargetRef": {
            "type": "object",
            "required": ["name"],
            "additionalProperties": False,
            "properties": {name: {"type": "string", "minLength": 1} for name in ("apiVersion", "kind", "name")},
        },
        "minReplicaCount": COUNT,
        "maxReplicaCount": COUNT | {"minimum": 1},
        "pollingInterval": COUNT | {"minimum": 1},
        "cooldownPeriod": COUNT,
        "advanced": {"type": "object"},
        "triggers": {"type": "array", "minItems": 1, "items": TRIGGER},
    },
}
"""The part of it that the chart uses: from KEDA's config/crd/bases/keda.sh_scaledobjects.yaml of August 2026, and of a
trigger's metadata from its pkg/scalers/prometheus_scaler.go. Keys that the chart does not use are unknown here.
"""


@pytest.fixture(scope="module")
def triggers(rendered: dict[str, list[Object]]) -> list[dict[str, Any]]:
    """The triggers of the example of engines that come and go."""
    return one(rendered["discovered"], "ScaledObject")["spec"]["triggers"]  # type: ignore[no-any-return]


def test_keda_takes_it(rendered: dict[str, list[Object]]) -> None:
    """Everywhere; KEDA reads numbers of a trigger from strings."""
    found = [each for objects in rendered.values() for each in objects if each["kind"] == "ScaledObject"]
    assert len(found) > 2
    for each in found:
        jsonschema.validate(each["spec"], SPEC)
        for trigger in each["spec"]["triggers"]:
            assert float(trigger["metadata"]["threshold"]) > 0


def test_by_default_only_the_predicted_wait_counts(newest: Renderer) -> None:
    objects = newest.objects({"engineScaling": {"enabled": True, "target": {"name": "triton"}}})
    [trigger] = one(objects, "ScaledObject")["spec"]["triggers"]
    assert "lora_sidecar_predicted_wait_seconds" in trigger["metadata"]["query"]


def pod(name: str, **labels: str) -> str:
    more = "".join(f',{label}="{value}"' for label, value in labels.items())
    return f'{{namespace="{NAMESPACE}",service="pool-lora-sidecar",pod="{name}"{more}}}'


def test_queries_ask_for_what_is_needed(triggers: list[dict[str, Any]], tmp_path: Path) -> None:
    """Two replicas with an engine each, which the one has just taken from the other; another release beside them."""
    series = {
        f"lora_sidecar_predicted_wait_seconds{pod('a', backend='gpu-0')}": 30,
        f"lora_sidecar_predicted_wait_seconds{pod('b', backend='gpu-1')}": 50,
        f"lora_sidecar_slots{pod('a', backend='gpu-0')}": 4,
        f"lora_sidecar_slots{pod('b', backend='gpu-0')}": 4,
        f"lora_sidecar_slots{pod('b', backend='gpu-1')}": 4,
        f"lora_sidecar_slots_needed{pod('a', backend='gpu-0')}": 3,
        f"lora_sidecar_slots_needed{pod('b', backend='gpu-0')}": 1,
        f"lora_sidecar_slots_needed{pod('b', backend='gpu-1')}": 9,
        f"lora_sidecar_longest_promised_wait_seconds{pod('a')}": 12,
        f"lora_sidecar_longest_promised_wait_seconds{pod('b')}": 90,
    }
    series |= {name.replace("pool-", "other-"): 1000 for name in series}
    expected = (40, 12 / 8, 90)
    assert [float(trigger["metadata"]["threshold"]) for trigger in triggers] == [20, 0.9, 60]
    tests = {
        "rule_files": [],
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": f"{value}x2"} for name, value in series.items()],
                "promql_expr_test": [
                    {
                        "expr": trigger["metadata"]["query"],
                        "eval_time": "1m",
                        "exp_samples": [{"labels": "{}", "value": value}],
                    }
                    for trigger, value in zip(triggers, expected, strict=True)
                ],
            }
        ],
    }
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump(tests))
    done = promtool("test", "rules", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
