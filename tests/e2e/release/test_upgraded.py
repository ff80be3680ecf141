"""The last release, this one, and the last one again on one data directory: names, versions, pins and weights stay."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio

from sidecar.lab.engine.tokens import BOS
from sidecar.proto import admin_pb2, admin_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from tests.chaos.load import tokens_of
from tests.e2e.release.conftest import run
from tests.kit.emulated import EngineProcess
from tests.kit.peft_files import write_adapter
from tests.kit.ports import free_port

TOKENS = 4
PATIENCE_S = 60.0
ENGINE = ("--compute", "none", "--shape", "tiny")


class Site:
    """A data directory, adapters to register, and addresses; each time it is served its engine starts cold."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.admin, self.server = (f"127.0.0.1:{free_port()}" for _ in range(2))

    def adapter(self, name: str, seed: int) -> Path:
        return write_adapter(self.folder / "loras" / name, seed=seed)

    @asynccontextmanager
    async def served_by(self, release: Path) -> AsyncIterator[Served]:
        """Serve with the release whose bin folder is given; it must end with 0."""
        async with EngineProcess(*ENGINE) as engine:
            config = {
                "backends": [{"url": f"triton://{engine.grpc_address}", "id": "engine"}],
                "listeners": {
                    "data": {"address": self.server},
                    "admin": {"address": self.admin},
                    "http": {"address": "127.0.0.1:0"},
                },
                "adapters": {"roots": [str(self.folder / "loras")]},
                "data_directory": str(self.data),
            }  # fmt: skip
            file = self.folder / "config.yaml"
            file.write_text(json.dumps(config))
            with (self.folder / "log").open("ab") as log:
                process = await asyncio.create_subprocess_exec(
                    release / "sidecar", "serve", "--config", file, "--json",
                    stdout=asyncio.subprocess.PIPE, stderr=log, cwd=self.folder, env=_clean(),
                )  # fmt: skip
            try:
                assert process.stdout is not None
                ready = await process.stdout.readline()
                assert ready, (self.folder / "log").read_text()[-3000:]
                async with (
                    grpc.aio.insecure_channel(self.server) as data,
                    grpc.aio.insecure_channel(self.admin) as admin,
                ):
                    yield Served(self, release, data, admin)
                process.send_signal(signal.SIGTERM)
                async with asyncio.timeout(PATIENCE_S):
                    assert await process.wait() == 0
            finally:
                if process.returncode is None:
                    process.kill()
                await process.wait()
                process._transport.close()  # type: ignore[attr-defined]


class Served:
    """A sidecar that serves: its command line, and what clients and operators see."""

    def __init__(self, site: Site, release: Path, data: Any, admin: Any) -> None:
        self._site = site
        self._release = release
        self._gateway = gateway_pb2_grpc.GatewayStub(data)
        self._adapters = admin_pb2_grpc.AdaptersStub(admin)

    async def command(self, *words: str | Path) -> None:
        """Run a command of the release."""
        await asyncio.to_thread(
            run, self._release / "sidecar", *words, cwd=self._site.folder, LORA_SIDECAR_ADMIN=self._site.admin
        )

    async def names(self) -> dict[str, dict[str, Any]]:
        """Return what is known of each name."""
        listed = await self._adapters.List(admin_pb2.ListAdaptersRequest(), timeout=PATIENCE_S)
        return {
            each.name: {
                "digest": each.digest,
                "pinned": each.pinned,
                "allow": list(each.allow),
                "versions": [(v.version, v.digest, v.role, dict(v.labels)) for v in each.versions],
            }
            for each in listed.adapters
        }

    async def ask_all(self, names: dict[str, dict[str, Any]]) -> None:
        """Ask for each version of each name, and hold each answer against the version's digest."""
        for name, facts in names.items():
            for version, digest, *_ in facts["versions"]:
                assert await self._ask(f"{name}@{version}") == tokens_of(digest, TOKENS)
            assert await self._ask(name) == tokens_of(facts["digest"], TOKENS)

    async def kept_on_disk(self, count: int) -> None:
        """Wait until so many versions are in the disk tier."""
        async with asyncio.timeout(PATIENCE_S):
            while len(list((self._site.data / "blobs").glob("*"))) < count:
                await asyncio.sleep(0.05)

    async def _ask(self, adapter: str) -> list[int]:
        tokens = gateway_pb2.TokenIds(ids=[BOS, 1, 2, 3])
        request = gateway_pb2.GenerateRequest(adapter=adapter, tokens=tokens, max_tokens=TOKENS)
        answered: list[int] = []
        async for message in self._gateway.Generate(request, timeout=PATIENCE_S, wait_for_ready=True):
            answered += message.token_ids
        return answered


def _clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


async def test_old_new_old(old: Path, new: Path, tmp_path: Path) -> None:
    site = Site(tmp_path)
    async with site.served_by(old) as served:
        for seed, words in enumerate((("one",), ("one",), ("two", "--pin", "--label", "of=old"), ("three",))):
            await served.command("adapters", "register", words[0], site.adapter(f"{words[0]}-{seed}", seed), *words[1:])
        await served.command("adapters", "rollback", "one")
        await served.command("adapters", "register", "three", site.adapter("three-staged", 9), "--stage")
        before = await served.names()
        await served.ask_all(before)
        await served.kept_on_disk(5)
    assert [version[2] for version in before["one"]["versions"]].count("current") == 1
    assert before["two"]["pinned"]
    assert sum(len(facts["versions"]) for facts in before.values()) == 5
    shutil.move(site.folder / "loras", site.folder / "gone")  # from here on weights come from the disk tier alone

    run(new / "sidecar", "replay", site.data, cwd=tmp_path)
    async with site.served_by(new) as served:
        assert await served.names() == before
        await served.ask_all(before)
        (site.folder / "loras").mkdir()
        await served.command("adapters", "register", "four", site.adapter("four", 4), "--pin")
        await served.command("adapters", "promote", "three@v2")
        after = await served.names()
        await served.ask_all(after)
        await served.kept_on_disk(6)
    assert after.keys() == before.keys() | {"four"}
    assert after["three"]["digest"] != before["three"]["digest"]
    shutil.rmtree(site.folder / "loras")
    run(new / "sidecar", "replay", site.data, cwd=tmp_path)

    async with site.served_by(old) as served:
        assert await served.names() == after
        await served.ask_all(after)
    # Once this fails, for a new event or fact say, docs/upgrading.md lists what the older release cannot read.
    run(old / "sidecar", "replay", site.data, cwd=tmp_path)
    run(new / "sidecar", "replay", site.data, cwd=tmp_path)
