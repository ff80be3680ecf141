"""Base models: names match exactly or by alias, dimensions are always checked, and a mismatch says the way out."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from tritonclient.grpc import service_pb2_grpc

from sidecar.proto import admin_pb2 as pb
from tests.kit.emulated import running_engine, stream_answers, text_request
from tests.kit.forked import python
from tests.kit.peft_files import write_adapter
from tests.kit.serving import Serving, serving

DUMMY = {"compute": "none", "shape": "tiny"}
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 160, "vocab_size": 259,
}  # fmt: skip


def base_model(folder: Path, **fields: Any) -> dict[str, Any]:
    """Write a base model's config.json and return the backend's configuration for it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | fields))
    return {"base_model": {"name": "org/tiny", "aliases": ["tiny-llama"], "config": str(folder)}}


async def register(served: Serving, path: Path, **fields: Any) -> Any:
    return await served.adapters.Register(pb.RegisterRequest(name="sql", path=str(path), **fields))


async def refusal(served: Serving, path: Path, **fields: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await register(served, path, **fields)
    return caught.value.details() or ""


async def test_by_alias_or_by_the_operators_word(tmp_path: Path) -> None:
    """An alias is the same model; a local path is not, until `--base` says so."""
    by_alias = write_adapter(tmp_path / "alias", seed=1)
    by_path = write_adapter(tmp_path / "path", seed=2, base_model_name_or_path="/home/me/tiny")
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], roots=[tmp_path], backend=base_model(tmp_path / "model")) as served,
    ):
        assert (await register(served, by_alias)).adapter.base_model == "tiny-llama"
        words = await refusal(served, by_path)
        assert 'trained on "/home/me/tiny" and the engine serves "org/tiny"' in words
        assert "base_model.aliases" in words
        assert "--base" in words
        assert (await register(served, by_path, base="org/tiny")).adapter.base_model == "org/tiny"
        assert (await served.ask("sql", 3)).tokens == served.expected("sql", 3)


async def test_dimensions_are_checked_against_the_models_own_config(tmp_path: Path) -> None:
    """The right name over another model's dimensions is refused with both."""
    adapter = write_adapter(tmp_path / "adapter")
    wide = base_model(tmp_path / "model", hidden_size=128, num_attention_heads=8)
    async with running_engine(**DUMMY) as engine, serving([engine], roots=[tmp_path], backend=wide) as served:
        words = await refusal(served, adapter)
        assert 'its attn_q is 64 → 64 and that of "tiny-llama" is 128 → 128' in words
        assert not served.state.names


async def test_inspect_says_which_backends_could_serve_it(tmp_path: Path) -> None:
    """From the configuration alone: pages where it fits, the reason where it does not."""
    adapter = write_adapter(tmp_path / "adapter")
    narrow = {"rank_max": 4, "modules": {"attn_q": [64, 64], "attn_v": [64, 32]}, "layers": 2}
    config = tmp_path / "sidecar.yaml"
    backends = [
        {"url": "triton://one:8001"} | base_model(tmp_path / "model"),
        {"url": "triton://two:8001", "engine": narrow},
    ]
    config.write_text(json.dumps({"backends": backends}))
    process = await python(
        "-m", "sidecar", "adapters", "inspect", str(adapter), "--config", str(config), "--json",
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    first, second = json.loads(out)["backends"]
    assert (first["backend"], first["serves"]) == ("one:8001", True)
    assert (second["backend"], second["serves"], second["short"]) == ("two:8001", False, "max rank 4 < 8")


async def test_a_base_model_is_asked_by_its_own_name(tmp_path: Path) -> None:
    """In each protocol, by its name or an alias, and only its engines answer; an adapter of that name comes first."""
    async with running_engine(**DUMMY) as one, running_engine(**DUMMY) as two:
        names = (("one", "org/tiny"), ("two", "org/other"))
        backends = [
            {
                "url": f"triton://{engine.grpc_address}",
                "id": backend,
                "base_model": {"name": name, "aliases": [backend]},
            }
            for engine, (backend, name) in zip((one, two), names, strict=True)
        ]
        async with (
            serving([], roots=[tmp_path], backends=backends) as served,
            httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}", trust_env=False) as http,
        ):
            kserve: Any = service_pb2_grpc.GRPCInferenceServiceStub(served.channel)
            assert [each["id"] for each in (await http.get("/v1/models")).json()["data"]] == [name for _, name in names]
            for backend, name in (*names, *((alias, alias) for alias, _ in names)):
                answer = await served.ask(name, 3)
                assert (answer.origins[0].backend, answer.origins[0].version) == (backend, "")
                assert answer.tokens == served.expected("", 3)
                (message,) = await stream_answers(kserve, text_request("hi", 3, lora_name=name))
                assert message.infer_response.parameters["lora_backend"].string_param == backend
                body = {"model": name, "prompt": "hi", "max_tokens": 3}
                assert (await http.post("/v1/completions", json=body)).headers["x-lora-backend"] == backend
            for name in ("base", ""):
                assert (await served.ask(name, 3)).tokens == served.expected("", 3)
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await served.ask("org/nothing", 3)
            assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
            for name in ("one", "org/other"):
                request = pb.RegisterRequest(name=name, path=str(write_adapter(tmp_path / "x")), base="org/other")
                with pytest.raises(grpc.aio.AioRpcError, match="a base model that is served here has this name"):
                    await served.adapters.Register(request)
            assert not served.state.names


async def test_every_parent_can_be_asked(tmp_path: Path) -> None:
    """Engines whose base model is unknown take adapters of any, and are asked for "base"; nobody may name another."""
    write_adapter(tmp_path / "adapters" / "sql", base_model_name_or_path="org/unknown-here")
    for options, expected in (({}, "base"), ({"base_requests": "refuse"}, None)):
        async with (
            running_engine(**DUMMY) as engine,
            serving([engine], tmp_path / "adapters", backend={"base_model": None}, **options) as served,
            httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}", trust_env=False) as http,
        ):
            listed = (await http.get("/v1/models")).json()["data"]
            assert next(each["parent"] for each in listed if each["id"] == "sql") == expected
            body = {"model": expected or "base", "prompt": "hi", "max_tokens": 3}
            is_usable = (await http.post("/v1/completions", json=body)).status_code == 200
            is_shown = (await http.get(f"/v1/models/{body['model']}")).status_code == 200
            assert is_usable == is_shown == (expected is not None)


async def test_an_engine_that_comes_with_an_adapters_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The adapter goes on to answer, the log says so once, and the list names the base model otherwise."""
    write_adapter(tmp_path / "adapters" / "sql", base_model_name_or_path="org/tiny")
    async with running_engine(**DUMMY) as one, running_engine(**DUMMY) as two:
        backends = [
            {"url": f"triton://{one.grpc_address}", "id": "one", "base_model": {"name": "org/tiny"}},
            {
                "url": f"triton://{two.grpc_address}",
                "id": "two",
                "base_model": {"name": "org/other", "aliases": ["org/new"]},
            },
        ]
        data = str(tmp_path / "data")
        async with serving([], tmp_path / "adapters", backends=backends[:1], data_directory=data):
            pass
        backends[0]["base_model"] = {"name": "sql", "aliases": ["org/tiny"]}
        async with (
            serving([], roots=[tmp_path], backends=backends, data_directory=data) as served,
            httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}", trust_env=False) as http,
        ):
            assert (await served.ask("sql", 3)).origins[0].version == "sql@v1"
            listed = (await http.get("/v1/models")).json()["data"]
    assert [(each["id"], each["parent"]) for each in listed] == [
        ("org/tiny", None), ("org/other", None), ("sql", "org/tiny"),
    ]  # fmt: skip
    assert caplog.text.count("sql is an adapter and also the name of a base model") == 1
