"""What the image is made of: locked versions, a pinned base, and only what belongs into it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from deploy import try_dockerfile

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PIN = re.compile(r"^([a-z0-9-]+)==(\S+)", re.MULTILINE)


def test_origins_are_locked_with_the_same_versions() -> None:
    """The stores' libraries come on top of the lock file: nothing that this has is there in another version."""
    locked = dict(PIN.findall((ROOT / "requirements.lock").read_text()))
    with_origins = dict(PIN.findall((DEPLOY / "requirements-origins.lock").read_text()))
    assert {name: with_origins.get(name) for name in locked} == locked
    assert {"s3fs", "gcsfs", "adlfs", "huggingface-hub"} <= with_origins.keys()


def test_the_base_is_named_by_its_digest() -> None:
    """Every stage is made from a digest, which the one who builds must give."""
    text = (DEPLOY / "Dockerfile").read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert bases
    assert all(base.endswith("@${PYTHON_DIGEST}") for base in bases)
    assert re.search(r"^ARG PYTHON_DIGEST$", text, re.MULTILINE)


def test_the_user_is_the_charts() -> None:
    """Image and chart run it as the same user, who may write to the data directory."""
    user = yaml.safe_load((DEPLOY / "helm/lora-sidecar/values.yaml").read_text())["podSecurity"]
    text = (DEPLOY / "Dockerfile").read_text()
    assert f"USER {user['user']}:{user['group']}\n" in text
    assert f"--owner {user['user']} --group {user['group']} /var/lib/lora-sidecar" in text


def test_it_listens_where_the_network_comes_in() -> None:
    """A container's loopback is its own, so the command says another address for each port that clients reach."""
    [command] = re.findall(r"^CMD (\[.*\])$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    listens = {"--listen": "0.0.0.0:9000", "--http": "0.0.0.0:9002", "--probes": "0.0.0.0:9005"}
    assert json.loads(command) == ["serve", *(part for pair in listens.items() for part in pair)]


@pytest.mark.parametrize(
    ("path", "out"),
    [
        ("sidecar/app.py", False),
        ("policies/eviction/lru.py", False),
        ("requirements.lock", False),
        ("deploy/requirements-origins.lock", False),
        ("deploy/Dockerfile", True),
        ("tests/unit/test_metrics.py", True),
        ("sidecar/core/__pycache__/core.cpython-311.pyc", True),
        (".git/config", True),
    ],
)
def test_context(path: str, out: bool) -> None:
    """The builder is sent what the image is made of, and nothing else."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert try_dockerfile.ignored(path, patterns) is out


def test_instructions() -> None:
    """Continued lines are one instruction, comments none."""
    text = "# a\nRUN one && \\\n    two\n\nENV A=1 B=2\n"
    assert try_dockerfile.instructions(text) == [("RUN", "one && two"), ("ENV", "A=1 B=2")]
