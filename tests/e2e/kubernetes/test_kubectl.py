"""What an operator sees of declared adapters with kubectl, in a namespace of a real API server."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.e2e.helm.installed import HelmInstalled
from tests.e2e.installed import needed
from tests.kit.kubernetes_cluster import REAL, on_a_real_cluster
from tests.kit.kubernetes_house import LORAS, house


async def kubectl(namespace: str, *arguments: str) -> str:
    """Run kubectl as the administrator; return what it printed."""
    command = ("kubectl", f"--kubeconfig={REAL}", f"--namespace={namespace}", *arguments)
    done = await asyncio.to_thread(needed(HelmInstalled).run, *command)
    assert done.returncode == 0, done.stderr
    return done.stdout


@on_a_real_cluster
async def test_events_are_seen(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event says Registered, one says why it Failed, one says Removed; each at the object that it is about."""
    async with house(kind, tmp_path, monkeypatch) as here:
        await here.home.declare("sql", here.write("sql", 1), removal={"graceSeconds": 0})
        await here.home.declare("absent", here.folder / "absent")
        await here.reaches("sql", "Ready")
        await here.reaches("absent", "Failed")
        entries = [{"name": "more", "source": str(here.write("more", 2)), "removalGraceSeconds": 0}]
        await here.home.declare_in_map("loras", entries)
        await here.home.tells("Registered", "Registered", "OriginUnreadable")
        await here.home.delete(LORAS, "sql")
        await here.home.patch("configmaps", "loras", {"data": {"adapters.yaml": "[]"}})
        await here.home.tells("Registered", "Registered", "OriginUnreadable", "Removed", "Removed")
        found = json.loads(await kubectl(here.home.namespace, "get", "events", "--output=json"))["items"]
        about = [(each["involvedObject"]["kind"], each["involvedObject"]["name"]) for each in found]
        said = [(each["type"], each["action"], each["reason"]) for each in found]
        told = sorted(one + other for one, other in zip(about, said, strict=True))
        assert told == [
            ("ConfigMap", "loras", "Normal", "Ready", "Registered"),
            ("ConfigMap", "loras", "Normal", "Removing", "Removed"),
            ("LoraAdapter", "absent", "Warning", "Failed", "OriginUnreadable"),
            ("LoraAdapter", "sql", "Normal", "Ready", "Registered"),
            ("LoraAdapter", "sql", "Normal", "Removing", "Removed"),
        ]
        text = await kubectl(here.home.namespace, "events", "--for=LoraAdapter/sql")
        assert "sql stands for v1" in text
        assert "sql is forgotten" in text
        assert "absent" in await kubectl(here.home.namespace, "events", "--types=Warning")


@on_a_real_cluster
async def test_columns_are_seen(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`kubectl get lora` shows phase and version, by the short name too."""
    async with house(kind, tmp_path, monkeypatch) as here:
        await here.home.declare("sql", here.write("sql", 1))
        await here.reaches("sql", "Ready", desired=1, ready=1)
        head, line = (await kubectl(here.home.namespace, "get", "lora")).splitlines()
        assert head.split()[:5] == ["NAME", "DESIRED", "READY", "PHASE", "VERSION"]
        assert line.split()[:5] == ["sql", "1", "1", "Ready", "v1"]
