"""The engine's gauges as custom metrics of the real Triton, on its metrics port beside its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import triton_python_backend_utils as pb_utils
from prometheus_client.metrics_core import Metric


class Gauges:
    """The nv_trt_llm_* families of one model. Instances share them: the last writer's numbers stand."""

    def __init__(self, model: str, version: str) -> None:
        self._labels = {"model": model, "version": version}
        self._families: dict[str, Any] = {}
        self._gauges: dict[tuple[str, str, str], Any] = {}
        self._last: dict[tuple[str, str, str], float] = {}

    def set(self, families: Iterable[Metric]) -> None:
        """Publish what has changed since the last time."""
        for family in families:
            for sample in family.samples:
                for label, value in sample.labels.items():
                    if label not in self._labels:
                        self._set(family, (family.name, label, value), sample.value)

    def _set(self, family: Metric, key: tuple[str, str, str], value: float) -> None:
        if self._last.get(key) != value:
            self._gauge(family, key).set(value)
            self._last[key] = value

    def _gauge(self, family: Metric, key: tuple[str, str, str]) -> Any:
        name, label, kind = key
        if name not in self._families:
            self._families[name] = pb_utils.MetricFamily(
                name=name, description=family.documentation, kind=pb_utils.MetricFamily.GAUGE
            )
        if key not in self._gauges:
            self._gauges[key] = self._families[name].Metric(labels=self._labels | {label: kind})
        return self._gauges[key]
