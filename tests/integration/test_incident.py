"""An incident of a serving process: captured while it runs and after it was killed, then replayed and explained."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from tests.integration.test_process import ask, sidecar
from tests.kit.emulated import running_engine
from tests.kit.forked import python
from tests.kit.peft_files import write_adapter
from tests.kit.serving import serving, until, write_adapters
from tests.unit.test_capture import members_of


async def command(*arguments: str) -> Any:
    """Run a command of the product in a process of its own, which must end with 0; return the JSON it prints."""
    process = await python(
        "-m", "sidecar", *arguments, "--json",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, error = await process.communicate()
    assert process.returncode == 0, (out + error).decode()
    return json.loads(out)


async def test_an_incident_of_a_running_sidecar(tmp_path: Path) -> None:
    """Captured under load, it holds metrics and journal, replays to the same decisions, and explains what clients were
    told: each request's wait is the queue time that its answer had, by reasons that add up to it.
    """
    names = write_adapters(tmp_path / "adapters", 6)
    out = tmp_path / "incident.tgz"
    async with (
        running_engine(compute="none", shape="tiny", lora_host_pages=2, lora_device_pages=2) as engine,
        serving([engine], tmp_path / "adapters", data_directory=str(tmp_path / "data")) as served,
    ):
        answers = await asyncio.gather(*(served.ask(names[number % 6], 4) for number in range(60)))
        await until(lambda: not served.state.requests)  # a client has its answer before the core has its ending
        assert served.sidecar._journal is not None
        await asyncio.to_thread(served.sidecar._journal.flush)
        running = asyncio.create_task(served.ask(names[0], 4))
        http = served.sidecar.http_address
        manifest = await command(
            "debug", "capture", "--data-directory", str(tmp_path / "data"), "--http", http, "-o", str(out)
        )  # fmt: skip
        await running
    held = members_of(out)
    assert b"lora_sidecar_requests_total" in held["metrics.txt"]
    assert held["readiness.txt"] == b"ok\n"
    assert [item["what"] for item in manifest["missing"]] == ["config"]
    assert (await command("replay", str(out)))["same"] is True
    origins = {answer.origins[0].request_id: answer.origins[0] for answer in answers}
    for request in sorted(origins, key=lambda request: -origins[request].queue_ms)[:3]:
        told = await command("replay", str(out), "--explain", request)
        assert (told["outcome"], told["client_id"]) == ("ok", request)
        assert round(told["waited_ns"] / 1e6, 3) == round(origins[request].queue_ms, 3)
        assert sum(told["reasons_ns"].values()) == told["waited_ns"] > 0
        assert told["output_tokens"] == 4


async def test_an_incident_of_a_killed_sidecar(tmp_path: Path) -> None:
    """After kill -9 the journal, the configuration and the reason why there are no metrics are captured."""
    write_adapter(tmp_path / "loras" / "sql")
    config, out = tmp_path / "config.yaml", tmp_path / "incident.tgz"
    async with running_engine(compute="none") as engine:
        record = {
            "backends": [{"url": f"triton://{engine.grpc_address}", "metrics": "http://me:SECRET@localhost:1/metrics"}],
            "adapters": {"serve": str(tmp_path / "loras")},
            "data_directory": str(tmp_path / "data"),
        }
        config.write_text(json.dumps(record))  # which is YAML too
        async with sidecar("--config", str(config)) as served:
            for _ in range(3):
                await ask(served.data, "sql", 2)
            served.process.kill()
            await served.process.wait()
    manifest = await command(
        "debug", "capture", "--config", str(config), "--http", "127.0.0.1:1", "-o", str(out)
    )  # fmt: skip
    held = members_of(out)
    assert b"SECRET" not in b"".join(held.values())
    assert b"data_directory" in held["config.yaml"]
    assert "metrics" in [item["what"] for item in manifest["missing"]]
    assert (await command("replay", str(out)))["same"] is True
