"""Write the chart's Grafana dashboard from dashboard.yaml; with `--check` it only exits 1 if that would change it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
PANELS = HERE / "dashboard.yaml"
FILE = HERE / "lora-sidecar" / "files" / "dashboard.json"
SELECTOR = '{namespace="$namespace",service="$service"'
COLUMNS, PANEL_COLUMNS = 24, 8
SMALL, TALL = 4, 8
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLOURS = {"zero": ("green", "red"), "above zero": ("red", "green")}
"""Below 1, and from 1 on."""


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana imports it."""
    return {
        "title": "LoRA sidecar",
        "uid": "lora-sidecar",
        "tags": ["lora-sidecar"],
        "schemaVersion": 39,
        "version": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": _placed(yaml.safe_load(PANELS.read_text())),
    }


def _placed(rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Lay the panels out, row by row and from left to right."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, wanted in rows.items():
        place = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
        panels.append({"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": place})
        top += 1
        left = height = 0
        for panel in wanted:
            width = panel.get("width", PANEL_COLUMNS)
            if left + width > COLUMNS:
                left, top = 0, top + height
            height = SMALL if width == SMALL else TALL
            panels.append(_panel(panel) | {"gridPos": {"x": left, "y": top, "w": width, "h": height}})
            left += width
        top += height
    return [{"id": number, **panel} for number, panel in enumerate(panels, 1)]


def _panel(panel: dict[str, Any]) -> dict[str, Any]:
    kind = panel.get("kind", "timeseries")
    defaults: dict[str, Any] = {"unit": panel.get("unit", "short"), "min": 0}
    if "good" in panel:
        below, above = COLOURS[panel["good"]]
        steps = [{"color": below, "value": None}, {"color": above, "value": 1}]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    if kind == "timeseries":
        stacking = {"mode": "normal" if panel.get("stacked") else "none"}
        defaults["custom"] = {"fillOpacity": 10, "showPoints": "never", "stacking": stacking}
    return {
        "type": kind,
        "title": panel["title"],
        "description": panel.get("text", ""),
        "datasource": SOURCE,
        "targets": [_target(*query) for query in zip("ABCDEF", panel["queries"].items(), strict=False)],
        "fieldConfig": {"defaults": defaults, "overrides": []},
    }


def _target(letter: str, query: tuple[str, str]) -> dict[str, Any]:
    legend, expression = query
    expression = expression.replace("{$", SELECTOR).replace("[$]", "[$__rate_interval]")
    return {"refId": letter, "expr": expression, "legendFormat": legend, "datasource": SOURCE}


def _variables() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"name": "datasource", "type": "datasource", "query": "prometheus"}]
    for name, where in (("namespace", ""), ("service", '{namespace="$namespace"}')):
        query = f"label_values(lora_sidecar_build_info{where}, {name})"
        found.append({"name": name, "type": "query", "datasource": SOURCE, "query": query, "refresh": 2, "sort": 1})
    return found


def main() -> int:
    text = json.dumps(dashboard(), indent=1) + "\n"
    if "--check" in sys.argv[1:]:
        if FILE.read_text() == text:
            return 0
        print(f"{FILE} is not what dashboard.yaml says; run python deploy/helm/{Path(__file__).name}")
        return 1
    FILE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
