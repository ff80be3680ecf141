"""Write the chart's Grafana dashboards from their panels; with `--check` it only exits 1 if that would change one."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
FILES = HERE / "lora-sidecar" / "files"
SELECTOR = '{namespace="$namespace",service="$service"'
OF_TENANTS = f'{SELECTOR},tenant=~"$tenant"'
COLUMNS, PANEL_COLUMNS = 24, 8
SMALL, TALL = 4, 8
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLOURS = {"zero": ("green", "red"), "above zero": ("red", "green")}
"""Below 1, and from 1 on."""


@dataclass(frozen=True)
class Board:
    """One dashboard. `name` is that of its files; with `by_tenant` one can choose tenants on it."""

    name: str
    title: str
    uid: str
    by_tenant: bool = False

    @property
    def panels(self) -> Path:
        return HERE / f"{self.name}.yaml"

    @property
    def file(self) -> Path:
        return FILES / f"{self.name}.json"


BOARDS = (
    Board("dashboard", "LoRA sidecar", "lora-sidecar"),
    Board("dashboard-tenants", "LoRA sidecar: tenants", "lora-sidecar-tenants", by_tenant=True),
)


def dashboard(board: Board) -> dict[str, Any]:
    """Return a dashboard as Grafana imports it."""
    return {
        "title": board.title,
        "uid": board.uid,
        "tags": ["lora-sidecar"],
        "schemaVersion": 39,
        "version": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables(board)},
        "panels": _placed(yaml.safe_load(board.panels.read_text())),
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
    expression = expression.replace("{$t", OF_TENANTS).replace("{$", SELECTOR).replace("[$]", "[$__rate_interval]")
    return {"refId": letter, "expr": expression, "legendFormat": legend, "datasource": SOURCE}


def _variables(board: Board) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"name": "datasource", "type": "datasource", "query": "prometheus"}]
    for name, where in (("namespace", ""), ("service", '{namespace="$namespace"}')):
        query = f"label_values(lora_sidecar_build_info{where}, {name})"
        found.append({"name": name, "type": "query", "datasource": SOURCE, "query": query, "refresh": 2, "sort": 1})
    if board.by_tenant:
        query = f"label_values(lora_sidecar_tenant_requests_total{SELECTOR}}}, tenant)"
        several = {"multi": True, "includeAll": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}}
        found.append({**found[-1], "name": "tenant", "query": query} | several)
    return found


def main() -> int:
    texts = {board: json.dumps(dashboard(board), indent=1) + "\n" for board in BOARDS}
    if "--check" not in sys.argv[1:]:
        for board, text in texts.items():
            board.file.write_text(text)
        return 0
    wrong = [board for board, text in texts.items() if not board.file.exists() or board.file.read_text() != text]
    for board in wrong:
        print(f"{board.file} is not what {board.panels.name} says; run python deploy/helm/{Path(__file__).name}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
