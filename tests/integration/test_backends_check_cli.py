"""`sidecar backends check URL` and `config check --connect` as commands."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from sidecar.backends.checks.finding import Target
from tests.kit.emulated import running_engine
from tests.kit.forked import python
from tests.kit.looking import engine_and_target
from tests.kit.ports import free_port
from tests.kit.serving import write_adapters


async def test_the_command_line(tmp_path: Path) -> None:
    """A line a check, a summary, JSON for scripts; 1 only when something fails, 2 for what is not to be checked."""
    async with engine_and_target(tmp_path) as (engine, target):
        url, config = f"triton://{engine.grpc_address}", str(tmp_path / "engine.json")
        code, out, err = await sidecar("backends", "check", url, "--engine-config", config)
        assert (code, err) == (0, "")
        assert "✓ reachable" in out
        assert "! metrics" in out
        assert out.rstrip().endswith(f"{engine.grpc_address}: 1 warning, 19 ok")
        options = ("--metrics", str(target.metrics_url), "--dtype", "bfloat16", "--json")
        code, out, _ = await sidecar("backends", "check", engine.grpc_address, "--engine-config", config, *options)
        record = json.loads(out)
        assert (code, record["result"]) == (1, "failed")
        assert [each["check"] for each in record["findings"] if each["state"] != "ok"] == ["dtype"]
        assert len(record["findings"][5]["fix"]) == 2
        code, _, err = await sidecar("backends", "check", "http://127.0.0.1:8000")
        assert code == 2
        assert "triton://HOST:PORT" in err
        code, _, err = await sidecar("backends", "check", "gpu-9")
        assert code == 2
        assert '"gpu-9" is no URL' in err
        assert "--config FILE" in err


async def test_a_configured_backend_by_its_id(tmp_path: Path) -> None:
    """All that the configuration says of it counts: model, metrics, engine, the store's size, the served adapters."""
    write_adapters(tmp_path / "loras", 3)
    (tmp_path / "loras" / "broken").mkdir()
    (tmp_path / "loras" / "broken" / "adapter_config.json").write_text("{")
    async with engine_and_target(tmp_path) as (_, target):
        file = configuration(
            tmp_path, target, f"adapters: {{serve: {tmp_path / 'loras'}}}\nstore: {{memory_bytes: 99}}\n"
        )
        code, out, err = await sidecar("backends", "check", "good", "--config", str(file))
        assert code == 0
        assert "the 3 served adapters take 3: all fit" in out
        assert "store.memory_bytes is 9.22e-08 GiB" in out
        assert "not counted: " in err
        code, _, err = await sidecar("backends", "check", "nobody", "--config", str(file))
        assert code == 2
        assert 'has no backend "nobody"; it has good, typo, dead' in err


@pytest.mark.parametrize("with_config", [True, False])
async def test_the_configuration_that_an_emulated_engine_writes(with_config: bool, tmp_path: Path) -> None:
    """It has what the engine does not publish, adapter pages above all, and every check of it passes."""
    file, config = tmp_path / "pool.yaml", {"write_engine_config": tmp_path / "engine.json"} if with_config else {}
    async with running_engine(
        compute="none", metrics_port=0, lora_device_pages=30, lora_host_pages=70, write_config=file, **config
    ) as engine:
        code, out, err = await sidecar("backends", "check", engine.grpc_address, "--config", str(file), "--json")
        assert code == 0, out + err
        shown = await sidecar("config", "check", str(file), "--json")
        (declared,) = json.loads(shown[1])["backends"]
        assert (declared["engine"]["device_pages"], declared["engine"]["host_pages"]) == (30, 70)
        assert declared["metrics"] == f"http://{engine.metrics_address}/metrics"


async def test_config_check_connects_to_all(tmp_path: Path) -> None:
    """What is wrong at each backend, then a line for each; without --connect nobody is asked."""
    async with engine_and_target(tmp_path) as (_, target):
        file = configuration(tmp_path, target)
        code, out, _ = await sidecar("config", "check", str(file), "--connect")
        assert code == 1
        assert "typo, triton://" in out
        table = out[out.index("BACKEND") :].splitlines()[1:]
        assert [line.split()[:3] for line in table] == [
            ["good", "✓", "ok"],
            ["typo", "✗", "failed"],
            ["dead", "✗", "failed"],
        ]
        code, out, _ = await sidecar("config", "check", str(file), "--connect", "--json")
        results = {backend["backend"]: backend["result"] for backend in json.loads(out)["backends"]}
        assert (code, results) == (1, {"good": "ok", "typo": "failed", "dead": "failed"})
        assert (await sidecar("config", "check", str(file)))[0] == 0


def configuration(folder: Path, target: Target, more: str = "") -> Path:
    """Write a configuration with one engine that serves, one whose model is misspelt, and one that is not there."""
    known = f"metrics: '{target.metrics_url}', engine: {{config: {folder / 'engine.json'}}}"
    file = folder / "sidecar.yaml"
    file.write_text(
        f"backends:\n- {{url: 'triton://{target.address}', id: good, {known}}}\n"
        f"- {{url: 'triton://{target.address}', id: typo, model: tensorrtllm, {known}}}\n"
        f"- {{url: 'triton://127.0.0.1:{free_port()}', id: dead}}\n{more}"
    )
    return file


async def sidecar(*arguments: str) -> tuple[int, str, str]:
    """Run a command in a process of its own; return its exit code and what it printed."""
    process = await python("-m", "sidecar", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def test_config_check_connects_to_the_engines_of_a_pool(tmp_path: Path) -> None:
    """Each that is found is looked at by itself; a pool without any is told."""
    async with engine_and_target(tmp_path) as (engine, target):
        port = engine.grpc_address.rpartition(":")[2]
        file = tmp_path / "pool.yaml"
        entry = (
            "- {id: %s, kind: triton, discover: {dns: '%s'}, "
            f"metrics: '{str(target.metrics_url).replace('127.0.0.1', '{host}')}', "
            f"engine: {{config: {tmp_path / 'engine.json'}}}}}\n"
        )
        file.write_text("backends:\n" + entry % ("gpu", f"localhost:{port}"))
        code, out, _ = await sidecar("config", "check", str(file), "--connect", "--json")
        (report,) = json.loads(out)["backends"]
        assert (code, report["backend"], report["url"]) == (0, "gpu-127.0.0.1", f"triton://{engine.grpc_address}")
        code, _, err = await sidecar("backends", "check", "gpu", "--config", str(file))
        assert code == 2
        assert "gpu is a pool" in err
        file.write_text("backends:\n" + entry % ("none", f"no-such-host.invalid:{port}"))
        code, out, _ = await sidecar("config", "check", str(file), "--connect")
        assert code == 1
        assert "no engine was found by no-such-host.invalid" in out
