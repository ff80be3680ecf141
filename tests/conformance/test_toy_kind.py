"""A backend kind is one folder and one registry line: the toy kind behind every front, beside an emulated Triton."""

from __future__ import annotations

import asyncio
import re
import struct
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
import yaml
from tritonclient.grpc import service_pb2

import policies
import sidecar
from sidecar.backends import registry
from sidecar.backends.registry import kind_named
from sidecar.config import parse, plugins
from sidecar.core.effects import Heal
from sidecar.errors import Misused
from sidecar.proto import gateway_pb2
from sidecar.serve.pool import facts_of
from tests.conformance.toy.engine import ToyEngine, answer, content_of, text_of
from tests.kit.cli_runs import Ended, runner
from tests.kit.emulated import channel_to, core_request, running_engine, set_parameter, stream_answers, tokens_of
from tests.kit.entries import entries
from tests.kit.peft_files import BASE_MODEL
from tests.kit.serving import Serving, serving, until, write_adapters

TOY = "tests.conformance.toy.kind:TOY"
PROMPT, COUNT = "two plus two", 4
FILES = ["README.md", "__init__.py", "asking.py", "backend.py", "engine.py", "kind.py"]


def by_registry_line(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Add the registry line; entries need nothing then."""
    monkeypatch.setitem(registry.KINDS, "toy", TOY)
    return {}


def by_its_module(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Name the record in the configuration, as another package's."""
    return {"kind": TOY}


def by_entry_point(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Install a package that offers it."""
    point = EntryPoint("backend.toy", TOY, plugins.GROUP)
    monkeypatch.setattr(plugins, "_plugged_in", lambda: (point,))
    return {}


WAYS = (by_registry_line, by_its_module, by_entry_point)
Way = Callable[[pytest.MonkeyPatch], dict[str, str]]


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test names is not known to the next."""
    monkeypatch.setattr(registry, "_from_elsewhere", {})


@asynccontextmanager
async def in_front(
    tmp_path: Path, entry: Mapping[str, Any], speaks: Sequence[str] = ("toy",), beside: bool = False
) -> AsyncIterator[tuple[Serving, list[ToyEngine]]]:
    """Serve two adapters from toy engines, `toy-0` and so on; `beside` adds an emulated Triton, `trt`."""
    write_adapters(tmp_path / "adapters", 2)
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    base = {"name": BASE_MODEL, "chat_template": str(tmp_path / "chat.jinja")}
    shared = {"base_model": base, "adapters_dir": str(tmp_path / "shared"), "progress_timeout_s": 2}
    engines, backends = [ToyEngine(each) for each in speaks], []
    async with AsyncExitStack() as stack:
        for number, engine in enumerate(engines):
            await engine.start()
            stack.push_async_callback(engine.kill)
            place = {"url": f"toy://{engine.address}", "id": f"toy-{number}", "speaks": engine.speaks}
            backends.append({**shared, **place, **entry})
        if beside:
            triton = await stack.enter_async_context(running_engine(compute="none"))
            backends.append({"url": f"triton://{triton.grpc_address}", "id": "trt", "base_model": base})
        yield await stack.enter_async_context(serving([], tmp_path / "adapters", backends=backends)), engines


def said(tmp_path: Path, name: str, prompt: str = PROMPT, count: int = COUNT) -> list[int]:
    """Return the tokens of the toy engine's answer; of text it takes the bytes."""
    return answer(content_of(tmp_path / "adapters" / name) if name else "", prompt.encode(), count)


async def generate(served: Serving, **request: Any) -> tuple[str, list[int], Any]:
    """Return the text and the token ids of an answer, and where it came from."""
    text, ids, origin = "", [], None
    async for reply in served.gateway.Generate(gateway_pb2.GenerateRequest(max_tokens=COUNT, **request)):
        text, origin = text + reply.text, reply.origin
        ids += reply.token_ids
    return text, ids, origin


def kserve_request(name: str) -> Any:
    """Return a request as a client of the toy engine's KServe model writes it."""
    request = service_pb2.ModelInferRequest(model_name="toy_kserve", id="mine")
    for tensor, datatype, data in (
        ("text_input", "BYTES", struct.pack("<I", len(PROMPT)) + PROMPT.encode()),
        ("max_tokens", "INT32", struct.pack("<i", COUNT)),
    ):
        request.inputs.add(name=tensor, datatype=datatype, shape=[1])
        request.raw_input_contents.append(data)
    if name:
        set_parameter(request, "lora_name", name)
    return request


def text_in(response: Any) -> str:
    return bytes(response.raw_output_contents[0][4:]).decode()


def test_it_is_one_folder() -> None:
    """Nothing of the product knows the kind, and the kind is these files."""
    for package in (sidecar, policies):
        for file in Path(package.__path__[0]).rglob("*.py"):
            assert not re.search(r"\btoy(_kserve)?\b", file.read_text(), re.IGNORECASE), f"{file} knows the toy kind"
    folder = Path(__file__).parent / "toy"
    assert sorted(file.name for file in folder.iterdir() if file.name != "__pycache__") == FILES


@pytest.mark.parametrize("way", WAYS)
async def test_generate_and_openai(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Way) -> None:
    """By `Generate` with text and with token ids, by completions and chats, whole and streamed, by adapter."""
    async with in_front(tmp_path, way(monkeypatch)) as (served, _):
        for name in ("", "a00", "a01"):
            tokens = said(tmp_path, name)
            text, _, origin = await generate(served, adapter=name, text=PROMPT)
            assert (text, origin.output_tokens, origin.backend) == (text_of(tokens), COUNT, "toy-0")
            ids = gateway_pb2.TokenIds(ids=PROMPT.encode())
            assert (await generate(served, adapter=name, tokens=ids))[1] == tokens
        client = openai.AsyncOpenAI(base_url=f"http://{served.sidecar.http_address}/v1", api_key="none", max_retries=0)
        async with client:
            whole = await client.completions.create(model="a00", prompt=PROMPT, max_tokens=COUNT)
            assert whole.choices[0].text == text_of(said(tmp_path, "a00"))
            stream = await client.completions.create(model="a01", prompt=PROMPT, max_tokens=COUNT, stream=True)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == text_of(said(tmp_path, "a01"))
            user: Any = [{"role": "user", "content": "hi"}]
            chat = await client.chat.completions.create(model="a00", messages=user, max_tokens=COUNT)
            assert chat.choices[0].message.content == text_of(said(tmp_path, "a00", "<user>hi"))
            with pytest.raises(openai.BadRequestError, match="has no stop words"):
                await client.completions.create(model="a00", prompt=PROMPT, stop="w")


async def test_kserve_in_one_pool_with_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client's own request goes to the engine that has its model, by one call and by a stream."""
    async with (
        in_front(tmp_path, by_registry_line(monkeypatch), ("toy", "kserve"), beside=True) as (served, _),
        channel_to(served.sidecar.data_address) as stub,
    ):
        for name in ("", "a00", "a01"):
            text = text_of(said(tmp_path, name))
            whole = await stub.ModelInfer(kserve_request(name))
            assert (whole.id, text_in(whole)) == ("mine", text)
            assert whole.parameters["lora_backend"].string_param == "toy-1"
            call = stub.ModelStreamInfer()
            await call.write(kserve_request(name))
            await call.done_writing()
            parts = [message.infer_response async for message in call]
            assert "".join(map(text_in, parts)) == text
            assert [part.parameters["triton_final_response"].bool_param for part in parts] == [False] * 3 + [True]
        others = await stream_answers(stub, core_request(tokens=COUNT, streaming=True, lora_name="a00"))
        assert tokens_of(others) == served.expected("a00", COUNT)
        assert others[0].infer_response.parameters["lora_backend"].string_param == "trt"
        assert (await stub.ServerReady(service_pb2.ServerReadyRequest())).ready
        wrong = kserve_request("a00")
        wrong.raw_input_contents[1] = struct.pack("<i", 0)
        with pytest.raises(grpc.aio.AioRpcError, match="max_tokens is 0; at least 1 is taken") as refused:
            await stub.ModelInfer(wrong)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_one_request_for_two_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Generate` is answered by whichever kind has room: each takes the request in its own words."""
    async with in_front(tmp_path, by_its_module(monkeypatch), beside=True) as (served, engines):
        engines[0].step_s = 0.02
        ids = gateway_pb2.TokenIds(ids=PROMPT.encode())
        answers = await asyncio.gather(*(generate(served, adapter=f"a0{n % 2}", tokens=ids) for n in range(12)))
        for number, (_, tokens, origin) in enumerate(answers):
            name = f"a0{number % 2}"
            right = said(tmp_path, name) if origin.backend == "toy-0" else served.expected(name, COUNT)
            assert tokens == right, origin
        assert {origin.backend for _, _, origin in answers} == {"toy-0", "trt"}


async def test_misses_heal_and_restarts_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine forgets is loaded again at no client's cost, and so is all of it after a restart."""
    async with in_front(tmp_path, by_registry_line(monkeypatch)) as (served, engines):
        (engine,) = engines
        await generate(served, adapter="a00", text=PROMPT)
        engine.lose_adapters()
        text, _, origin = await generate(served, adapter="a00", text=PROMPT)
        assert (text, origin.heals) == (text_of(said(tmp_path, "a00")), 1)
        assert [heal.reason for heal in served.recorder.of(Heal)] == ["engine_miss"]
        await engine.kill()
        await until(lambda: not served.state.backends["toy-0"].takes_requests)
        waiting = asyncio.create_task(generate(served, adapter="a00", text=PROMPT))
        await engine.start()
        text, _, _ = await waiting
        assert text == text_of(said(tmp_path, "a00"))


# The command line.


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    return runner(capfd)


@pytest.mark.parametrize("way", WAYS)
async def test_the_command_line_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Way, command: Callable[..., Ended]
) -> None:
    """`backends list` and `show` say what there is of an engine of the kind, and `backends check` that it has none."""
    async with in_front(tmp_path, way(monkeypatch)) as (served, engines):
        await generate(served, adapter="a00", text=PROMPT)
        admin = ("--admin", served.sidecar.admin_address)
        listed = await asyncio.to_thread(command, "backends", "list", *admin)
        assert (listed.code, listed.err) == (0, "")
        assert "toy-0" in listed.out
        shown = await asyncio.to_thread(command, "backends", "show", "toy-0", *admin)
        assert f"toy://{engines[0].address}" in shown.out
        assert re.search(r"adapters +1 open, at most \d+ at once; the engine has 2 slots", shown.out), shown.out


@pytest.mark.parametrize("way", WAYS)
def test_the_configuration_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Way, command: Callable[..., Ended]
) -> None:
    """`config check` takes its keys, says what is missing, and refuses what is wrong by the key's name."""
    entry = way(monkeypatch)
    file = tmp_path / "config.yaml"

    def check(**keys: Any) -> Ended:
        file.write_text(yaml.safe_dump({"backends": [{"url": "toy://127.0.0.1:9", **entry, **keys}]}))
        return command("config", "check", str(file))

    good = check(speaks="kserve")
    assert good.code == 0, good
    assert "adapters_dir: without it the engine serves its base model only" in good.out + good.err
    wrong = check(speaks="klingon")
    assert wrong.code != 0
    assert "backends.0.speaks" in wrong.err
    assert "unknown key backends.0.api_key_file" in check(api_key_file="/key").err
    assert "engine.tp is for triton:// backends only: a toy engine has one rank" in check(engine={"tp": 2}).err
    check()
    assert "1 not looked at" in command("config", "check", "--connect", str(file)).out
    looked = command("backends", "check", "toy://127.0.0.1:9", "--config", str(file))
    assert "those behind triton://HOST:PORT or vllm://HOST:PORT or trtllm://HOST:PORT can" in looked.err


def test_one_entry_that_names_it_makes_it_known() -> None:
    """The next one has it by its scheme; however it is named, it is one kind."""
    one, two, three = entries(
        {"url": "toy://h:1", "kind": TOY}, {"url": "toy://h:2"}, {"url": "toy://h:3", "kind": "toy"}
    )
    assert {kind_named(each.kind_name) for each in (one, two, three)} == {kind_named(TOY)}
    assert set(facts_of([one, two, three])) == {"h:1", "h:2", "h:3"}
    assert [kind.name for kind in registry.kinds()] == ["triton", "vllm", "trtllm", "toy"]


def test_a_record_that_is_none_is_refused() -> None:
    """The error names what was written and what it must be."""
    for target, why in (
        ("tests.conformance.toy.kind:MODEL", "is not a backends.kind.Kind"),
        ("no.such:X", "No module"),
    ):
        with pytest.raises(Misused, match=re.escape(target)) as refused:
            registry.entries_of(parse({"backends": [{"url": "toy://h:1", "kind": target}]}, "the test"))
        assert why in refused.value.message
    assert "tests.conformance.toy.kind" in sys.modules
