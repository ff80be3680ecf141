"""SGLang's server (texts of 0.5.23).

A request names an adapter as `BASE:NAME`; any other name that is unknown is answered by the base model. A load is into
the host's memory, and the first request copies it to a slot. That request ends the server if a tensor has a wrong
shape or a module cannot be placed. So each adapter is checked against the model before it is loaded. It gets one rank
and one scale. Then its packed weights are sent, or it is rewritten into a folder that both see.

Tensors travel as a pickle whose storage is a zip, as `torch.save` writes both: `tensors_of` writes them around the
bytes of the packed rows, which are not copied. The server's `SafeUnpickler` admits the few globals that it uses.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import re
import struct
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, ClassVar, Self
from zlib import crc32

import numpy as np
import numpy.typing as npt
from pydantic import model_validator

from sidecar.adapters.base_model import read_base_model
from sidecar.adapters.canonical import NAMES
from sidecar.adapters.modules import MODULE_IDS
from sidecar.backends.api import HttpForm, Weights
from sidecar.backends.faults import Wrote, nobody_wrote
from sidecar.backends.gauges import count_of, sum_of
from sidecar.backends.http_client import JSON, PIECE_BYTES, Reply, WireError
from sidecar.backends.kind import Ask, Asking, ModelKind, Native
from sidecar.backends.openai.asking import IdsReader, completion
from sidecar.backends.openai.dialect import Dialect, Found, Measures
from sidecar.backends.openai.events import message_of
from sidecar.backends.openai.paths import CHAT, COMPLETIONS
from sidecar.backends.openai.server import PROBE_TIMEOUT_S, OpenAiServer
from sidecar.config.backends import Backend as Entry
from sidecar.core.enums import Fault
from sidecar.core.facts import EngineFacts
from sidecar.core.layout import DTYPE_BYTES, FUSED

LOADS = "/v1/loads?include=all"
MISSES = (
    "LoRA adapter that has never been loaded",
    "Failed to implicitly load LoRA adapter",
    "requested LoRA adapters are not loaded",
)
ALREADY = "because it is already loaded"
NAMES_OF_OTHERS = (
    r"(?:\n|\\n)?\s*(?:All loaded|Loaded) (?:adapters|LoRAs): o?(?:dict_keys\(\[.*?\]\))?\.?",
    r"\s*LoRA registry is: \{.*?\}",
    r"(?<=Error while unloading LRU LoRA adapter )'[^']*'",
    r"(?:\n|\\n){2}  File (?:[^\"\\]|\\.)*",
)
"""What its errors say of other adapters, and of its own files, in a text or in JSON."""
UNKNOWN = re.compile(r"LoRA with name .* does not exist")
PLACED = frozenset(name for name, path in NAMES.items() if name not in FUSED and "{}" not in path)
"""The modules that are sent: fused ones are sent in parts, which it stacks itself."""
TOGETHER = (("mlp_gate", "mlp_h_to_4h"), ("attn_q", "attn_v"), ("attn_k", "attn_q"), ("attn_v", "attn_q"))
"""Modules that it stacks: each needs the other in the same adapter."""
_REFUSED = {
    "lora_path": 'the sidecar names the adapter to the engine itself; name it in "model"',
    "rid": "the engine knows requests by it, and one client could end another's",
    "input_ids": "ids that the model does not have would end the engine, and they are not counted; send messages",
    "input_embeds": "they are not checked; send messages or a prompt",
    **dict.fromkeys(
        ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        'SGLang ignores it and answers without; send "response_format", "regex" or "ebnf"',
    ),
}


LARGEST = {"logprobs": 20, "top_logprobs": 20, "top_k": (1 << 31) - 1}
"""Numbers above which SGLang ends; OpenAI's bounds where it has one."""


def why_not_client(path: str, members: Mapping[str, Any]) -> tuple[str, str]:
    """Return the first member of a client's body that must not reach the server, and why; ("", "") if all may."""
    for name, value in members.items():
        if name in _REFUSED:
            return name, f'"{name}" cannot be sent: {_REFUSED[name]}'
        if name in LARGEST and isinstance(value, int | float) and abs(value) > LARGEST[name]:
            return name, f'"{name}" may be {LARGEST[name]} at most: a larger one would end SGLang'
    return "", ""


def _write(ask: Ask, streams: bool) -> HttpForm:
    return completion(ask, streams, return_token_ids=True)


MODEL = ModelKind(
    name="sglang",
    title="SGLang",
    native=Native.OPENAI,
    asking=Asking(_write, lambda ask: "", IdsReader),
    why_not_client=why_not_client,
    salted=(COMPLETIONS, CHAT),
    page_is_adapter=True,
    pages="the engine keeps {host} in memory (max_loaded_loras) and has {device} slots (max_loras_per_batch, less one)",
)
KEY_FIX = "config.yaml: api_key_file: a file with the key of SGLang's --api-key and --admin-api-key, which must be one"
BODY_BYTES_MAX = (1 << 32) - (1 << 20)
"""Of packed weights: the zip around them counts in 32 bits."""
_SAYS = "SGLang says it itself"
_SIZES = "sizes are read from base_model.config"


class SglangEntry(Entry):
    """An SGLang server, by `sglang://HOST:PORT`; `sglangs://HOST:PORT` by TLS.

    Adapters need `base_model.config`: an adapter of other sizes ends the engine, so each is checked against the model
    first. Weights are sent, or read by the engine from `adapters_dir` if there is one. `api_key_file` has the key that
    it wants. The calls for adapters want the admin's key if there is one, so its other calls must want the same.
    """

    SCHEMES: ClassVar = {"sglang": False, "sglangs": True}
    ELSEWHERE: ClassVar = {
        "triton://": {
            "model": "SGLang serves one model, and is asked what it calls it",
            "text_model": "SGLang takes text and tokens by one model",
            "models": "SGLang serves one model, and is asked what it calls it",
            "metrics": "SGLang is asked at its own url, under /v1/loads",
            "weights_transport": "SGLang is sent weights over HTTP, or reads them from adapters_dir",
            "engine.config": "it names TensorRT-LLM's config.json; SGLang says itself what it was started with",
            "engine.modules": _SIZES,
            "engine.rank_multiple": "SGLang pads ranks itself",
            "engine.heads": _SIZES,
            "engine.kv_heads": _SIZES,
            "engine.head_size": _SIZES,
        },
        "vllm://": {"old_versions": "it is about versions of vLLM"},
        "trtllm://": {
            "lora_config": _SAYS,
            "host_versions_max": "SGLang frees what it unloads",
            "host_versions_on_limit": "SGLang frees what it unloads",
            "restart": "SGLang frees what it unloads",
        },
    }

    api_key_file: str | None = None

    def files(self) -> dict[str, str | None]:
        return super().files() | {"api_key_file": self.api_key_file}

    @model_validator(mode="after")
    def _can_check_adapters(self) -> Self:
        if self.adapters_dir is not None and (self.base_model is None or self.base_model.config is None):
            raise ValueError(
                "base_model.config: with adapters_dir it is needed: name the base model's folder, for an adapter of "
                "other sizes ends the engine"
            )
        return self


class Sglang(Dialect):
    """A registering server."""

    model = MODEL
    section = SglangEntry
    start = "python -m sglang.launch_server --model-path …"
    port = 30000
    load_path = "/load_lora_adapter"
    send_path = "/load_lora_adapter_from_tensors"
    unload_path = "/unload_lora_adapter"
    health_path = LOADS
    options: ClassVar = {
        "device_pages": "max_loras_per_batch",
        "host_pages": "max_loaded_loras",
        "rank_max": "max_lora_rank",
        "seats": "max_running_requests",
    }
    metrics_fix = f"have a proxy pass {LOADS} on"
    counts_steps = False
    is_particular = True
    sent_root = "__tensor__"
    id_member = "rid"
    has_admin_key = True
    enable = "python -m sglang.launch_server … --enable-lora --max-lora-rank R --lora-target-modules all"
    hidden = re.compile("|".join(NAMES_OF_OTHERS).encode(), re.DOTALL)

    async def recognise(self, server: OpenAiServer) -> str:
        return f"SGLang {(await self._info(server))['version']}"

    async def _info(self, server: OpenAiServer) -> dict[str, Any]:
        """Return what it was started with. Raises Misused if this is no SGLang, or one that cannot be served."""
        reply = await server.get("/server_info")
        if reply.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise server.unusable(f"it wants another API key: /server_info answers {reply.status}", KEY_FIX)
        try:
            record = reply.json()
        except ValueError:
            record = None
        if not isinstance(record, dict) or "version" not in record or "max_loras_per_batch" not in record:
            raise server.unusable("it does not answer /server_info as SGLang does: is another server there?")
        if (record.get("tokenizer_worker_num") or 1) > 1:
            raise server.unusable(
                "it was started with --tokenizer-worker-num above 1, where each worker knows its own adapters only "
                "(sglang#31084); start it with one",
                f"{self.start}   (without --tokenizer-worker-num)",
            )
        if (record.get("dp_size") or 1) > 1:
            raise server.unusable(
                "it was started with --dp-size above 1, where it loads no adapters; start one a rank",
                f"{self.start}   (without --dp-size)",
            )
        return record

    async def identify(self, server: OpenAiServer, entry: SglangEntry) -> Found:
        info = await self._info(server)
        takes_none = ""
        if not info.get("enable_lora"):
            takes_none = f"it was started without LoRA; start it with {self.enable.partition('… ')[2]}"
        states = info.get("internal_states") or [{}]
        return Found(
            await server.models(),
            f"SGLang {info['version']}",
            slots=max(1, info["max_loras_per_batch"] - 1),  # the base model takes one
            host_pages=info.get("max_loaded_loras"),
            rank_max=info.get("max_lora_rank"),
            seats=_whole(states[0].get("effective_max_running_requests_per_dp")),
            ranks=info.get("tp_size") or 1,
            takes_none=takes_none,
            modules=_modules(info.get("lora_target_modules")),
        )

    async def measures(self, server: OpenAiServer) -> Measures:
        """Return its own numbers; it counts no steps."""
        try:
            record = await server.record(LOADS)
            loads = record["loads"]
            return Measures(
                kv_tokens=sum_of(load["max_total_num_tokens"] for load in loads),
                kv_used=sum_of(load["num_used_tokens"] for load in loads),
                inside=sum_of(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads),
                has_lora=any("lora" in load for load in loads),
            )
        except (WireError, KeyError, TypeError):
            return Measures()

    def model_name(self, base: str, name: str) -> str:
        return f"{base}:{name}"

    def fault_of(self, status: int, text: str, wrote: Wrote = nobody_wrote) -> Fault:
        if any(miss in text and not wrote(miss) for miss in MISSES):
            return Fault.MISS
        return Fault.LOST if status == HTTPStatus.SERVICE_UNAVAILABLE else Fault.REJECTED

    async def abort(self, server: OpenAiServer, run_id: str) -> None:
        await server.client.post("/abort_request", {"rid": run_id}, PROBE_TIMEOUT_S)

    def refusal(self, reply: Reply) -> str:
        try:
            text = str(reply.json()["error_message"])
        except (ValueError, KeyError, TypeError):
            text = message_of(reply.body)
        return re.sub("|".join(NAMES_OF_OTHERS), "", text, flags=re.DOTALL)

    def is_loaded(self, reply: Reply) -> bool:
        return reply.is_ok or ALREADY in self.refusal(reply)

    async def forget(self, server: OpenAiServer, name: str, path: str, timeout_s: float) -> bool:
        reply = await self.unload(server, name, timeout_s)
        return reply.is_ok or UNKNOWN.search(self.refusal(reply)) is not None

    async def send(
        self,
        server: OpenAiServer,
        name: str,
        weights: Weights,
        found: Found,
        declared: EngineFacts,
        timeout_s: float,
    ) -> Reply:
        assert declared.modules is not None
        rows = _rows(np.frombuffer(weights.config, np.int32).reshape(-1, 3), declared.modules)
        parts = await asyncio.to_thread(_read, weights, rows)
        record = {"lora_name": name, "config_dict": _config(rows), "serialized_named_tensors": []}
        pieces, size_bytes = _body(record, parts, found.ranks)
        return await server.client.post_pieces(self.send_path, pieces, size_bytes, JSON, timeout_s)

    def declare(self, entry: SglangEntry, declared: EngineFacts) -> EngineFacts:
        facts = replace(declared, unloads="weights", together=TOGETHER, one_rank=True)
        if entry.adapters_dir is not None:
            facts = replace(facts, reads_files=True, canonical_files=True)
        else:
            facts = replace(facts, message_bytes_max=BODY_BYTES_MAX)
        named = None if entry.base_model is None else entry.base_model.config
        if named is None:
            return replace(facts, base_only=True)
        base = read_base_model(Path(named).expanduser())
        modules = {name: dims for name, dims in base.modules.items() if name in PLACED}
        return replace(facts, modules=modules, vocabulary=base.vocabulary)

    def notes(self, entry: SglangEntry, declared: EngineFacts) -> Iterator[str]:
        if declared.base_only:
            yield (
                "no adapter can be checked before it is loaded, so it serves its base model only; "
                "backends[].base_model: {name: …, config: the folder of the model}"
            )


def _modules(targets: Any) -> frozenset[str] | None:
    """Return TensorRT-LLM's names of the modules that take adapters; None if all do."""
    if not isinstance(targets, list) or "all" in targets:
        return None
    return frozenset(name for name in PLACED if NAMES[name].rpartition(".")[2] in targets)


@dataclass(frozen=True)
class _Row:
    """A packed row: the path of its module, and the sizes of A [rank, in] and B [out, rank]."""

    path: str
    rank: int
    in_dim: int
    out_dim: int


def _rows(config: npt.NDArray[np.int32], modules: Mapping[str, tuple[int, int]]) -> list[_Row]:
    names = {MODULE_IDS[name]: name for name in modules}
    return [
        _Row(f"model.layers.{layer}.{NAMES[names[number]]}", rank, *modules[names[number]])
        for number, layer, rank in config.tolist()
    ]


def _read(weights: Weights, rows: Sequence[_Row]) -> tuple[bytes, memoryview, bytes]:
    with Path(weights.path).open("rb") as file:
        packed = memoryview(mmap.mmap(file.fileno(), weights.size_bytes, access=mmap.ACCESS_READ))
    head, tail = tensors_of(rows, weights.shape[1], weights.dtype, packed)
    return head, packed, tail


def _config(rows: Sequence[_Row]) -> dict[str, Any]:
    """Return what adapter_config.json would say; the scale is in B."""
    rank = rows[0].rank
    targets = sorted({row.path.rpartition(".")[2] for row in rows})
    return {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "target_modules": targets}


def tensors_of(rows: Sequence[_Row], width: int, dtype: str, packed: memoryview) -> tuple[bytes, bytes]:
    """Return what precedes and follows packed rows in the pickle of a dict of tensors, by their names in PEFT files.

    All tensors are views of one storage, which is the packed array, [rows, width].
    """
    kind = STORAGES[dtype]
    storage = _call("torch.storage", "_load_from_bytes")
    zip_head, zip_tail = _zip(kind, len(packed) // DTYPE_BYTES[dtype], packed)
    size = len(zip_head) + len(packed) + len(zip_tail)
    head = b"\x80\x04" + storage + b"(\x8e" + struct.pack("<Q", size) + zip_head
    tensors = []
    for number, row in enumerate(rows):
        begin = number * width
        for letter, shape in (("A", (row.rank, row.in_dim)), ("B", (row.out_dim, row.rank))):
            name = _text(f"base_model.model.{row.path}.lora_{letter}.weight")
            parts = b"j\x00\x00\x00\x00", _int(begin), _ints(shape), _ints((shape[1], 1)), b"\x89", _NO_HOOKS
            tensors.append(name + _call("torch._utils", "_rebuild_tensor_v2") + b"(" + b"".join(parts) + b"tR")
            begin += shape[0] * shape[1]
    # The storage is kept in the memo and dropped from the stack; then comes the dict.
    return head, zip_tail + b"tRr\x00\x00\x00\x000}(" + b"".join(tensors) + b"u."


STORAGES = {"float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


def _zip(kind: str, count: int, packed: memoryview) -> tuple[bytes, bytes]:
    """Return what precedes and follows the storage's bytes in the zip that `torch.save` writes of a storage."""
    parts = _text("storage"), _call("torch", kind), _text("0"), _text("cpu"), _int(count)
    pickled = b"\x80\x02(" + b"".join(parts) + b"tQ."
    files = ("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n"), ("data/0", packed)
    head, directory = b"", b""
    for name, content in files:
        path, size = f"archive/{name}".encode(), len(content)
        facts = struct.pack("<5H3L2H", 20, 0, 0, 0, 33, crc32(content), size, size, len(path), 0)
        directory += b"PK\x01\x02\x14\x00" + facts + struct.pack("<3H2L", 0, 0, 0, 0, len(head)) + path
        head += b"PK\x03\x04" + facts + path
        if content is not packed:
            head += bytes(content)
    end = struct.pack("<4H2LH", 0, 0, len(files), len(files), len(directory), len(head) + len(packed), 0)
    return head, directory + b"PK\x05\x06" + end


def _call(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


_NO_HOOKS = _call("collections", "OrderedDict") + b")R"


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _int(value: int) -> bytes:
    return b"J" + struct.pack("<i", value) if value < 1 << 31 else b"\x8a\x08" + struct.pack("<q", value)


def _ints(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"


def _body(record: dict[str, Any], parts: Sequence[bytes | memoryview], copies: int) -> tuple[Iterator[bytes], int]:
    """Return the JSON of a record whose last member, a list, gets copies of the parts in base64, and its size."""
    begin = json.dumps(record).encode().removesuffix(b"]}")
    size_bytes = len(begin) + copies * (4 * -(-sum(map(len, parts)) // 3) + 3) + 1

    def pieces() -> Iterator[bytes]:
        yield begin
        for number in range(copies):
            yield b',"' if number else b'"'
            yield from _in_base64(parts)
            yield b'"'
        yield b"]}"

    return pieces(), size_bytes


def _in_base64(parts: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    step, left = PIECE_BYTES // 3 * 3, b""
    for part in parts:
        for begin in range(0, len(part), step):
            found = left + bytes(part[begin : begin + step])
            whole = len(found) // 3 * 3
            yield b64encode(found[:whole])
            left = found[whole:]
    yield b64encode(left)


def _whole(value: Any) -> int | None:
    return count_of(value) if type(value) is int else None


DIALECT = Sglang()
