"""LoraAdapters that the definition must take and must refuse, by its schema and its CEL rules."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.helm.installed import CHART, HelmInstalled

ADMISSION = Path(__file__).parent / "admission.py"
TIMEOUT_S = 120.0
DIGEST = "ab" * 32

TAKEN: list[dict[str, Any]] = [
    {"source": "s3://loras/sql"},
    {"source": "/mnt/loras/sql", "name": "team/sql.v2"},
    {"source": "hf://org/repo", "digest": DIGEST, "tenants": ["a", "b"], "pinned": True, "rev": "7"},
    {"source": "https://host/x.tgz", "digest": f"sha256:{DIGEST}", "removal": {"graceSeconds": 0}},
    {"source": "gs://b/a", "prefetch": {"backends": []}},
    {"source": "az://b/a", "prefetch": {"backends": ["gpu-0"]}, "removal": {}},
    {"source": "/l/a..b", "name": "a..b"},
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "'source' is a required property"),
    ({"source": ""}, "source"),
    ({"source": "loras/sql"}, "it must be an absolute path, or a URL"),
    ({"source": "ftp://host/sql"}, "it must be an absolute path, or a URL"),
    ({"source": "s3://"}, "it must be an absolute path, or a URL"),
    ({"source": "https://me:secret@host/sql"}, "no credentials belong in a URL"),
    ({"source": "/l", "name": "base"}, "it stands for the base model"),
    ({"source": "/l", "name": "1234"}, "reads as a task id"),
    ({"source": "/l", "name": "-sql"}, "does not match"),
    ({"source": "/l", "name": "a//b"}, "no part between slashes"),
    ({"source": "/l", "name": "a/../b"}, "no part between slashes"),
    ({"source": "/l", "name": "a/"}, "no part between slashes"),
    ({"source": "/l", "name": "a" * 129}, "too long"),
    ({"source": "/l", "digest": "sha256:12"}, "does not match"),
    ({"source": "/l", "digest": DIGEST.upper()}, "does not match"),
    ({"source": "/l", "tenants": "acme"}, "is not of type 'array'"),
    ({"source": "/l", "tenants": [""]}, "tenants"),
    ({"source": "/l", "pinned": "yes"}, "is not of type 'boolean'"),
    ({"source": "/l", "removal": {"graceSeconds": -1}}, "less than the minimum"),
    ({"source": "/l", "rev": 7}, "is not of type 'string'"),
]
NAMED, UNNAMED = {"source": "/l", "name": "sql"}, {"source": "/l"}


@pytest.fixture(scope="module")
def crd() -> dict[str, Any]:
    """The definition."""
    found: dict[str, Any] = yaml.safe_load((CHART / "crds" / "loraadapters.yaml").read_text())
    return found


def judged(
    tools: HelmInstalled, crd: dict[str, Any], pairs: list[tuple[dict[str, Any], dict[str, Any] | None]]
) -> list[list[str]]:
    """Return the errors of each pair of a new and an old spec."""
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    whole = [[{"spec": new}, None if old is None else {"spec": old}] for new, old in pairs]
    done = subprocess.run(
        [tools.python, str(ADMISSION)], input=json.dumps({"schema": schema, "pairs": whole}),
        capture_output=True, text=True, timeout=TIMEOUT_S, env=tools.environment(), check=True,
    )  # fmt: skip
    found: list[list[str]] = json.loads(done.stdout)
    return found


def test_taken(tools: HelmInstalled, crd: dict[str, Any]) -> None:
    """What is right is taken, new and unchanged."""
    pairs = [(spec, old) for spec in TAKEN for old in (None, spec)]
    assert judged(tools, crd, pairs) == [[] for _ in pairs]


def test_refused(tools: HelmInstalled, crd: dict[str, Any]) -> None:
    """What is wrong is refused for what is wrong with it."""
    for (spec, said), found in zip(REFUSED, judged(tools, crd, [(spec, None) for spec, _ in REFUSED]), strict=True):
        assert any(said in error for error in found), f"{spec}: {found}"


def test_a_name_stays(tools: HelmInstalled, crd: dict[str, Any]) -> None:
    """A name is neither changed, added nor taken out; all else may be changed."""
    other = {**NAMED, "name": "other"}
    changes = [(other, NAMED), (NAMED, UNNAMED), (UNNAMED, NAMED)]
    assert all("a name cannot be changed" in found[0] for found in judged(tools, crd, changes))
    assert judged(tools, crd, [({**NAMED, "source": "/m", "rev": "2"}, NAMED)]) == [[]]


def test_columns(crd: dict[str, Any]) -> None:
    """`kubectl get lora` shows what an operator asks for, out of fields that there are."""
    version = crd["spec"]["versions"][0]
    columns = {column["name"]: column["jsonPath"] for column in version["additionalPrinterColumns"]}
    assert [*columns][:5] == ["Desired", "Ready", "Phase", "Version", "Resident"]
    schema = version["schema"]["openAPIV3Schema"]
    for path in columns.values():
        _, section, key = path.split(".")
        assert section == "metadata" or key in schema["properties"][section]["properties"], path
    assert version["subresources"] == {"status": {}}
    assert crd["spec"]["names"]["shortNames"] == ["lora"]
