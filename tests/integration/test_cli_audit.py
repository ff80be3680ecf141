"""`sidecar audit` and the RPCs behind it, against a whole sidecar."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from io import StringIO
from pathlib import Path
from time import time
from typing import Any

import grpc
import pytest
from rich.console import Console

from sidecar.access.principal import Action, Principal, Proof, Resource, Sort
from sidecar.cli.audit import parts_of
from sidecar.proto import admin_pb2 as pb
from sidecar.proto import admin_pb2_grpc
from tests.kit.cli_runs import Ended, runner
from tests.kit.serving import Serving, serving

SQL = Resource(Sort.ADAPTER, "acme/sql")


class House:
    """A sidecar with a data directory, and a command line that asks it."""

    def __init__(self, served: Serving, capfd: pytest.CaptureFixture[str]) -> None:
        self.served = served
        self.audit = served.sidecar.access.audit
        self._command = runner(capfd)

    async def cli(self, *arguments: str) -> Ended:
        return await asyncio.to_thread(self._command, *arguments, "--admin", self.served.sidecar.admin_address)


@pytest.fixture
async def house(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> AsyncIterator[House]:
    async with serving([], data_directory=str(tmp_path / "data")) as served:
        yield House(served, capfd)


async def fill(house: House) -> None:
    ann = Principal("acme", Proof.KEY, "0123456789ab", roles=("publisher",))
    before, after = {"version": "v1", "pinned": True}, {"version": "v2", "pinned": True, "canary": "v3 5 %"}
    await house.audit.changed(ann, "10.0.0.9:4711", Action.PROMOTE, SQL, before, after, "r-1", verb="Adapters.Promote")
    bob = Principal("beta", Proof.TOKEN, "bob@beta.example")
    house.audit.denied(bob, "10.0.0.7:1", Proof.TOKEN, Action.INFER, SQL, "the allow list does not have beta", "r-2")


async def test_people_see_who_did_what(house: House) -> None:
    """A head line and the details; options choose; nothing found is said."""
    assert (await house.cli("audit", "--since", "5m")).out == "nothing was changed or denied in the last 5m\n"
    await fill(house)
    shown = (await house.cli("audit")).out
    first, details, second, why = (line.rstrip() for line in shown.splitlines())
    assert first.endswith("  ok  acme/0123456789ab  Adapters.Promote  acme/sql")
    assert details == "    version v1 -> v2; canary v3 5 %; from 10.0.0.9:4711 by key; id r-1"
    assert second.endswith("  denied  beta/bob@beta.example  infer  acme/sql")
    assert why == "    the allow list does not have beta; from 10.0.0.7:1 by token; id r-2"
    for options, results in (
        (("--adapter", "acme/sql"), ["ok", "denied"]),
        (("--adapter", "other"), []),
        (("--tenant", "beta"), ["denied"]),
        (("--kind", "change"), ["ok"]),
        (("--kind", "denial", "--since", "1d"), ["denied"]),
    ):
        ended = await house.cli("audit", *options, "--json")
        assert [json.loads(line)["result"] for line in ended.out.splitlines()] == results
    assert (await house.cli("audit", "--since", "yesterday")).code == 2
    assert (await house.cli("audit", "--kind", "all")).code == 2


async def test_a_pause_without_an_end_is_told_in_words(house: House) -> None:
    await house.audit.changed(Principal(), "", Action.PAUSE, SQL, {}, {"paused_s": None}, "", verb="Adapters.Pause")
    await house.audit.changed(Principal(), "", Action.PAUSE, SQL, {"paused_s": None}, {}, "", verb="Adapters.Resume")
    _, paused, _, resumed = (line.strip() for line in (await house.cli("audit")).out.splitlines())
    assert paused == "paused_s until resumed; by none"
    assert resumed == "paused_s until resumed -> none; by none"


async def test_a_cancellation_is_found_by_its_adapter(house: House) -> None:
    """The line names what was asked, though it is of a tenant."""
    stub: Any = admin_pb2_grpc.QueuesStub(house.served.admin_channel)  # type: ignore[no-untyped-call]
    await stub.Cancel(pb.CancelRequest(adapter="base", tenant="acme", only=pb.RequestNames(backend="")))
    assert (await house.cli("audit", "--adapter", "other")).out.startswith("nothing was changed")
    head, details = (line.strip() for line in (await house.cli("audit", "--adapter", "base")).out.splitlines())
    assert head.endswith("  Queues.Cancel  acme")
    assert details.startswith('adapter base; tenant acme; backend ""; cancelled 0; from ')


async def test_more_lines_than_one_batch_come_in_order(house: House) -> None:
    for number in range(1200):
        await house.audit.changed(Principal("acme"), "", Action.PROMOTE, SQL, {}, {}, str(number))
    stub: Any = admin_pb2_grpc.AccessStub(house.served.admin_channel)  # type: ignore[no-untyped-call]
    lines = [json.loads(line.json) async for line in stub.ReadAudit(pb.AuditRequest(since=time() - 600))]
    assert [line["request_id"] for line in lines] == [str(number) for number in range(1200)]
    with pytest.raises(grpc.aio.AioRpcError, match="must be change, denial or empty"):
        async for _ in stub.ReadAudit(pb.AuditRequest(kind="all")):
            pass


async def test_an_audit_that_is_in_no_file(capfd: pytest.CaptureFixture[str]) -> None:
    """The error says where the lines are."""
    async with serving([]) as served:
        ended = await House(served, capfd).cli("audit")
    assert ended.code == 2
    assert "the audit is kept in no file" in ended.err


async def test_a_metric_counts_lines(house: House) -> None:
    await fill(house)
    assert await asyncio.to_thread(house.audit.log.flush)
    _, text = await house.served.sidecar.metrics.render()
    for line in ('lines_total{kind="change"} 1.0', 'lines_total{kind="denial"} 1.0', 'lost_total{kind="denial"} 0.0'):
        assert f"lora_sidecar_audit_{line}" in text.decode()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_lines_fit_the_terminal(width: int) -> None:
    """Long names and reasons are folded; the count of repeated denials is beside the result."""
    line = {
        "time": "2026-11-28T12:00:00.123Z", "kind": "denial", "result": "denied", "count": 500,
        "since": "2026-11-28T11:59:00.000Z", "who": {"tenant": "spiffe://cluster.local/ns/" + "t" * 90, "subject": ""},
        "proof": "certificate", "peer": "10.0.0.9:4711", "action": "infer", "verb": "", "request_id": "r" * 100,
        "resource": {"sort": "version", "name": "n" * 70, "version": 3}, "why": "because of this and that " * 9,
    }  # fmt: skip
    out = StringIO()
    console = Console(file=out, width=width, markup=False, highlight=False, emoji=False)
    for part in parts_of(line):
        console.print(part)
    text = out.getvalue()
    assert " ".join(text.split()).startswith("2026-11-28 12:00:00 denied x500 spiffe:")
    assert all(len(shown) <= width for shown in text.splitlines())
    assert f"{'n' * 70}@v3" in text.replace("\n", "").replace(" ", "")
    assert "since 2026-11-28 11:59:00" in " ".join(text.split())


async def test_who_am_i(house: House) -> None:
    """On loopback without identity the caller is the operator of this machine."""
    stub: Any = admin_pb2_grpc.AccessStub(house.served.admin_channel)  # type: ignore[no-untyped-call]
    who = await stub.WhoAmI(pb.WhoAmIRequest())
    assert (who.tenant, who.proof, list(who.roles), who.expires_at) == ("", "local", ["operator"], 0)
