"""Every request that ends counts once in the metrics, whichever front took it and whatever ended it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.kit.front_house import ASKED, FAMILIES, FRONTS, SPENT, Asked, house

UNTOLD = {("kserve-stream", "too large")}
"""gRPC itself cuts the stream, and tells the server no more than of one that is closed without a request."""
fronts = pytest.mark.parametrize("front", FRONTS)


@fronts
async def test_each_request_counts_once(tmp_path: Path, front: str) -> None:
    limits = {"limits": [{"tenant": SPENT, "requests_per_day": 1}]}
    async with house(tmp_path, access=limits) as running:
        await running.served.ask("a00", tenant=SPENT)
        told = {}
        before = await running.ended()
        for name, asked in ASKED.items():
            if (front, name) in UNTOLD:
                continue
            await FRONTS[front](running, asked)
            after = await running.ended(before)
            told[name] = {key: count for key, count in (after - before).items() if count}
            before = after
    assert {name: wrong for name, counted in told.items() if (wrong := trouble_of(name, counted))} == {}


def trouble_of(name: str, counted: Mapping[tuple[str, ...], int]) -> str:
    """Return what is wrong with the counts of one request; "" if nothing is."""
    is_ok = name in ("ok", "base")
    if sorted(key[0] for key in counted) != sorted(FAMILIES) or {*counted.values()} != {1}:
        return f"it is to count once in each family: {counted}"
    if any(("ok" if is_ok else "refused") not in key for key in counted):
        return f"it is counted with another outcome: {counted}"
    [adapter] = [key[1] for key in counted if key[0] == "adapter_requests"]
    may_be = {"ok": {"a00"}, "base": {"_base"}}.get(name, {"a00", "_other"})
    return "" if adapter in may_be else f"its label is {adapter}"


@fronts
async def test_a_request_without_a_credential_counts(tmp_path: Path, front: str) -> None:
    """It is of no tenant that is named: whoever sent it did not prove one."""
    async with house(tmp_path, identity={"mode": "enforce"}) as running:
        before = await running.ended()
        await FRONTS[front](running, Asked(headers={"authorization": "Bearer nonsense"}))
        counted = (await running.ended(before)) - before
    assert counted["requests", "refused"] == 1, counted
    assert counted["tenant_requests", "refused", "_other"] == 1, counted
    assert sum(counted.values()) == len(FAMILIES), counted
