"""Files that are made from others are as these say now."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sidecar.config.reloading import RELOADABLE

HELM = Path(__file__).parents[2] / "deploy" / "helm"
TIMEOUT_S = 120.0


@pytest.mark.parametrize("maker", ["make_schema.py", "make_dashboard.py"])
def test_is_up_to_date(maker: str) -> None:
    """Whoever changes the configuration's keys or the panels is told to run the maker."""
    command = [sys.executable, str(HELM / maker), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["dashboard", "dashboard-tenants"])
def test_panels_do_not_overlap(name: str) -> None:
    """Every panel has a place of its own and something to show."""
    panels = json.loads((HELM / f"lora-sidecar/files/{name}.json").read_text())["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or panel["targets"], panel["title"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_pods_restart_for_what_a_running_process_does_not_take() -> None:
    """The chart's list of keys that it does take is the product's."""
    text = (HELM / "lora-sidecar" / "templates" / "_config.tpl").read_text()
    listed = text.partition('{{- define "lora-sidecar.reloadable" -}}')[2].partition("{{- end }}")[0]
    assert tuple(yaml.safe_load(listed)) == RELOADABLE
