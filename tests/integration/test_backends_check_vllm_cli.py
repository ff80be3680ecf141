"""`sidecar backends check vllm://…`, `config check`, `serve` and `backends list` with vLLMs, as commands."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from sidecar.config import parse
from sidecar.serve.app import Sidecar
from tests.integration.test_backends_check_cli import sidecar
from tests.kit.forked import python
from tests.kit.looking import EmulatedVllm, vllm_and_target
from tests.kit.ports import free_port
from tests.kit.serving import PATIENCE_S, until, write_adapters
from tests.kit.vllm_emulated import BASE, Client, VllmProcess

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 160,
}
"""The config.json of the emulated engines' shape `tiny`."""
FREE = {"address": "127.0.0.1:0"}
SIZES = {"device_pages": 2, "host_pages": 4, "seats": 60}


async def test_the_command_line(tmp_path: Path) -> None:
    """A line a check and JSON for scripts; what is meant for Triton is refused by name."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY))
    async with vllm_and_target(tmp_path) as engine:
        url = f"vllm://{engine.target.address}"
        options = ("--adapters-dir", str(engine.shared), "--base", str(config))
        code, out, err = await sidecar("backends", "check", url, *options)
        assert (code, err) == (0, "")
        assert "✓ reachable       vLLM 0.32.0" in out
        assert "✓ adapter         staged, loaded in" in out
        assert out.rstrip().endswith(": 4 warnings, 12 ok")
        code, out, _ = await sidecar(
            "backends", "check", url, "--adapters-dir", f"{engine.shared}:/elsewhere", "--json"
        )
        record = json.loads(out)
        assert (code, record["result"]) == (0, "warning")
        assert record["findings"][-5]["state"] == "warning"
        code, _, err = await sidecar("backends", "check", url, "--model", "tensorrt_llm_2")
        assert code == 2
        assert "model is for triton:// backends only" in err
        code, _, err = await sidecar("backends", "check", url, "--api-key-file", str(tmp_path / "none"))
        assert code == 2
        assert f"api_key_file {tmp_path / 'none'}: No such file" in err
        assert await engine.is_as_before()


async def test_a_check_that_is_told_to_end(tmp_path: Path) -> None:
    """SIGTERM while the adapter's answer is waited for: the name and the files are taken away first."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY))
    shared = tmp_path / "shared"
    shared.mkdir()
    async with VllmProcess("--compute", "none", "--freeze-after", "2") as engine, Client(engine.http_address) as client:
        process = await python(
            "-m", "sidecar", "backends", "check", f"vllm://{engine.http_address}", "--adapters-dir",
            str(shared), "--base", str(config), stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        while len(await client.models()) < 2:
            assert process.returncode is None
        process.send_signal(signal.SIGTERM)
        _, err = await process.communicate()
        assert (process.returncode, err.decode()) == (130, "error: interrupted before all checks were done\n")
        assert set(await client.models()) == {BASE}
        assert list(shared.iterdir()) == []


async def test_config_check(tmp_path: Path) -> None:
    """It says what a vLLM needs and is not given; with --connect the engines of both kinds are looked at."""
    async with vllm_and_target(tmp_path) as engine:
        file = tmp_path / "sidecar.yaml"
        known = f"adapters_dir: {engine.shared}, engine: {{device_pages: 2, host_pages: 4, seats: 64, rank_max: 16}}"
        file.write_text(
            f"backends:\n- {{url: 'vllm://{engine.target.address}', id: good, base_model: {BASE}, {known}}}\n"
            f"- {{url: 'vllms://127.0.0.1:{free_port()}', id: bare}}\n"
            f"- {{url: 'triton://127.0.0.1:{free_port()}', id: dead}}\n"
        )
        code, out, err = await sidecar("config", "check", str(file))
        assert (code, err) == (0, "")
        notes = [line for line in out.splitlines() if line.startswith(("# bare: ", "# good: "))]
        assert [note for note in notes if "pace" not in note and note.startswith("# good")] == []
        for key in ("adapters_dir", "device_pages", "host_pages", "seats", "rank_max"):
            assert any(note.startswith("# bare: ") and key in note for note in notes), key
        code, out, _ = await sidecar("config", "check", str(file), "--connect", "--json")
        results = {backend["backend"]: backend["result"] for backend in json.loads(out)["backends"]}
        # The good one lacks its base model's config.
        assert (code, results) == (1, {"good": "warning", "bare": "failed", "dead": "failed"})
        file.write_text(f"backends:\n- {{url: 'vllm://{engine.target.address}', api_key_file: {tmp_path / 'none'}}}\n")
        code, _, err = await sidecar("config", "check", str(file))
        assert code == 2
        assert "backends.0.api_key_file: there is no file" in err


async def test_serve_by_options(tmp_path: Path) -> None:
    """`serve --backend vllm://… --adapters-dir …` needs no configuration file."""
    (name,) = write_adapters(tmp_path / "loras", 1)
    async with vllm_and_target(tmp_path) as engine:
        options = ("--backend", f"vllm://{engine.target.address}", "--adapters-dir", str(engine.shared), "--json")
        ports = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--http", "127.0.0.1:0")
        process = await python(
            "-m", "sidecar", "serve", *options, *ports, "--adapters", str(tmp_path / "loras"),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            ready = json.loads(await process.stdout.readline())
            assert (ready["backends"], ready["adapters"]) == (1, 1)
            admin = ("--admin", ready["admin"])
            async with asyncio.timeout(PATIENCE_S):
                while (await sidecar("backends", "check", *admin))[0]:
                    assert process.returncode is None
            code, out, err = await sidecar("generate", name, "hello", "--max-tokens", "3", "--server", ready["data"])
            assert (code, err) == (0, ""), out
            assert [each for each in await engine.client.models() if each.startswith(f"{name}@")]
        finally:
            process.send_signal(signal.SIGTERM)
            await process.communicate()
        assert set(await engine.client.models()) == {BASE}
        assert [path.name for path in engine.shared.iterdir()] == [".lora-sidecar"]
    code, _, err = await sidecar("serve", "--adapters-dir", "/x")
    assert code == 2
    assert "--adapters-dir goes with --backend" in err


async def test_backends_list_and_show(tmp_path: Path) -> None:
    """Pages are adapters there, and are called so; the address is the URL that it is configured by."""
    write_adapters(tmp_path / "loras", 2)
    async with vllm_and_target(tmp_path) as engine, serving_before(engine, tmp_path / "loras") as served:
        code, out, _ = await sidecar("backends", "list", "--admin", served.admin_address)
        assert code == 0
        assert out.splitlines()[1].split()[:5] == ["vllm-0", "up", "0/66", "0", "0/2"]
        _, out, _ = await sidecar("backends", "show", "vllm-0", "--admin", served.admin_address)
        assert ["address", f"vllm://{engine.target.address}"] in [line.split() for line in out.splitlines()]
        assert "the engine keeps 4 in memory (max_cpu_loras) and has 2 slots (max_loras)" in out


async def test_how_many_adapters_an_engine_keeps_is_assumed_until_it_is_declared(tmp_path: Path) -> None:
    """It tells nobody. Here it keeps more than the two that a vLLM with two slots keeps unless it is told otherwise."""
    write_adapters(tmp_path / "loras", 1)
    sizes = {"device_pages": 2, "seats": 60}
    async with (
        vllm_and_target(tmp_path) as engine,
        serving_before(engine, tmp_path / "loras", sizes) as served,
        httpx.AsyncClient(base_url=f"http://{served.http_address}", trust_env=False) as http,
    ):
        _, out, _ = await sidecar("backends", "show", "vllm-0", "--admin", served.admin_address)
        told = "keeps 2 (assumed; declare backends[].engine.host_pages) in memory (max_cpu_loras) and has 2 slots"
        assert told in " ".join(out.split())
        metrics = (await http.get("/metrics/model-server")).text
        assert "vllm:num_gpu_loaded_lora_adapters{" in metrics
        assert "vllm:num_cpu_loaded_lora_adapters{" not in metrics


@asynccontextmanager
async def serving_before(
    engine: EmulatedVllm, adapters: Path, sizes: Mapping[str, int] = SIZES
) -> AsyncIterator[Sidecar]:
    """Run a sidecar in front of an emulated vLLM, and wait until that is up."""
    backend = {
        "url": f"vllm://{engine.target.address}",
        "id": "vllm-0",
        "adapters_dir": str(engine.shared),
        "engine": dict(sizes),
    }
    record = {
        "backends": [backend],
        "listeners": {"data": FREE, "admin": FREE, "http": FREE},
        "adapters": {"serve": str(adapters)},
    }
    served = await Sidecar.start(parse(record, "the test"))
    try:
        await until(lambda: all(each.takes_requests for each in served.gateway.state.backends.values()))
        yield served
    finally:
        await served.stop()
