"""A safetensors file is believed only after every claim of its header was checked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sidecar.adapters.tensors import CHUNK_BYTES, HEADER_BYTES_MAX, TensorFile
from sidecar.errors import Invalid, Reason
from tests.kit.peft_files import BFLOAT16, open_files, write_raw_safetensors, write_safetensors


def entry(shape: list[int], start: int, end: int, dtype: str = "F16") -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def opened(path: Path) -> TensorFile:
    return TensorFile(path.name, os.open(path, os.O_RDONLY), "sql")


def refused(path: Path) -> str:
    """Open a file that must be refused as malformed; return the message."""
    with pytest.raises(Invalid) as caught:
        opened(path)
    assert caught.value.reason is Reason.ADAPTER_MALFORMED
    assert caught.value.details == {"adapter": "sql"}
    assert "'sql'" in caught.value.message
    return caught.value.message


def refused_header(tmp_path: Path, header: Any, data: bytes = b"") -> str:
    """Write a file with this header (an object or bytes) and return why it is refused."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    write_raw_safetensors(tmp_path / "w.safetensors", raw, data)
    return refused(tmp_path / "w.safetensors")


def test_reads_what_the_safetensors_library_wrote(tmp_path: Path) -> None:
    """Names, shapes, dtypes and values are those that the reference library saved."""
    written = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.ones((4,), np.float32)}
    save_file(written, tmp_path / "w.safetensors")
    file = opened(tmp_path / "w.safetensors")
    assert sorted(file.tensors) == ["a", "b"]
    for name, values in written.items():
        read = file.array(file.tensors[name])
        assert read.dtype == values.dtype
        assert np.array_equal(read, values)
        assert not read.flags.writeable


def test_reads_bfloat16_and_parts_of_a_tensor(tmp_path: Path) -> None:
    """bfloat16 comes as ml_dtypes' type; a range of elements is the same as a slice."""
    values = np.arange(CHUNK_BYTES, dtype=np.float32).astype(BFLOAT16)
    write_safetensors(tmp_path / "w.safetensors", {"x": values})
    file = opened(tmp_path / "w.safetensors")
    part = file.elements(file.tensors["x"], 100, 50)
    assert part.dtype == BFLOAT16
    assert np.array_equal(part, values[100:150])
    chunks = list(file.raw_chunks(file.tensors["x"]))
    assert [len(chunk) for chunk in chunks] == [CHUNK_BYTES, CHUNK_BYTES]
    assert b"".join(chunks) == values.tobytes()


def test_a_header_of_2_to_the_63_bytes_is_refused(tmp_path: Path) -> None:
    """The length is compared before anything is allocated."""
    write_raw_safetensors(tmp_path / "w.safetensors", b"{}", b"", header_length=1 << 63)
    assert f"claims {1 << 63} bytes, more than the {HEADER_BYTES_MAX} allowed" in refused(tmp_path / "w.safetensors")


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    """A header that ends beyond the file says that the file was cut short."""
    write_raw_safetensors(tmp_path / "w.safetensors", b"{}", b"", header_length=1000)
    assert "claims 1000 bytes but the file has 10, so it was cut short" in refused(tmp_path / "w.safetensors")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    """Fewer than 8 bytes hold no header."""
    (tmp_path / "w.safetensors").write_bytes(b"abc")
    assert "has 3 bytes, too few for a header" in refused(tmp_path / "w.safetensors")


def test_truncated_data_is_refused(tmp_path: Path) -> None:
    """A tensor that ends beyond the file is named."""
    message = refused_header(tmp_path, {"x": entry([4], 0, 8)}, b"1234")
    assert "tensor 'x' ends at byte" in message


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        (b"not json", b"", "it is not JSON"),
        (b"\xff\xfe{}", b"", "it is not UTF-8"),
        (b"[]", b"", "it is not a JSON object"),
        (b"[" * 100_000, b"", "nested too deeply"),
        (rb'{"__metadata__":{"format":"\ud83d"}}', b"", "half a letter"),  # the library of that name refuses it
        (b'{"x": 1, "x": 2}', b"", "the key 'x' occurs twice"),
        (b'{"x": NaN}', b"", "NaN is not a JSON number"),
        ({"__metadata__": {"format": 1}}, b"", "__metadata__ is not an object of strings"),
        ({"x": {"dtype": "F16", "shape": [1]}}, b"", "needs exactly dtype, shape and data_offsets"),
        ({"x": entry([1], 0, 2, "F17")}, b"12", "unknown dtype 'F17'"),
        ({"x": entry([-1], 0, 2)}, b"12", "shape that is not a short list of sizes"),
        ({"x": entry([1 << 60, 1 << 60], 0, 2)}, b"12", "shape that is not a short list of sizes"),
        ({"x": entry([1] * 9, 0, 2)}, b"12", "shape that is not a short list of sizes"),
        ({"x": {"dtype": "F16", "shape": [True], "data_offsets": [0, 2]}}, b"12", "short list of sizes"),
        ({"x": entry([1], 2, 0)}, b"12", "data_offsets that are not a range"),
        ({"x": entry([2], 0, 2)}, b"12", "of F16 [2] needs 4 bytes but has 2"),
        ({"x": entry([1], 0, 2), "y": entry([1], 1, 3)}, b"123", "tensor 'y' overlaps the one before it"),
        ({"x": entry([1], 0, 2), "y": entry([1], 4, 6)}, b"123456", "tensor 'y' leaves a hole before it"),
        ({"x": entry([1], 0, 2)}, b"123456", "4 bytes after the last tensor belong to none"),
        ({f"t{i}": 0 for i in range(16_385)}, b"", "lists 16385 tensors, more than the 16384 allowed"),
    ],
)
def test_a_lying_header_is_refused_with_its_lie(tmp_path: Path, header: Any, data: bytes, why: str) -> None:
    """Each false claim has its own message."""
    assert why in refused_header(tmp_path, header, data)


def test_a_huge_tensor_name_is_shortened_in_the_message(tmp_path: Path) -> None:
    """A message shows at most a line of what a stranger wrote."""
    message = refused_header(tmp_path, {"x" * 100_000: entry([2], 0, 2)}, b"12")
    assert len(message) < 400
    assert "(100000 characters)" in message


def test_a_file_cut_short_after_opening_is_an_error_not_a_crash(tmp_path: Path) -> None:
    """Bytes that vanish under the reader end in a message; a mapped file would end the process."""
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"x": np.ones((100_000,), np.float32)})
    file = opened(path)
    os.truncate(path, 1000)
    with pytest.raises(Invalid, match="it was cut short"):
        file.array(file.tensors["x"])
    with pytest.raises(Invalid, match="was changed while it was read"):
        file.check_unchanged()


def test_closing_gives_the_descriptor_back(tmp_path: Path) -> None:
    """A refused and a closed file leave no descriptor open."""
    write_safetensors(tmp_path / "good", {"x": np.ones((1,), np.float32)})
    write_raw_safetensors(tmp_path / "bad", b"[]", b"")
    before = open_files()
    opened(tmp_path / "good").close()
    refused(tmp_path / "bad")
    assert open_files() == before
