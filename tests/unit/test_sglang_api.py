"""What SGLang's errors mean, and what of them is told: its texts of 0.5.23, some as a real one answered."""

from __future__ import annotations

import json

import pytest

from sidecar.backends.http_client import Reply
from sidecar.backends.openai.sglang import DIALECT
from sidecar.core.enums import Fault

NEVER = (
    "Got LoRA adapter that has never been loaded: nonsense\nAll loaded adapters: dict_keys(['tenant-b/secret', 'x'])."
)
GONE = "The following requested LoRA adapters are not loaded: sql@1\nLoaded adapters: dict_keys(['tenant-b/secret'])"
IMPLICIT = "Failed to implicitly load LoRA adapter t07: Cannot find an appropriate cached snapshot folder"


@pytest.mark.parametrize(
    ("status", "text", "fault"),
    [
        (400, NEVER, Fault.MISS),
        (400, GONE, Fault.MISS),
        (400, IMPLICIT, Fault.MISS),
        (400, "The input (2049 tokens) is longer than the model's context length (2048 tokens).", Fault.REJECTED),
        (503, "", Fault.LOST),
    ],
)
def test_what_an_error_means(status: int, text: str, fault: Fault) -> None:
    assert DIALECT.fault_of(status, text) is fault


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "LoRA with name sql does not exist. Loaded LoRAs: odict_keys(['tenant-b/secret'])",
            "LoRA with name sql does not exist.",
        ),
        (
            "LoRA with name sql already exists. Loaded LoRAs: dict_keys(['tenant-b/secret'])",
            "LoRA with name sql already exists.",
        ),
        (
            "Failed: LoRA ID 7 not found. LoRA registry is: {'7': 'tenant-b/secret'}",
            "Failed: LoRA ID 7 not found.",
        ),
        (
            "Error while unloading LRU LoRA adapter 'tenant-b/secret': busy",
            "Error while unloading LRU LoRA adapter : busy",
        ),
        ("CUDA out of memory.", "CUDA out of memory."),
    ],
)
def test_a_refusal_names_no_other_adapter(text: str, told: str) -> None:
    body = json.dumps({"rid": None, "success": False, "error_message": text}).encode()
    assert DIALECT.refusal(Reply(400, body)) == told


@pytest.mark.parametrize("text", [NEVER, GONE])
def test_nor_does_a_clients_error(text: str) -> None:
    body = json.dumps({"object": "error", "message": text, "code": 400}).encode()
    told = json.loads(DIALECT.hidden.sub(b"", body))
    assert told == {"object": "error", "message": text.partition("\n")[0], "code": 400}


def test_nor_its_files() -> None:
    text = "1 validation error:\n  {'loc': 'seed'}\n\n  File \"/venv/sglang/http_server.py\", line 1652, in generate"
    told = json.loads(DIALECT.hidden.sub(b"", json.dumps({"message": text, "code": 400}).encode()))
    assert told == {"message": text.partition("\n\n")[0], "code": 400}
