"""In front of LLM-API models: adapters as staged files, by name, with nothing sent but an id and a path."""

from __future__ import annotations

import asyncio
import random
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
from tritonclient.grpc import service_pb2

from sidecar.access.access import OURSELVES
from sidecar.adapters.claims import HIDDEN
from sidecar.backends.api import Payload
from sidecar.config import parse
from sidecar.core.effects import Drop, Fetch, Heal, Load, Settle
from sidecar.core.facts import Layout, packed_key, task_id_of
from sidecar.errors import Misused, Reason
from sidecar.lab.demo.merged import greedy
from sidecar.lab.demo.model import SEED
from sidecar.lab.engine.kserve.compute import dummy_token
from sidecar.lab.engine.tokens import EOS, ByteTokenizer
from sidecar.proto import admin_pb2, gateway_pb2
from sidecar.serve.app import Sidecar
from sidecar.shell.requests import RequestFacts
from sidecar.telling.endings import message_of
from tests.kit.emulated import CORE, EngineProcess, channel_to, clients_asked, running_engine
from tests.kit.kserve_clients import aio_client, ask, core_inputs, parameters_of, tensor, text_inputs
from tests.kit.peft_files import ALL_LINEAR, write_adapter
from tests.kit.serving import Serving, serving, until, write_adapters

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
        assert [one.weights for one in clients_asked(engine)] == [True, False, True, False, False, False]
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
        with pytest.raises(
            grpc.aio.AioRpcError, match=r"lora_path does not exist on the Triton server's .*/not/mounted"
        ):
            await told(served, "a00")
        assert (await told(served, ""))[0] == answer_of(served, "", 4)


async def test_without_a_shared_folder(folders: tuple[Path, Path]) -> None:
    """The backend is not used, and the operator reads what to write into the configuration."""
    write_adapters(folders[0], 1)
    free = {"address": "127.0.0.1:0"}
    async with running_engine(**LLMAPI) as engine:
        record = {
            "backends": [{"url": f"triton://{engine.grpc_address}", "id": "api"}],
            "listeners": {"data": free, "admin": free, "http": free},
        }
        sidecar = await Sidecar.start(parse(record, "the test"))
        try:
            backend = sidecar.gateway.backends["api"]
            await until(lambda: "LLM-API model, which reads adapters from files" in backend.detail())
            assert "backends[].adapters_dir, as in {ours: /mnt/adapters, engine: /mnt/adapters}" in backend.detail()
            assert not sidecar.gateway.state.backends["api"].takes_requests
        finally:
            await sidecar.stop()


async def test_a_folder_that_cannot_be_used_ends_the_start(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """With the folder, the reason and the way out; nothing is left running."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(Misused, match=r"adapters_dir .*/file cannot be used: .*it must be a folder"):
        async with in_front(folders, config={"backend": {"adapters_dir": str(tmp_path / "file")}}):
            pass


@pytest.mark.parametrize("requests", [200, pytest.param(400, marks=pytest.mark.slow)])
async def test_64_adapters_over_small_caches(folders: tuple[Path, Path], requests: int) -> None:
    """An engine that holds 6 of them and a store that holds 10: every answer is its adapter's."""
    names = write_adapters(folders[0], 64)
    size = sum(path.stat().st_size for path in (folders[0] / "a00").iterdir())
    config = {"store": {"memory_bytes": 20 * size}}
    options = {"lora_host_pages": 6, "lora_device_pages": 4, "seats": 8}
    async with in_front(folders, config=config, **options) as (served, (engine,)):
        picked = random.Random(5).choices(names, k=requests)
        limit = asyncio.Semaphore(40)

        async def one(name: str) -> tuple[str, str]:
            async with limit:
                return name, (await told(served, name, 3))[0]

        answers = await asyncio.gather(*(one(name) for name in picked))
        assert [text for name, text in answers] == [answer_of(served, name, 3) for name in picked]
        held = len(staged(folders[1]))
        assert 0 < held < 64, "the store has dropped nothing"
        assert served.recorder.count(Drop) >= served.recorder.count(Fetch) - held
        assert sum(one.weights for one in clients_asked(engine)) > 64, "the engine has evicted nothing"


async def test_an_update_under_load(folders: tuple[Path, Path]) -> None:
    """Every answer is of the old version or of the new one, whole, and of the new one from the switch on."""
    write_adapters(folders[0], 2)
    async with in_front(folders) as (served, _):
        old = answer_of(served, "a00", 4)
        stop = asyncio.Event()
        seen: Counter[str] = Counter()

        async def client() -> None:
            while not stop.is_set():
                seen[(await told(served, "a00"))[0]] += 1

        clients = [asyncio.create_task(client()) for _ in range(8)]
        await until(lambda: seen[old] > 20)
        renewed = write_adapter(folders[0].parent / "renewed", seed=77)
        await served.adapters.Register(admin_pb2.RegisterRequest(name="a00", path=str(renewed), hold_s=3600))
        new = answer_of(served, "a00", 4)
        assert (await told(served, "a00"))[0] == new
        await until(lambda: seen[new] > 20)
        stop.set()
        await asyncio.gather(*clients)
        assert set(seen) == {old, new}


async def test_a_folder_overwritten_by_its_owner(folders: tuple[Path, Path]) -> None:
    """What is staged stays what was registered; it is refused when it must be staged again."""
    write_adapters(folders[0], 1)
    async with in_front(folders) as (served, _):
        before = (await told(served, "a00"))[0]
        write_adapter(folders[0] / "a00", seed=9)
        assert (await told(served, "a00"))[0] == before == answer_of(served, "a00", 4)
        shutil.rmtree(folders[1] / key_of(served, "a00"))
        with pytest.raises(grpc.aio.AioRpcError, match="now holds other content"):
            await told(served, "a00")


async def test_evict_and_again(folders: tuple[Path, Path]) -> None:
    """The folder goes from the disk; the engine, which may still have the adapter, is told where it is anew."""
    write_adapters(folders[0], 2)
    async with in_front(folders) as (served, _):
        for _ in range(3):
            assert (await told(served, "a00"))[0] == answer_of(served, "a00", 4)
            assert staged(folders[1]) == [key_of(served, "a00")]
            await served.adapters.Evict(admin_pb2.AdapterRequest(name="a00"))
            await until(lambda: staged(folders[1]) == [])
        assert served.recorder.count(Fetch) == 3


@pytest.mark.parametrize("decoupled", [True, False])
async def test_files_taken_away_behind_our_back(folders: tuple[Path, Path], decoupled: bool) -> None:
    """The engine says that the path is gone: the files are brought there again, and no client hears of it."""
    write_adapters(folders[0], 1)
    async with in_front(folders, decoupled=decoupled) as (served, (engine,)):
        for _ in range(3):
            assert (await told(served, "a00"))[0] == answer_of(served, "a00", 4)
            shutil.rmtree(folders[1] / key_of(served, "a00"))
        heals = [heal.reason for heal in served.recorder.of(Heal)]
        assert heals == ["engine_miss", "engine_miss"]
        assert (await told(served, "a00"))[1][-1].origin.heals == 1
        assert clients_asked(engine)[-1].outcome == "done"


async def test_a_restart_of_the_engine(folders: tuple[Path, Path]) -> None:
    """It comes back with empty caches and reads the adapters that it is asked for again."""
    write_adapters(folders[0], 2)
    options = ("--protocol", "llmapi", "--compute", "none", "--no-decoupled")
    async with EngineProcess(*options) as engine:
        shared = {"adapters_dir": str(folders[1])}
        async with serving([engine], folders[0], backend=shared) as served:
            assert (await told(served, "a00"))[0] == answer_of(served, "a00", 4)
            await engine.kill()
            await until(lambda: not served.state.backends["trt-0"].takes_requests)
            await engine.start()
            for name in ("a00", "a01", ""):
                assert (await told(served, name))[0] == answer_of(served, name, 4)


async def test_two_sidecars_over_one_folder(folders: tuple[Path, Path]) -> None:
    """What one drops the other still has; when both have left nothing is."""
    write_adapters(folders[0], 1)
    async with in_front(folders) as (one, _):
        async with in_front(folders) as (two, _):
            for served in (one, two):
                assert (await told(served, "a00"))[0] == answer_of(served, "a00", 4)
            await one.adapters.Evict(admin_pb2.AdapterRequest(name="a00"))
            await until(lambda: not one.sidecar.gateway.state.store.entries)
            assert (await told(two, "a00"))[1][-1].origin.heals == 0
        await until(lambda: staged(folders[1]) == [])
        assert (await told(one, "a00"))[0] == answer_of(one, "a00", 4)
    assert staged(folders[1]) == []


async def test_token_ids_and_what_the_model_lacks(folders: tuple[Path, Path]) -> None:
    """They are refused at once, with the way out."""
    write_adapters(folders[0], 1)
    async with in_front(folders) as (served, (engine,)):
        for fields, sentence in (
            ({"tokens": gateway_pb2.TokenIds(ids=[1, 2])}, "send the prompt as text, not as token ids"),
            ({"text": "x", "repetition_penalty": 1.5}, "the backends have no repetition_penalty"),
        ):
            call = served.gateway.Generate(gateway_pb2.GenerateRequest(adapter="a00", **fields))
            with pytest.raises(grpc.aio.AioRpcError, match=sentence) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        sampling = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 7, "stop_words": ["a b", "c"]}
        assert (await told(served, "a00", **sampling))[0] == answer_of(served, "a00", 4)
        assert len(clients_asked(engine)) == 2


async def test_a_request_for_another_kind_of_model(folders: tuple[Path, Path]) -> None:
    """It may have been taken in before the model was seen: it is refused in words, not sent."""
    write_adapters(folders[0], 1)
    async with in_front(folders) as (served, (engine,)):
        gateway = served.sidecar.gateway
        ticket = gateway.submit(RequestFacts("a00"), Payload(CORE, b"", raw=True, unary=False), "", OURSELVES)
        ending = await ticket.next()
        gateway.close(ticket)
        assert isinstance(ending, Settle)
        assert (ending.reason, message_of(ending)) == (
            Reason.BACKEND_REJECTED,
            "the request is for a model of kind triton and this one is triton_llmapi; send it again",
        )
        assert [one.request_id for one in clients_asked(engine)] == ["lora-sidecar-load-1"]


# Triton's own clients.


def llmapi_inputs(tokens: int = 4, streaming: bool = True, **more: Any) -> list[triton.InferInput]:
    """Return the inputs of a request to the LLM-API model, which have no batch dimension."""
    return [
        tensor("text_input", [b"hi"], object),
        tensor("streaming", [streaming], bool),
        tensor("sampling_param_max_tokens", [tokens], np.int32),
        tensor("sampling_param_exclude_input_from_output", [True], bool),
        *(tensor(name, *value) for name, value in more.items()),
    ]


async def test_unmodified_clients(folders: tuple[Path, Path]) -> None:
    """They send the model's own tensors and name the adapter; every response is passed on as it is."""
    write_adapters(folders[0], 1)
    async with (
        in_front(folders) as (served, _),
        aio_client(served.sidecar.data_address) as client,
    ):
        streamed = await ask(client, name="a00", inputs=llmapi_inputs(), request_id="mine")
        whole = answer_of(served, "a00", 4)
        texts = [triton.InferResult(one).as_numpy("text_output")[0].decode() for one in streamed.responses]
        assert texts == [whole[:1], whole[:2], whole[:3], whole]
        assert {response.id for response in streamed.responses} == {"mine"}
        assert streamed.last["lora_version"] == "a00@v1"
        base = await ask(client, inputs=llmapi_inputs(streaming=False))
        assert triton.InferResult(base.responses[-1]).as_numpy("text_output")[0].decode() == answer_of(served, "", 4)


async def test_unary_and_typed_clients(folders: tuple[Path, Path]) -> None:
    """A model that is not decoupled answers unary calls; tensors may travel in `contents`."""
    write_adapters(folders[0], 1)
    async with in_front(folders, decoupled=False) as (served, _):
        whole = answer_of(served, "a00", 4)
        async with aio_client(served.sidecar.data_address) as client:
            answer = await client.infer(CORE, llmapi_inputs(streaming=False), parameters={"lora_name": "a00"})
            assert answer.as_numpy("text_output")[0].decode() == whole
        request = service_pb2.ModelInferRequest(model_name=CORE)
        request.parameters["lora_name"].string_param = "a00"
        contents = request.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents
        contents.bytes_contents.append(b"hi")
        for name, value in (("sampling_param_max_tokens", 4), ("sampling_param_exclude_input_from_output", True)):
            if value is True:
                request.inputs.add(name=name, datatype="BOOL", shape=[1]).contents.bool_contents.append(True)
            else:
                request.inputs.add(name=name, datatype="INT32", shape=[1]).contents.int_contents.append(value)
        async with channel_to(served.sidecar.data_address) as stub:
            typed = await stub.ModelInfer(request)
        assert triton.InferResult(typed).as_numpy("text_output")[0].decode() == whole


@pytest.mark.parametrize("name", ["lora_id", "lora_name", "lora_path", "lora_ckpt_source"])
@pytest.mark.parametrize("named", [True, False])
async def test_a_clients_own_adapter(folders: tuple[Path, Path], name: str, named: bool) -> None:
    """No client may have the engine read a path of its choice."""
    write_adapters(folders[0], 1)
    value: tuple[list[Any], Any] = ([7], np.uint64) if name == "lora_id" else ([b"/etc"], object)
    async with in_front(folders) as (served, (engine,)), aio_client(served.sidecar.data_address) as client:
        answer = await ask(client, name="a00" if named else None, inputs=llmapi_inputs(**{name: value}))
        assert len(answer.errors) == 1
        assert ("drop the lora_* tensors" if named else "of its own; name the adapter") in answer.errors[0]
        assert not clients_asked(engine)


async def test_an_old_id_stands_for_a_name(folders: tuple[Path, Path]) -> None:
    """As it does for the core model: all that the client says of the adapter is replaced."""
    write_adapters(folders[0], 1)
    config = {"legacy_task_ids": {"7": "a00"}}
    async with in_front(folders, config=config) as (served, _), aio_client(served.sidecar.data_address) as client:
        own = {"lora_id": ([7], np.uint64), "lora_name": ([b"x"], object), "lora_path": ([b"/old"], object)}
        answer = await ask(client, inputs=llmapi_inputs(**own))
        texts = [triton.InferResult(one).as_numpy("text_output")[0].decode() for one in answer.responses]
        assert texts[-1] == answer_of(served, "a00", 4)


# Both kinds of model in one pool.


async def test_a_mixed_pool(folders: tuple[Path, Path]) -> None:
    """Each request goes where it can be understood; text goes to both, and is answered with the same adapter."""
    names = write_adapters(folders[0], 4)
    async with (
        running_engine(compute="none") as core,
        running_engine(**LLMAPI, decoupled=False) as api,
        mixed(folders, core, api) as served,
    ):
        for name in names:
            assert (await served.ask(name, 4)).tokens == served.expected(name, 4)
        assert not clients_asked(api)
        before = len(clients_asked(core))
        texts = [(name, await told(served, name, 4)) for name in names * 8]
        for name, (text, messages) in texts:
            packed = bytes(served.expected(name, 4)).decode()
            expected = {"core": packed, "api": answer_of(served, name, 4)}
            assert text == expected[messages[-1].origin.backend]
            assert len(messages) == {"core": 4, "api": 1}[messages[-1].origin.backend]
        assert {messages[-1].origin.backend for _, (_, messages) in texts} <= {"core", "api"}
        async with aio_client(served.sidecar.data_address) as client:
            for _ in range(4):
                llmapi = await ask(client, name="a01", inputs=llmapi_inputs(streaming=False))
                assert parameters_of(llmapi.responses[-1])["lora_backend"] == "api"
                ensemble = await ask(client, "ensemble", "a01", inputs=text_inputs())
                assert ensemble.last["lora_backend"] == "core"
                ids = await ask(client, name="a01", inputs=core_inputs())
                assert ids.last["lora_backend"] == "core"
        assert len(clients_asked(core)) > before
        assert len(clients_asked(api)) >= 4


async def test_a_mixed_pool_loses_one_kind(folders: tuple[Path, Path]) -> None:
    """Text goes on with the other; what only the lost kind understands waits for it."""
    write_adapters(folders[0], 1)
    async with (
        running_engine(**LLMAPI) as api,
        EngineProcess("--compute", "none") as core,
        mixed(folders, core, api) as served,
    ):
        await core.kill()
        await until(lambda: not served.state.backends["core"].takes_requests)
        text, messages = await told(served, "a00")
        assert (text, messages[-1].origin.backend) == (answer_of(served, "a00", 4), "api")
        waiting = asyncio.create_task(served.ask("a00", 4))
        await until(lambda: bool(served.state.requests))
        await core.start()
        assert (await waiting).tokens == served.expected("a00", 4)


@asynccontextmanager
async def mixed(folders: tuple[Path, Path], core: Any, api: Any) -> AsyncIterator[Serving]:
    """Run a sidecar in front of an engine with a core model and one with an LLM-API model."""
    backends = [
        {"url": f"triton://{core.grpc_address}", "id": "core"},
        {"url": f"triton://{api.grpc_address}", "id": "api", "adapters_dir": str(folders[1])},
    ]
    async with serving([], folders[0], backends=backends) as served:
        yield served
