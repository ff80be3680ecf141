"""In front of LLM-API models: adapters as staged files, by name, with nothing sent but an id and a path."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton

from sidecar.adapters.claims import HIDDEN
from sidecar.core.facts import Layout, packed_key, task_id_of
from sidecar.core.effects import Fetch, Load
from sidecar.demo.merged import greedy
from sidecar.demo.model import SEED
from sidecar.emulator.face.compute import dummy_token
from sidecar.emulator.tokens import EOS, ByteTokenizer
from sidecar.proto import admin_pb2, gateway_pb2
from tests.emulated import running_engine
from tests.kserve_clients import aio_client, ask, core_inputs, parameters_of, tensor, text_inputs
from tests.peft_files import ALL_LINEAR, write_adapter
from tests.serving import Serving, serving, until, write_adapters

LLMAPI: dict[str, Any] = {"compute": "none", "protocol": "llmapi"}
FILES = Layout("float16", files=True)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """The folder of the sources, and the one that is shared with the engines."""
    (tmp_path / "adapters").mkdir()
    return tmp_path / "adapters", tmp_path / "shared"


@asynccontextmanager
async def in_front(
    folders: tuple[Path, Path], engines: int = 1, config: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[tuple[Serving, list[Any]]]:
    """Run a sidecar in front of LLM-API engines that share a folder with it."""
    adapters, shared = folders
    async with AsyncExitStack() as stack:
        started = [await stack.enter_async_context(running_engine(**LLMAPI | options)) for _ in range(engines)]
        backend = {"adapters_dir": str(shared)}
        record = {"backend": backend} | (config or {})
        yield await stack.enter_async_context(serving(started, adapters, roots=[adapters.parent], **record)), started


def key_of(served: Serving, name: str) -> str:
    return packed_key(served.state.names[name].digest, FILES)


def answer_of(served: Serving, name: str, count: int) -> str:
    """Return the text that an engine with dummy compute gives for an adapter; "" is the base model."""
    lora_id = task_id_of(key_of(served, name)) if name else 0
    return "".join(chr(dummy_token(lora_id, position)) for position in range(count))


async def told(served: Serving, adapter: str, tokens: int = 4, **fields: Any) -> tuple[str, list[Any]]:
    """Return a text answer and its messages."""
    request = gateway_pb2.GenerateRequest(adapter=adapter, max_tokens=tokens, **{"text": "hi"} | fields)
    messages = [message async for message in served.gateway.Generate(request)]
    return "".join(message.text for message in messages), messages


def staged(shared: Path) -> list[str]:
    return sorted(path.name for path in shared.iterdir() if path.name != HIDDEN)


@pytest.mark.parametrize("stream", [None, True, False])
@pytest.mark.parametrize("decoupled", [True, False])
async def test_by_name(folders: tuple[Path, Path], decoupled: bool, stream: bool | None) -> None:
    """A client names an adapter; the engine reads it from its path and the answer comes in pieces, each once."""
    write_adapters(folders[0], 2)
    async with in_front(folders, decoupled=decoupled) as (served, (engine,)):
        asked = {} if stream is None else {"stream": stream}
        if stream and not decoupled:
            with pytest.raises(grpc.aio.AioRpcError, match="Streaming is only supported in decoupled mode"):
                await told(served, "a00", **asked)
            return
        for name in ("a00", "a01", "", "a00"):
            text, messages = await told(served, name, **asked)
            assert text == answer_of(served, name, 4)
            assert len(messages) == (4 if decoupled and stream is not False else 1)
            origin = messages[-1].origin
            assert (origin.version, origin.backend) == (f"{name}@v1" if name else "", "trt-0")
            assert origin.output_tokens == len(messages)
        assert staged(folders[1]) == sorted(key_of(served, name) for name in ("a00", "a01"))
        assert [one.weights for one in engine.served] == [True, False, True, False, False, False]
        assert served.recorder.count(Load) == 2


async def test_the_answers_are_those_of_the_files(folders: tuple[Path, Path]) -> None:
    """Computed for real, against the merged model; letters of several bytes come whole or not at all."""
    path = write_adapter(folders[0] / "sql", modules=ALL_LINEAR, size=0.2)
    async with in_front(folders, compute="llama", seed=SEED) as (served, _):
        for adapter, source in (("sql", path), ("", None)):
            expected = [token for token in greedy(source, "select ", 24) if token != EOS]
            text, messages = await told(served, adapter, 24, text="select ")
            assert text == ByteTokenizer().decode(expected)
            assert len(messages) > 4
            whole, _ = await told(served, adapter, 24, text="select ", stream=False)
            assert whole == text


async def test_two_paths_for_one_folder(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """What this process calls `ours` the engine may see elsewhere: it is told its own path."""
    write_adapters(folders[0], 1)
    (tmp_path / "mounted").symlink_to(folders[1])
    config = {"backend": {"adapters_dir": {"ours": str(folders[1]), "engine": str(tmp_path / "mounted")}}}
    async with in_front(folders, config=config) as (served, _):
        assert (await told(served, "a00"))[0] == answer_of(served, "a00", 4)


async def test_the_engine_does_not_see_the_folder(folders: tuple[Path, Path]) -> None:
    """The words of the engine say what is wrong, and other requests go on."""
    write_adapters(folders[0], 1)
    config = {"backend": {"adapters_dir": {"ours": str(folders[1]), "engine": "/not/mounted"}}}
    async with in_front(folders, config=config) as (served, _):
        with pytest.raises(grpc.aio.AioRpcError, match="lora_path does not exist on the Triton server's .*/not/mounted"):
            await told(served, "a00")
        assert (await told(served, ""))[0] == answer_of(served, "", 4)


async def test_without_a_shared_folder(folders: tuple[Path, Path]) -> None:
    """The backend is not used, and the operator reads what to write into the configuration."""
    async with running_engine(**LLMAPI) as engine:
        shared = {"adapters_dir": None}
        serve = serving([engine], backend=shared)
        starting = asyncio.create_task(serve.__aenter__())
        del starting
        starting = None
