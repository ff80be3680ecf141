"""`sidecar usage` of a serving process in front of an emulated engine: what was used, what it costs, and a kill."""

from __future__ import annotations

import asyncio
import csv
import io
import logging
import re
import signal
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from time import time
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from sidecar.access.usage import keeper as keeping
from sidecar.access.usage.keeper import WRITE_S
from sidecar.proto import admin_pb2 as pb
from sidecar.proto import admin_pb2_grpc, gateway_pb2
from tests.integration.test_process import Served, ask, sidecar
from tests.kit.cli_runs import Ended, runner
from tests.kit.emulated import running_engine
from tests.kit.serving import Serving, serving, until, write_adapters

DUMMY = {"compute": "none", "shape": "tiny"}
SLOTS = 4


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Return a function that runs one command in this process."""
    return runner(capfd)


class House:
    """A serving sidecar and its command line."""

    def __init__(self, served: Serving, command: Callable[..., Ended]) -> None:
        self.served = served
        self._command = command

    async def cli(self, *arguments: str) -> Ended:
        return await asyncio.to_thread(self._command, *arguments, "--admin", self.served.sidecar.admin_address)

    async def rows(self, *arguments: str) -> list[dict[str, Any]]:
        ended = await self.cli("usage", "--json", *arguments)
        assert ended.code == 0, ended.err
        rows: list[dict[str, Any]] = ended.json()["rows"]
        return rows


@pytest.fixture
async def house(tmp_path: Path, command: Callable[..., Ended]) -> AsyncIterator[House]:
    """Serve two adapters with a data directory. acme has asked sql twice, globex sql once and chat once."""
    write_adapters(tmp_path / "loras", 2)
    async with (
        running_engine(**DUMMY) as engine,
        serving(
            [engine],
            tmp_path / "loras",
            data_directory=str(tmp_path / "data"),
            backend={"engine": {"device_pages": SLOTS}},
        ) as served,
    ):
        await until(lambda: {"a00", "a01"} <= set(served.state.names))
        for tenant, adapter in (("acme", "a00"), ("acme", "a00"), ("globex", "a00"), ("globex", "a01")):
            await served.ask(adapter, 6, prompt=5, tenant=tenant)
        yield House(served, command)


async def test_by_tenant_and_adapter(house: House) -> None:
    """Requests and tokens are those that were sent; every load and every slot is somebody's."""
    rows = {(row["tenant"], row["adapter"]): row for row in await house.rows()}
    asked = {("acme", "a00"): 2, ("globex", "a00"): 1, ("globex", "a01"): 1}
    for key, requests in asked.items():
        row = rows[key]
        assert (row["ok"], row["refused"], row["failed"]) == (requests, 0, 0)
        assert (row["input_tokens"], row["output_tokens"]) == (5 * requests, 6 * requests)
        assert row["input_tokens_estimated"] == 0
        assert row["seat_seconds"] > 0
        assert row["slot_seconds"] > 0
    assert sum(row["cold_loads"] for row in rows.values()) == 2
    assert all(row["cold_load_bytes"] > 0 for row in rows.values() if row["cold_loads"])
    assert rows["(idle)", ""]["engine_seconds"] > 0
    slots = sum(row["slot_seconds"] for row in rows.values())
    assert slots == pytest.approx(SLOTS * rows["(idle)", ""]["engine_seconds"], rel=1e-9)


async def test_a_refused_request_counts_and_a_made_up_name_is_no_row(house: House) -> None:
    for name in ("no-such", "nor-this"):
        with pytest.raises(grpc.aio.AioRpcError):
            await house.served.ask(name, 3, tenant="acme")
    (row,) = [row for row in await house.rows("--tenant", "acme") if row["refused"]]
    assert (row["adapter"], row["refused"], row["input_tokens"]) == ("(unknown)", 2, 0)


async def test_a_request_that_may_not_queue_is_one_for_its_adapter(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sidecar.requests")
    for adapter, klass in (("a00", "interactiv"), ("a01@v1", "interactiv"), ("", "interactiv")):
        with pytest.raises(grpc.aio.AioRpcError):
            await house.served.ask(adapter, 3, tenant="umbrella", **{"class": klass})
    rows = await house.rows("--tenant", "umbrella")
    assert {row["adapter"]: row["refused"] for row in rows} == {"a00": 1, "a01": 1, "(base)": 1}
    lines = [record.getMessage() for record in caplog.records if "tenant=umbrella" in record.getMessage()]
    assert [re.findall(r" adapter=(\S+)", line) for line in lines] == [["a00"], ["a01"], []]


async def test_a_prompt_in_text_is_marked_as_an_estimate(house: House) -> None:
    """Its tokens are the engine's business: 11 bytes are at most 11 tokens."""
    request = gateway_pb2.GenerateRequest(adapter="a00", text="eleven byte", max_tokens=2, tenant="initech")
    async for _ in house.served.gateway.Generate(request):
        pass
    (row,) = await house.rows("--tenant", "initech", "--by", "tenant")
    assert (row["input_tokens"], row["input_tokens_estimated"]) == (11, 11)
    assert "~11" in (await house.cli("usage", "--by", "tenant", "--tenant", "initech")).out


async def test_a_tenant_called_idle_pays_like_any_other(house: House) -> None:
    await house.served.ask("a00", 4, tenant="(idle)")
    rows = {row["tenant"]: row for row in await house.rows("--by", "tenant")}
    assert rows["\\(idle)"]["ok"] == 1
    assert rows["(idle)"]["ok"] == 0


async def test_metrics_show_the_same_seats(house: House) -> None:
    rows = {row["tenant"]: row["seat_seconds"] for row in await house.rows("--by", "tenant")}
    _, text = await house.served.sidecar.metrics.render()
    families = {family.name: family for family in text_string_to_metric_families(text.decode())}
    samples = {each.labels["tenant"]: each.value for each in families["lora_sidecar_tenant_seat_seconds"].samples}
    assert samples == pytest.approx({tenant: rows[tenant] for tenant in ("acme", "globex")}, abs=1e-5)


async def test_months_in_csv_and_what_they_cost(house: House, tmp_path: Path) -> None:
    """The sum of the costs is the price of the engines' time; spread over the tenants, it is the same sum."""
    prices = tmp_path / "prices.yaml"
    prices.write_text("currency: EUR\ngpu_hour: 36000\n")
    ended = await house.cli("usage", "--by", "month,tenant", "--csv", "--prices", str(prices))
    assert ended.code == 0, ended.err
    rows = list(csv.DictReader(io.StringIO(ended.out)))
    assert [row["tenant"] for row in rows] == ["acme", "globex", "(idle)"]
    assert {row["currency"] for row in rows} == {"EUR"}
    assert all(len(row["month"]) == len("2026-11") for row in rows)
    engine_s = sum(float(row["engine_seconds"]) for row in rows)
    assert sum(float(row["cost"]) for row in rows) == pytest.approx(engine_s * 10, rel=1e-6)
    spread = await house.rows("--by", "tenant", "--prices", str(prices), "--spread-idle")
    costs = {row["tenant"]: row["cost"] for row in spread}
    assert costs["(idle)"] == 0
    assert sum(costs.values()) == pytest.approx(10 * sum(row["engine_seconds"] for row in spread), rel=1e-6)
    (acme,) = await house.rows("--by", "tenant", "--tenant", "acme", "--prices", str(prices), "--spread-idle")
    assert acme["cost"] == pytest.approx(costs["acme"], rel=0.5), "who is asked for changes nobody's share"


async def test_a_table_for_a_terminal_of_80_columns(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every column of the first ones fits, with longer names the last ones go below; the total is the last line."""
    monkeypatch.setattr("sidecar.cli.show.WIDTH_UNBOUNDED", 80)
    lines = (await house.cli("usage")).out.splitlines()
    assert lines[0].split() == [
        "TENANT", "ADAPTER", "REQ", "NOT", "OK", "IN", "OUT", "SEAT·H", "SLOT·H", "LOADS", "STORE·H",
    ]  # fmt: skip
    assert max(len(line) for line in lines) <= 80
    assert lines[-1].split()[:2] == ["total", "4"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--since", "yesterday"), "--since wants"),
        (("--since", "2026-13-01"), "--since wants"),
        (("--by", "colour"), "it is by tenant"),
        (("--by", "hour,day"), "--by takes one of hour, day, month"),
        (("--csv", "--json"), "give one of them"),
        (("--spread-idle",), "it wants --prices"),
        (("--prices", "/no/such/file"), "No such file"),
    ],
)
async def test_what_is_wrong_is_said(house: House, arguments: tuple[str, ...], says: str) -> None:
    ended = await house.cli("usage", *arguments)
    assert ended.code == 2
    assert says in ended.err


async def test_where_no_usage_is_kept_it_is_said(command: Callable[..., Ended]) -> None:
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], access={"usage": {"enabled": False}}) as served,
    ):
        ended = await House(served, command).cli("usage")
    assert ended.code != 0
    assert "access.usage.enabled" in ended.err


async def test_what_a_budget_refuses_counts(tmp_path: Path, command: Callable[..., Ended]) -> None:
    """The core never hears of it. Which adapter it was for is not told: the tenant may not know that it exists."""
    write_adapters(tmp_path / "loras", 1)
    limits = [{"tenant": "acme", "requests_per_day": 2}]
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path / "loras", access={"limits": limits}) as served,
    ):
        for _ in range(2):
            await served.ask("a00", 3, tenant="acme")
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError):
                await served.ask("a00", 3, tenant="acme")
        rows = {row["adapter"]: row for row in await House(served, command).rows("--tenant", "acme")}
    assert (rows["a00"]["ok"], rows["a00"]["refused"]) == (2, 0)
    assert (rows["(unknown)"]["ok"], rows["(unknown)"]["refused"]) == (0, 3)


async def test_a_price_list_with_a_mistake_names_it(house: House, tmp_path: Path) -> None:
    (tmp_path / "prices.yaml").write_text("gpu_hours: 2\n")
    ended = await house.cli("usage", "--prices", str(tmp_path / "prices.yaml"))
    assert ended.code == 2
    assert "did you mean gpu_hour" in ended.err


# The process.


async def usage_of(served: Served, **fields: Any) -> Any:
    async with grpc.aio.insecure_channel(served.admin) as channel:
        return await admin_pb2_grpc.AccessStub(channel).GetUsage(pb.UsageRequest(by=["adapter"], **fields))


async def test_kill_9_loses_a_minute_at_most_and_the_hour_is_marked(tmp_path: Path) -> None:
    """What was written before the kill is there, what came after is not, and the hour is incomplete for ever."""
    assert WRITE_S < 60
    write_adapters(tmp_path / "loras", 1)
    async with running_engine(**DUMMY) as engine:
        options = (
            "--backend", f"triton://{engine.grpc_address}", "--adapters", str(tmp_path / "loras"),
            "--data-directory", str(tmp_path / "data"),
        )  # fmt: skip
        async with sidecar(*options) as served:
            for _ in range(3):
                await ask(served.data, "a00", 4)
            before = await usage_of(served)  # it writes first
            (row,) = [row for row in before.rows if row.adapter == "a00"]
            assert row.requests["ok"] == 3
            await ask(served.data, "a00", 4)
            served.process.send_signal(signal.SIGKILL)
            await served.process.wait()
        for restart in range(2):
            async with sidecar(*options) as served:
                await ask(served.data, "a00", 4)
                after = await usage_of(served)
                (row,) = [row for row in after.rows if row.adapter == "a00"]
                assert row.requests["ok"] == 4 + restart
                assert len(after.incomplete) == 1
                assert after.incomplete[0] <= time() < after.incomplete[0] + 7200
                await served.terminate()


async def test_it_is_written_without_being_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "WRITE_S", 0.01)
    write_adapters(tmp_path / "loras", 1)
    file = tmp_path / "data" / keeping.USAGE_FILE
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path / "loras", data_directory=str(tmp_path / "data")) as served,
    ):
        await served.ask("a00", 3)
        with closing(sqlite3.connect(file)) as reader:
            await until(lambda: reader.execute("SELECT sum(ok) FROM used").fetchone() == (1,))
