"""Digest, packed key and task id, and what stands for an adapter without its weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidecar.adapters.packed import Layout, plan
from sidecar.adapters.peft import read_adapter
from sidecar.adapters.registration import adapter_of
from sidecar.core import facts
from sidecar.core.facts import packed_key, packed_size_bytes
from sidecar.core.facts import task_id_of as task_id
from tests.kit.peft_files import ALL_LINEAR, module_path, write_adapter

DIGEST = "ab" * 32


def test_task_id_is_63_bits_of_the_keys_hash() -> None:
    """A fixed value: replicas and releases must agree on it."""
    assert task_id("x") == 1637211439935739938
    ids = [task_id(f"key {number}") for number in range(1000)]
    assert len(dict.fromkeys(ids)) == 1000
    assert all(0 < value < 1 << 63 for value in ids)


def test_every_part_of_the_key_gives_another_task_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digest, dtype, rank multiple, tp, generation and packer revision."""
    fp16 = Layout("float16")
    keys = [
        packed_key(DIGEST, fp16),
        packed_key("cd" * 32, fp16),
        packed_key(DIGEST, Layout("bfloat16")),
        packed_key(DIGEST, Layout("float16", 8)),
        packed_key(DIGEST, Layout("float16", 1, 2)),
        packed_key(DIGEST, fp16, 1),
    ]
    monkeypatch.setattr(facts, "PACKER_REVISION", facts.PACKER_REVISION + 1)
    keys.append(packed_key(DIGEST, fp16))
    assert len(dict.fromkeys(map(task_id, keys))) == 7


def test_a_hash_of_zero_bits_is_not_task_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines read 0 as no adapter."""

    class Zeros:
        def __init__(self, data: bytes) -> None: ...

        def digest(self) -> bytes:
            return bytes(32)

    monkeypatch.setattr(facts.hashlib, "sha256", Zeros)
    assert task_id("any") == 1


def test_one_digest_on_two_engines_has_two_task_ids(tmp_path: Path) -> None:
    """The same version on an fp16 and a bf16 engine."""
    with read_adapter(write_adapter(tmp_path / "sql")) as source:
        ids = [task_id(packed_key(source.digest, Layout(dtype))) for dtype in ("float16", "bfloat16")]
    assert ids[0] != ids[1]


def test_an_adapter_without_weights_says_what_it_needs(tmp_path: Path) -> None:
    """Modules with their dims, ranks, layers, and the packed size of any layout."""
    path = write_adapter(
        tmp_path / "sql", modules=ALL_LINEAR, layers=[0, 1], rank=4, ranks={module_path("v_proj", 1): 9}
    )
    with read_adapter(path) as source:
        adapter = adapter_of(source)
        for layout in (Layout("float16"), Layout("bfloat16", 8), Layout("float16", 16, 2)):
            assert packed_size_bytes(adapter.rows, layout) == plan(source, layout).size_bytes
    assert (adapter.rows[0].module, adapter.rows[0].in_dim, adapter.rows[0].out_dim) == ("attn_q", 64, 64)
    assert len(adapter.modules) == 7
    assert (adapter.rank_max, len(adapter.rows), adapter.dtype) == (9, 14, "BF16")
