"""vLLM's calls for adapters, on vLLM and on the emulator's face: codes, types and texts of what may come of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.e2e.vllm.direct import complete, load, registered, unload
from tests.e2e.vllm.faces import (
    BAD_REQUEST,
    CONTEXT,
    FAILED,
    INVALID,
    MISSING,
    Face,
    assert_error,
    pattern_of,
    replaced,
    to_json,
)  # fmt: skip


async def test_load_and_unload(face: Face, client: httpx.AsyncClient) -> None:
    """Success is plain text; a name is loaded once, and unloaded once."""
    path = face.adapter()
    told = await load(client, "sql", path)
    assert (told.status_code, told.text) == (200, "Success: LoRA adapter 'sql' added successfully.")
    assert "content-type" not in told.headers
    again = "already been loaded. If you want to load the adapter in place, set 'load_inplace' to True."
    assert_error(await load(client, "sql", path), INVALID, f"The lora adapter 'sql' has {again}")
    assert (await load(client, "sql", path, load_inplace=True)).status_code == 200
    assert (await load(client, "twin", path, of_no_meaning=1)).status_code == 200
    told = await unload(client, "sql")
    assert (told.status_code, told.text) == (200, "Success: LoRA adapter 'sql' removed successfully.")
    assert_error(await unload(client, "sql"), MISSING, "The lora adapter 'sql' cannot be found.")


async def test_calls_that_say_too_little(face: Face, client: httpx.AsyncClient) -> None:
    """What is missing is named; an empty name or path is another error; the base model's name is taken."""
    path = face.adapter()
    missing = "{'type': 'missing', 'loc': 'body.%s', 'msg': 'Field required', 'input': '<dict of %d items>'}"
    for body, names in (({"lora_path": "x"}, ["lora_name"]), ({}, ["lora_name", "lora_path"])):
        reply = await client.post("/v1/load_lora_adapter", json=body)
        lines = [missing % (name, len(body)) for name in names]
        counted = f"{len(names)} validation error{'s' if len(names) > 1 else ''}:"
        assert_error(reply, BAD_REQUEST, "\n  ".join([counted, *lines]), "body.lora_name")
    headers = {"content-type": "application/json"}
    reply = await client.post("/v1/load_lora_adapter", content='{"lora_name": ', headers=headers)
    text = (
        "{'type': 'json_invalid', 'loc': 'body.14', 'msg': 'JSON decode error', 'input': '<dict of 0 items>', "
        "'ctx': {'error': 'Expecting value'}}"
    )
    assert_error(reply, BAD_REQUEST, f"1 validation error:\n  {text}", "body.14")
    reply = await client.post("/v1/load_lora_adapter", content='{"lora_name": "a", "lora_path": "b"}')
    assert_error(
        reply, BAD_REQUEST, "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
    )
    both = "Both 'lora_name' and 'lora_path' must be provided."
    assert_error(await load(client, "", path), INVALID, both)
    assert_error(await load(client, "x", ""), INVALID, both)
    assert_error(
        await load(client, "base", path), INVALID, "The lora adapter 'base' conflicts with a served base model."
    )
    assert_error(await unload(client, ""), INVALID, "'lora_name' needs to be provided to unload a LoRA adapter.")
    reply = await client.post("/v1/unload_lora_adapter", json={})
    assert_error(reply, BAD_REQUEST, f"1 validation error:\n  {missing % ('lora_name', 0)}", "body.lora_name")


async def test_no_adapter_at_the_path(face: Face, client: httpx.AsyncClient, tmp_path: Path) -> None:
    """A path below the usual top folders is not repeated."""
    (tmp_path / "empty").mkdir()
    below = [(tmp_path / name, "<path>") for name in ("empty", "none")]
    for path, told in (*below, ("/nowhere/at/all", "/nowhere/at/all"), ("some/thing", "some/thing")):
        assert_error(await load(client, "x", path), MISSING, f"Loading lora x failed: No adapter found for {told}")


WEIGHTS = "adapter_model.safetensors"
REFUSED: list[tuple[Callable[[Face], Path], str]] = [
    (lambda face: face.adapter(rank=64), "LoRA rank 64 is greater than max_lora_rank 16."),
    (lambda face: face.adapter(use_dora=True), "vLLM does not yet support DoRA."),
    (lambda face: face.adapter(bias="all"), "Adapter bias is not supported."),
    (lambda face: face.adapter(lora_bias=True), "vLLM does not support LoRA bias (lora_bias)."),
    (
        lambda face: face.adapter(modules_to_save=["lm_head"]),
        'vLLM only supports modules_to_save being either None or ["classifier", "score"] for classification models. '
        "Unsupported modules_to_save: ['lm_head']",
    ),
    (lambda face: face.damaged(lambda path: (path / WEIGHTS).unlink()), "<path> doesn't contain tensors"),
    (
        lambda face: face.damaged(replaced(WEIGHTS, b"x" * 100)),
        "Error while deserializing header: header too large",
    ),
    (
        lambda face: face.damaged(lambda path: replaced(WEIGHTS, (path / WEIGHTS).read_bytes()[:1000])(path)),
        "Error while deserializing header: invalid header length",
    ),
    (
        lambda face: face.damaged(replaced("adapter_config.json", b"{")),
        "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ),
]


@pytest.mark.parametrize(("made", "cause"), REFUSED, ids=[cause[:24] for _, cause in REFUSED])
async def test_what_the_worker_refuses(
    face: Face, client: httpx.AsyncClient, made: Callable[[Face], Path], cause: str
) -> None:
    """A bad adapter is a 500 of a healthy engine, which answers on."""
    assert (await load(client, "good", face.adapter())).status_code == 200
    text = (
        f"Call to add_lora method failed: Worker failed with error '{cause}', please check the stack trace above for "
        "the root cause"
    )
    assert_error(await load(client, "bad", made(face)), FAILED, text)
    assert (await client.get("/health")).status_code == 200
    assert await registered(client) == {"good": str(face.folder / "made-1")}
    assert len(await complete(client, "good", [3, 4, 5], 2)) == 2


async def test_a_lying_config_is_trusted(face: Face, client: httpx.AsyncClient) -> None:
    """Tensors of rank 16 under `r: 8` load, and answer with another scale."""
    honest, lying = face.adapter(seed=1, rank=16), face.adapter(seed=1, rank=16, r=8)
    for name, path in (("honest", honest), ("lying", lying)):
        assert (await load(client, name, path)).status_code == 200
    asked = [3, 4, 5]
    assert await complete(client, "honest", asked, 12) != await complete(client, "lying", asked, 12)


async def test_models(face: Face, client: httpx.AsyncClient) -> None:
    """Registered, not resident: the base model first, and adapters with their folder and parent."""
    paths = [face.adapter(seed) for seed in range(6)]
    for number, path in enumerate(paths):
        assert (await load(client, f"m{number}", path)).status_code == 200
    reply = await client.get("/v1/models")
    base, *adapters = reply.json()["data"]
    permission = [
        {
            "id": "…", "object": "model_permission", "created": "…", "allow_create_engine": False,
            "allow_sampling": True, "allow_logprobs": True, "allow_search_indices": False, "allow_view": True,
            "allow_fine_tuning": False, "organization": "*", "group": None, "is_blocking": False,
        }
    ]  # fmt: skip
    assert (base["id"], base["parent"], base["max_model_len"]) == ("base", None, CONTEXT)
    expected = [
        {
            "id": f"m{number}", "object": "model", "created": "…", "owned_by": "vllm", "root": str(path),
            "parent": "base", "max_model_len": None, "permission": permission,
        }
        for number, path in enumerate(paths)
    ]  # fmt: skip
    assert [pattern_of(to_json(one)) for one in adapters] == [to_json(one) for one in expected]
    assert (await client.get("/v1/models/m1")).json() == {"detail": "Not Found"}
