"""What a request may use is asked once, by each front, and carried along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.kit.front_house import FRONTS, Asked, house


async def test_each_front_asks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with house(tmp_path) as running:
        access = running.served.sidecar.gateway.access
        ask, asked = access.permit, []

        def counted(caller: Any, reference: str, *more: Any) -> Any:
            asked.append(reference)
            return ask(caller, reference, *more)

        monkeypatch.setattr(access, "permit", counted)
        for front, send in FRONTS.items():
            for adapter in ("a00", "base"):
                asked.clear()
                assert await send(running, Asked(adapter)) == {}, front
                assert asked == [adapter], front
        asked.clear()
        body = {"model": "a00", "prompt": ["one", "two", "three"], "max_tokens": 2}
        assert (await running.http.post("/v1/completions", json=body)).status_code == 200
        assert asked == ["a00"]
