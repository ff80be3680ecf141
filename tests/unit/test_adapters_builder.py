"""Folder → sealed blob, and folder → NVIDIA's files, and what people see of a folder."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sidecar.adapters import builder
from sidecar.adapters.buffers import Regions
from sidecar.adapters.builder import build
from sidecar.adapters.convert import convert
from sidecar.adapters.layout import numpy_dtype
from sidecar.adapters.packed import Layout, PackReport, pack, plan
from sidecar.adapters.peft import read_adapter
from sidecar.adapters.shared_memory import Mount
from sidecar.cli.inspecting import inspect
from sidecar.core.facts import packed_key
from sidecar.core.facts import task_id_of as task_id
from sidecar.errors import Invalid, Misused, Reason, Refused
from tests.kit.peft_files import ALL_LINEAR, BFLOAT16, open_files, read_tensors, write_adapter

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def rows_of(path: Path, layout: Layout) -> np.ndarray:
    """Pack into plain memory."""
    with read_adapter(path) as source:
        packing = plan(source, layout)
        out = np.empty(packing.shape, numpy_dtype(layout))
        pack(source, packing, out)
    return out


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_build_gives_a_sealed_blob_of_the_packed_rows(tmp_path: Path, dtype: str) -> None:
    """The bytes, the plan, the key, and the times of the phases."""
    path, layout = write_adapter(tmp_path / "sql", modules=ALL_LINEAR), Layout(dtype, 8)
    blob, packing, report = build(path, layout, 3)
    assert blob.is_sealed
    assert blob.leases == 1
    assert blob.size_bytes == packing.size_bytes
    got = blob.array(np.uint16, packing.shape)
    assert np.array_equal(got, rows_of(path, layout).view(np.uint16))
    with read_adapter(path) as source:
        assert report.packed_key == packed_key(source.digest, layout, 3)
    assert report.fetch_ns > 0
    assert report.pack_ns > 0
    blob.release()


def test_build_refuses_a_folder_whose_content_changed(tmp_path: Path) -> None:
    """A registered version is packed from its own bytes or not at all."""
    path = write_adapter(tmp_path / "sql", seed=1)
    with read_adapter(path) as source:
        digest = source.digest
    build(path, Layout("float16"), expected_digest=digest).blob.release()
    write_adapter(path, seed=2)
    with pytest.raises(Invalid, match=r"now holds other content .* register it as a new version"):
        build(path, Layout("float16"), expected_digest=digest)


@pytest.mark.parametrize("step", ["plan", "pack", "check_digest"])
def test_a_failed_build_leaves_nothing(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever step fails, descriptors and files are given back."""

    class Stopped(Exception):
        pass

    def stop(*_: object, **__: object) -> None:
        raise Stopped

    monkeypatch.setattr(builder, step, stop)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    mount = Mount(blobs)
    path = write_adapter(tmp_path / "sql")
    before = open_files()
    with pytest.raises(Stopped):
        build(path, Layout("float16"), regions=Regions(mount))
    assert [path for path in blobs.iterdir() if path.suffix != ".owner"] == []
    assert open_files() == before
    mount.close()


def test_build_refuses_a_file_that_is_written_to_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the old and half of the new content is never sent."""
    path = write_adapter(tmp_path / "sql")
    weights = path / "adapter_model.safetensors"

    def overwrite(*arguments: Any, **more: Any) -> PackReport:
        os.utime(weights, ns=(1, 1))
        return pack(*arguments, **more)

    monkeypatch.setattr(builder, "pack", overwrite)
    with pytest.raises(Invalid, match="was changed while it was read"):
        build(path, Layout("float16"))


def test_other_content_is_said_before_its_faults(tmp_path: Path) -> None:
    """A folder with another adapter that has a NaN, too."""
    path = write_adapter(tmp_path / "sql", seed=1)
    with read_adapter(path) as source:
        digest = source.digest
    assert build(path, Layout("float16"), expected_digest=digest).report.packed_key.startswith(digest)
    broken = next(iter(read_tensors(path).values())).copy()
    broken[0, 0] = np.nan
    write_adapter(path, seed=1, extra_tensors={next(iter(read_tensors(path))): broken})
    before = open_files()
    with pytest.raises(Invalid, match="now holds other content"):
        build(path, Layout("float16"), expected_digest=digest)
    with pytest.raises(Invalid, match="NaN"):
        build(path, Layout("float16"))
    assert open_files() == before


def test_convert_writes_float16_as_nvidias_tool_does(tmp_path: Path) -> None:
    """[1, N, W] float16 and int32 [1, N, 3], readable by np.load, nothing else left in the folder."""
    path = write_adapter(tmp_path / "sql", modules=ALL_LINEAR, rank=5)
    report = convert(path, tmp_path / "out" / "deep", rank_multiple=8)
    weights, config = np.load(report.weights), np.load(report.config)
    assert (weights.dtype, config.dtype) == (np.float16, np.int32)
    assert weights.shape == report.shape == (1, 14, 8 * 224)
    assert config.shape == (1, 14, 3)
    assert config[0, 0].tolist() == [1, 0, 8]
    assert np.array_equal(weights[0], rows_of(path, Layout("float16", 8)))
    names = sorted(entry.name for entry in (tmp_path / "out" / "deep").iterdir())
    assert names == ["model.lora_config.npy", "model.lora_weights.npy"]


def test_convert_writes_bfloat16_as_a_two_byte_void(tmp_path: Path) -> None:
    """NumPy loads V2, which NVIDIA's readers take for bfloat16; the bits are ours."""
    path = write_adapter(tmp_path / "sql")
    report = convert(path, tmp_path / "out", "bfloat16")
    weights = np.load(report.weights)
    assert weights.dtype == np.dtype("V2")
    assert np.array_equal(weights[0].view(np.uint16), rows_of(path, Layout("bfloat16")).view(np.uint16))


def test_a_failed_conversion_replaces_nothing(tmp_path: Path) -> None:
    """The older files stay, and no half-written one is left."""
    out = tmp_path / "out"
    convert(write_adapter(tmp_path / "sql", seed=1), out)
    kept = (out / "model.lora_weights.npy").read_bytes()
    broken = read_tensors(tmp_path / "sql")[f"{Q_PROJ}.lora_A.weight"].copy()
    broken[0, 0] = np.nan
    path = write_adapter(tmp_path / "bad", extra_tensors={f"{Q_PROJ}.lora_A.weight": broken})
    with pytest.raises(Invalid, match="holds NaN"):
        convert(path, out)
    assert (out / "model.lora_weights.npy").read_bytes() == kept
    assert len(list(out.iterdir())) == 2


def test_convert_refuses_a_file_that_is_written_to_meanwhile(tmp_path: Path) -> None:
    """As build does; nothing is left in the folder."""
    path, out = write_adapter(tmp_path / "sql"), tmp_path / "out"
    with pytest.raises(Invalid, match="was changed while it was read"):
        convert(path, out, progress=lambda *_: os.utime(path / "adapter_model.safetensors", ns=(1, 1)))
    assert not list(out.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """--out over a file."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(Misused, match=r"cannot write \d+ bytes to .*file.* give another --out") as caught:
        convert(write_adapter(tmp_path / "sql"), tmp_path / "file")
    assert caught.value.reason is Reason.CONFIG_INVALID


def test_inspect_says_everything_as_json(tmp_path: Path) -> None:
    """Modules, ranks, scales, value ranges, and per layout bytes, identity and loss."""
    path = write_adapter(tmp_path / "sql", rank=4, alpha=8, dtype="float32")
    facts = json.loads(json.dumps(inspect(path)))
    assert facts["adapter"] == "sql"
    assert facts["modules"][0]["module"] == "attn_q"
    assert facts["modules"][0]["ranks"] == [4]
    assert facts["modules"][0]["scales"] == [2.0]
    assert 0 < facts["modules"][0]["largest_a"] < 1
    fp16, bfloat16 = facts["layouts"]
    assert fp16["packed_bytes"] == 4 * 4 * 128 * 2
    assert fp16["task_id"] == str(task_id(fp16["packed_key"]))
    assert 0 < fp16["relative_error"] < bfloat16["relative_error"]


def test_inspect_says_which_layout_refuses(tmp_path: Path) -> None:
    """An adapter that only a bfloat16 engine can hold."""
    huge = {
        f"{Q_PROJ}.lora_A.weight": np.full((8, 64), 2.0**20, BFLOAT16),
        f"{Q_PROJ}.lora_B.weight": np.full((64, 8), 2.0**20, BFLOAT16),
    }
    fp16, bfloat16 = inspect(write_adapter(tmp_path / "sql", extra_tensors=huge))["layouts"]
    assert re.search("leaves the range of float16", fp16["refused"])
    assert "refused" not in bfloat16


def test_build_without_room_is_refused(tmp_path: Path) -> None:
    """The blob's own refusal comes through."""
    mount = Mount(tmp_path)
    mount.directory = tmp_path / "missing"
    with pytest.raises(Refused, match="no room"):
        build(write_adapter(tmp_path / "sql"), Layout("float16"), regions=Regions(mount))
    mount.directory = tmp_path
    mount.close()
