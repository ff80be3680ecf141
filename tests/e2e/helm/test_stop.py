"""The end of a pod with an engine and a sidecar, as the kubelet does it, while requests run: none fails."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest
import yaml

from tests.e2e.helm.rendering import Renderer, configuration, one
from tests.kit.emulated import EngineProcess
from tests.kit.peft_files import write_adapter
from tests.kit.serving import PATIENCE_S, serving

REQUESTS, TOKENS = 6, 200
SLOWNESS = 2.0
"""Of the engine: an answer takes longer than the wait before the drain, and not as long as a real one."""
FREE = {"address": "127.0.0.1:0"}


@pytest.fixture(params=["curl", "python3"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A PATH with what an engine's image has: one of the two ways to ask."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sh", "sleep", request.param):
        found = shutil.which(name, path=os.defpath)
        if found is None:
            pytest.skip(f"no {name} here")
        (programs / name).symlink_to(found)
    return str(programs)


async def test_engine_first_sidecar_last(newest: Renderer, tmp_path: Path, path: str) -> None:
    """The engine's preStop returns when the sidecar is empty; then the engine ends, then the sidecar."""
    values = {"mode": "sidecar", "preStopSeconds": 1, "sidecar": {"engine": {"enabled": True, "image": "triton"}}}
    objects = newest.objects(values)
    drain = yaml.safe_load(configuration(objects))["listeners"]["drain"]["address"]
    engine_container = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    shell, *options, script = engine_container["lifecycle"]["preStop"]["exec"]["command"]
    assert drain in script

    write_adapter(tmp_path / "loras" / "sql")
    listeners = {"data": FREE, "admin": FREE, "http": FREE, "drain": FREE}
    async with (
        EngineProcess("--compute", "none", time_scale=SLOWNESS) as engine,
        serving([engine], tmp_path / "loras", listeners=listeners) as pod,
    ):
        running = [asyncio.create_task(pod.ask("sql", tokens=TOKENS)) for _ in range(REQUESTS)]
        while len(pod.state.requests) < REQUESTS:
            await asyncio.sleep(0.01)
        here = script.replace(drain, pod.sidecar.listening.drain)
        stopping = await asyncio.create_subprocess_exec(shell, *options, here, env={"PATH": path})
        async with asyncio.timeout(PATIENCE_S):
            assert await stopping.wait() == 0
        assert not pod.state.requests
        await engine.kill()
        answers = await asyncio.gather(*running)
    assert [answer.tokens for answer in answers] == [answers[0].tokens] * REQUESTS
    assert len(answers[0].tokens) == TOKENS
