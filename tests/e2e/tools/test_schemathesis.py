"""schemathesis, as it is, by the description that the sidecar gives of its own HTTP API."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.tools.house import KINDS
from tests.e2e.tools.house import house as house_of
from tests.e2e.tools.installed import Short, Tools

TOOLS = Short
SETTINGS = '[parameters]\n"path.model" = "a00"\n"body.model" = "a00"\n'
SHORT = {"time_scale": 0.0, "max_seq_tokens": 256, "max_input_tokens": 128}
"""Engines whose answers end soon where a request names no length."""


@pytest.mark.parametrize("kind", KINDS)
async def test_every_answer_is_as_described(tools: Tools, tmp_path: Path, kind: str) -> None:
    """Hundreds of calls, right and wrong: no server error, no undescribed status or body, nothing wrong is taken.

    A description can't say all that engines refuse, such as a prompt that is too long.
    """
    (tmp_path / "schemathesis.toml").write_text(SETTINGS)
    async with house_of(tmp_path / "house", kind, adapters=1, **SHORT) as house:
        await tools.run(
            tmp_path, "schemathesis", "run", f"{house.url}/openapi.json", "--max-examples=15", "--seed=1",
            "--exclude-checks=positive_data_acceptance", "--report-json-path=report.json", "--no-color",
        )  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["complete"]
    assert (report["failures"], report["errors"]) == ([], [])
    assert report["operations"]["tested"] == report["operations"]["total"]
    assert report["test_cases"]["generated"] > 200
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert sum(rate["accepted"] for rate in report["valid_rates"][f"POST {path}"].values()) > 0
