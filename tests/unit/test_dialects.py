"""How models want to be asked: found from their inputs, and written so that a parser joins it with a request."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from tritonclient.grpc import model_config_pb2, service_pb2

from sidecar.backends.api import Reply
from sidecar.backends.triton.asking import LLMAPI
from sidecar.backends.triton.dialects import AdaptersDir, LlmApi, TensorRtLlm, dialect_of
from sidecar.config.backends import Backend
from sidecar.core.effects import Dispatch, Load
from sidecar.core.enums import Cache
from sidecar.core.facts import Packed
from sidecar.errors import Misused
from tests.kit.entries import entries

SHARED = AdaptersDir(Path("/ours"), "/mnt/adapters/")
DIGEST = "5f" * 32
KEY = f"{DIGEST}.files.p1.g0"
CORE_INPUTS = ("input_ids", "lora_task_id", "lora_weights", "lora_config")
LLMAPI_INPUTS = ("text_input", "sampling_param_max_tokens", "lora_id", "lora_name", "lora_path")


def config(*inputs: str, max_batch_size: int = 0) -> Any:
    return model_config_pb2.ModelConfig(
        name="tensorrt_llm", max_batch_size=max_batch_size, input=[{"name": name} for name in inputs]
    )


def dispatch(key: str = KEY) -> Dispatch:
    task_id = 2**62 + 5 if key else 0
    name, digest = ("sql", DIGEST) if key else ("", "")
    return Dispatch(3, 1, "trt-0", name, digest, 1, task_id, Cache.RESIDENT, 0, 0, 0, packed_key=key)


def element(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode()


def test_the_kind_is_found_from_the_inputs() -> None:
    """With and without inputs for adapters."""
    assert dialect_of(config(*CORE_INPUTS, max_batch_size=64), None) == TensorRtLlm(serves_adapters=True)
    assert dialect_of(config("input_ids", max_batch_size=64), None) == TensorRtLlm(serves_adapters=False)
    assert dialect_of(config("text_input", "lora_weights", max_batch_size=64), SHARED).kind == "triton"
    found = dialect_of(config(*LLMAPI_INPUTS), SHARED)
    assert (found, found.kind, found.serves_adapters) == (LlmApi(SHARED), "triton_llmapi", True)
    bare = dialect_of(config("text_input", "sampling_param_max_tokens"), SHARED)
    assert (bare.kind, bare.serves_adapters) == ("triton_llmapi", False)


def test_a_model_that_cannot_be_asked_as_things_are() -> None:
    """It is said what to change, and where."""
    with pytest.raises(Misused, match=r"backends\[\].adapters_dir, as in {ours: /mnt/adapters, engine: /mnt/adapters}"):
        dialect_of(config(*LLMAPI_INPUTS), None)
    with pytest.raises(Misused, match=r"set triton_config.max_batch_size: 0 in its model.yaml"):
        dialect_of(config(*LLMAPI_INPUTS, max_batch_size=8), SHARED)


@pytest.mark.parametrize("raw", [True, False])
def test_an_adapter_is_added_to_a_request(raw: bool) -> None:
    """In the form of the client's own tensors; a later id wins and inputs are joined."""
    head = service_pb2.ModelInferRequest(model_name="tensorrt_llm", id="mine")
    head.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    if raw:
        head.raw_input_contents.append(element("hi"))
    else:
        head.inputs[0].contents.bytes_contents.append(b"hi")
    fragment = LlmApi(SHARED).fragment("3.1", dispatch(), raw, stream=True)
    whole = service_pb2.ModelInferRequest.FromString(head.SerializeToString() + fragment)
    assert whole.id == "3.1"
    assert whole.parameters["triton_enable_empty_final_response"].bool_param
    inputs = [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in whole.inputs]
    assert inputs[1:] == [("lora_id", "UINT64", [1]), ("lora_name", "BYTES", [1]), ("lora_path", "BYTES", [1])]
    texts = (f"sql@{DIGEST[:12]}", f"/mnt/adapters/{KEY}")
    if raw:
        assert list(whole.raw_input_contents[1:]) == [struct.pack("<Q", 2**62 + 5), *map(element, texts)]
    else:
        assert not whole.raw_input_contents
        assert list(whole.inputs[1].contents.uint64_contents) == [2**62 + 5]
        assert tuple(tensor.contents.bytes_contents[0].decode() for tensor in whole.inputs[2:]) == texts


@pytest.mark.parametrize("dialect", [TensorRtLlm(), LlmApi(SHARED), LlmApi(None)])
def test_the_base_model_needs_no_more_than_an_id(dialect: Any) -> None:
    """Without `stream` nothing is asked of the end either."""
    fragment = service_pb2.ModelInferRequest.FromString(dialect.fragment("3.1", dispatch(""), True, stream=False))
    assert fragment == service_pb2.ModelInferRequest(id="3.1")


def test_a_load_and_a_probe() -> None:
    """One token each; the load with all that the engine must know of the adapter."""
    dialect = LlmApi(SHARED)
    probe = dialect.probe("api", "p")
    assert (probe.model_name, probe.id) == ("api", "p")
    assert [tensor.name for tensor in probe.inputs] == ["text_input", "sampling_param_max_tokens"]
    load = dialect.load("api", Load(9, "trt-0", "sql", DIGEST, Packed(KEY, 77, 10, 1)))
    assert load.id == "lora-sidecar-load-9"
    assert load.parameters["lora_name"].string_param == "sql"
    assert list(load.raw_input_contents[:2]) == list(probe.raw_input_contents)
    assert list(load.raw_input_contents[2:]) == [
        struct.pack("<Q", 77), element(f"sql@{DIGEST[:12]}"), element(f"/mnt/adapters/{KEY}"),
    ]  # fmt: skip


def reply(text: str | None, final: bool) -> Reply:
    """Return a response of the LLM-API model; without a text it has no outputs."""
    message = service_pb2.ModelInferResponse()
    if text is not None:
        message.outputs.add(name="text_output", datatype="BYTES", shape=[1])
        message.raw_output_contents.append(struct.pack("<I", len(text.encode())) + text.encode())
    return Reply(b"", message, final)


def shared_folder(value: Any) -> Backend:
    return entries({"url": "triton://h:1", "adapters_dir": value})[0]


def test_the_shared_folder_in_the_configuration() -> None:
    """One path where it is the same on both sides, or each side's own."""
    same = shared_folder("/mnt/a").adapters_dir
    two = shared_folder({"ours": "/mnt/a", "engine": "/models/a"}).adapters_dir
    assert same is not None
    assert two is not None
    assert same.shared_dir == AdaptersDir(Path("/mnt/a"), "/mnt/a")
    assert two.shared_dir == AdaptersDir(Path("/mnt/a"), "/models/a")
    for wrong, words in (
        ("./relative", "backends.0.adapters_dir: it must be an absolute path"),
        ({"ours": "a", "engine": "/a"}, "backends.0.adapters_dir.ours: it must be an absolute path"),
        ({"ours": "/a"}, "adapters_dir.engine: Field required"),
        ({"ours": "/a", "engine": "/a", "engines": "/b"}, "unknown key backends.0.adapters_dir.engines; did you mean"),
    ):
        with pytest.raises(Misused, match=words):
            shared_folder(wrong)


@pytest.mark.parametrize(
    ("texts", "pieces"),
    [
        (["a", "ab", "abc"], ["a", "b", "c"]),
        (["a", "a\ufffd", "a\ufffd\ufffd", "aß"], ["a", "", "", "ß"]),
        (["\ufffd", "\ufffdx", "\ufffdx\ufffd"], ["", "\ufffdx", "\ufffd"]),
        (["abc"], ["abc"]),
        (["", "a", "a"], ["", "a", ""]),
    ],
)
def test_a_text_that_comes_whole_each_time(texts: list[str], pieces: list[str]) -> None:
    """Its news are told once; what may still become another letter waits for it, or for the end."""
    reader = LLMAPI.reader(True)
    told = [reader.read(reply(text, number == len(texts) - 1)).text for number, text in enumerate(texts)]
    assert told == pieces
    assert "".join(told) == texts[-1]


def test_an_end_without_data() -> None:
    """What was held back is told then."""
    reader = LLMAPI.reader(True)
    assert [reader.read(each).text for each in (reply("a\ufffd", False), reply(None, True))] == ["a", "\ufffd"]
