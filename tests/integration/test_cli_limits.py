"""Limits set from the command line, and what clients of both protocols are told at their end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from sidecar.proto import admin_pb2 as pb
from sidecar.proto import admin_pb2_grpc, gateway_pb2
from tests.integration.test_cli_keys import DUMMY, ENFORCED, sidecar
from tests.kit.emulated import running_engine
from tests.kit.serving import Serving, serving, write_adapters

LIMITS = {"limits": [{"tenant": "*", "requests_per_hour": 100}, {"tenant": "acme", "tokens_per_day": 50_000}]}


async def complete(served: Serving, key: str, max_tokens: int = 2) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}") as client:
        body = {"model": "a00", "prompt": "Is it?", "max_tokens": max_tokens}
        return await client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})


async def generate(served: Serving, key: str) -> grpc.aio.AioRpcError | None:
    request = gateway_pb2.GenerateRequest(adapter="a00", tokens=gateway_pb2.TokenIds(ids=[1, 2]), max_tokens=1)
    try:
        async for _ in served.gateway.Generate(request, metadata=(("authorization", f"Bearer {key}"),)):
            pass
    except grpc.aio.AioRpcError as error:
        return error
    return None


async def key_of(served: Serving, tenant: str) -> str:
    code, out, error = await sidecar(served, "keys", "create", "--tenant", tenant, "--json")
    assert code == 0, error
    return str(json.loads(out)["secret"])


async def listed(served: Serving, *arguments: str) -> list[dict[str, Any]]:
    code, out, error = await sidecar(served, "limits", "list", "--json", *arguments)
    assert code == 0, error
    return list(json.loads(out))


async def test_a_limits_life_from_the_command_line(tmp_path: Path) -> None:
    write_adapters(tmp_path / "adapters", 1)
    data = str(tmp_path / "data")
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path / "adapters", data_directory=data, access=LIMITS, **ENFORCED) as served,
    ):
        code, _, error = await sidecar(served, "limits", "set", "", "--requests-per-day", "3")
        assert (code, "the tenant is empty; leave it out" in error) == (2, True), error
        for adapter, warns in (("nosuch", True), ("*", False), ("base", False)):
            _, _, error = await sidecar(
                served, "limits", "set", "acme", "--adapter", adapter, "--concurrent", "9", "--tokens", "input"
            )
            assert ("warning: you see no adapter called nosuch; the limit waits for one" in error) == warns, error
            await sidecar(served, "limits", "remove", "acme", "--adapter", adapter, "--tokens", "input")
        key, other = await key_of(served, "acme"), await key_of(served, "zeta")
        code, out, error = await sidecar(served, "limits", "set", "acme", "--requests-per-day", "3")
        assert (code, out) == (0, "tenant acme: requests_per_day 3, tokens_per_day 50,000\n"), (
            f"its other numbers stay: {error}"
        )
        for left in (2, 1, 0):
            answer = await complete(served, key)
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-ratelimit-limit-requests"] == "3"
            assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
        refused = await complete(served, key)
        assert refused.status_code == 429
        error_body = refused.json()["error"]
        assert (error_body["reason"], error_body["type"]) == ("rate_limited", "rate_limit_error")
        assert error_body["message"].startswith(
            "tenant acme may send 3 requests a day; sent so far: 3; send it again in "
        )
        assert 0 < int(refused.headers["retry-after"]) <= 86_400
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert re.fullmatch(r"(\d+h)?(\d+m)?\d+(\.\d+)?s", refused.headers["x-ratelimit-reset-requests"])
        ended = await generate(served, key)
        assert ended is not None
        assert ended.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await complete(served, other)).status_code == 200
        code, out, error = await sidecar(
            served, "limits", "set", "acme", "--requests-per-day", "1k", "--max-tokens", "5"
        )
        assert code == 0, error
        assert await generate(served, key) is None
        too_long = await complete(served, key, max_tokens=6)
        assert (too_long.status_code, too_long.json()["error"]["reason"]) == (400, "invalid_request")
        nothing = ("--requests-per-day", "none", "--tokens-per-day", "none", "--max-tokens", "none")
        code, out, error = await sidecar(served, "limits", "set", "acme", *nothing)
        assert "no number of the limit would be left; sidecar limits remove takes it away" in error
        code, out, error = await sidecar(served, "limits", "set", "acme", "--max-tokens", "none")
        assert (code, out) == (0, "tenant acme: requests_per_day 1,000, tokens_per_day 50,000\n"), error
        found = {(limit["tenant"], limit["source"]): limit for limit in await listed(served)}
        assert set(found) == {("*", "config"), ("acme", "run time")}, "it stands in the place of the configuration's"
        assert found["acme", "run time"]["taken"].keys() == {"requests_per_day", "requests_per_hour", "tokens_per_day"}
        assert found["acme", "run time"]["taken"]["requests_per_day"] == 4
        assert [each["taken"] for each in await listed(served, "--tenant", "zeta")] == [{"requests_per_hour": 1}]
        code, out, error = await sidecar(served, "limits", "list")
        assert re.search(r"acme +- +- +requests_per_day +1,000 +4 +run time", out), out
        code, out, error = await sidecar(served, "limits", "remove", "acme")
        assert (code, out) == (0, "tenant acme: the limit is removed\n"), error
        answer = await complete(served, key)
        assert answer.headers["x-ratelimit-limit-tokens"] == "50000", "the configuration's counts again"
        code, out, error = await sidecar(served, "limits", "remove", "acme")
        assert code != 0
        assert "is in the configuration" in error
        code, out, error = await sidecar(served, "limits", "remove", "zeta")
        assert "sidecar limits list" in error


async def test_limits_outlive_the_process(tmp_path: Path) -> None:
    write_adapters(tmp_path / "adapters", 1)
    data = str(tmp_path / "data")
    async with running_engine(**DUMMY) as engine:
        async with serving([engine], tmp_path / "adapters", data_directory=data, **ENFORCED) as served:
            key = await key_of(served, "acme")
            code, _, error = await sidecar(
                served, "limits", "set", "acme", "--tokens-per-day", "3", "--tokens", "input"
            )
            assert code == 0, error
        async with serving([engine], tmp_path / "adapters", data_directory=data, **ENFORCED) as served:
            assert await generate(served, key) is None
            ended = await generate(served, key)
            assert ended is not None
            assert "may use 3 tokens a day; used so far: 2; this request needs about 2" in str(ended.details())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["acme"], "say which number to set, such as --tokens-per-minute 20k"),
        (["acme", "--tokens-per-minute", "many"], 'such as 500, 20k or 1.5M, or none; got "many"'),
        (["acme", "--tokens-per-minute", "0"], "wants a number from 1 on"),
        (["acme", "--tokens-per-minute", "none"], "no tokens_per_minute of its own to take away"),
        (["acme", "--tokens", "all", "--tokens-per-minute", "1"], '--tokens: "all" is none of both, input, output'),
    ],
)
async def test_a_limit_that_is_none(arguments: list[str], words: str, tmp_path: Path) -> None:
    write_adapters(tmp_path / "adapters", 1)
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path / "adapters") as served:
        code, _, error = await sidecar(served, "limits", "set", *arguments)
        assert code == (1 if "of its own" in words else 2), "only the sidecar knows what is left"
        assert words in error


async def test_a_limit_for_what_no_request_is_or_without_bounds_is_refused(tmp_path: Path) -> None:
    """It would have no effect, or no file that could keep what is taken of it."""
    write_adapters(tmp_path / "adapters", 1)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"tokens_per_hour": 2**63}, "tokens_per_hour: it must be less than or equal to 1000000000000000"),
        ({"max_tokens": 2**64 - 1}, "max_tokens: it must be less than or equal to 1000000000000000"),
        ({"class": "nosuch"}, 'there is no class "nosuch"; there are default (queue.classes adds one)'),
        ({"tenant": "a\0b"}, "tenant: the tenant has U+0000 at 1"),
        ({"tenant": "t" * 5000}, "tenant: the tenant has 5000 characters"),
        ({"adapter": "a" * 5000}, "adapter: the adapter's name has 5000 characters"),
    ]
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path / "adapters") as served:
        stub = admin_pb2_grpc.AccessStub(served.admin_channel)
        for fields, words in refused:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.SetLimit(pb.Limit(**{"tenant": "acme", "requests_per_day": 1, **fields}))
            assert words in str(caught.value.details())
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert await listed(served) == []
        for klass in ("", "*", "default"):
            limit: dict[str, Any] = {"tenant": "*", "class": klass, "adapter": "*", "tokens_per_day": 10**15}
            await stub.SetLimit(pb.Limit(**limit))
        assert len(await listed(served)) == 3
