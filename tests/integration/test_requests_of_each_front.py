"""A request is the same by whichever front it comes: permitted once, and nothing in the core tells the front."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.events import Received
from tests.kit.front_house import FRONTS, Asked, house


async def test_each_front_asks_once_what_a_request_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_why_a_request_waits_does_not_depend_on_its_front(tmp_path: Path) -> None:
    """The reasons are the core's, and it gets the same request from each: but for its number, ids, sizes and deadline.

    gRPC's clients send a deadline; a prompt's length in tokens is estimated of a text, and known of tokens.
    """
    got = {}
    async with house(tmp_path) as running:
        for front, send in FRONTS.items():
            before = len(running.served.recorder.events)
            assert await send(running, Asked("a00", "acme")) == {}, front
            (received,) = [e for e in running.served.recorder.events[before:] if isinstance(e, Received)]
            got[front] = replace(
                received, request=0, client_id="", size_bytes=0, input_tokens=0, deadline_ns=None, session=""
            )
    assert set(got.values()) == {Received(0, "a00", "acme", "default", 0, 2)}, got
