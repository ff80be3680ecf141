"""Which files of a folder are opened, and which content has which digest."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sidecar.adapters.folder import Folder, NoAdapter
from sidecar.adapters.packed import Layout, pack, plan
from sidecar.adapters.peft import AdapterSource, Hashing, Tensors, open_adapter, read_adapter
from sidecar.errors import Invalid, Reason
from tests.kit.peft_files import ALL_LINEAR, Dims, open_files, read_tensors, write_adapter, write_safetensors


def read(path: Path) -> AdapterSource:
    """Read an adapter and close its file."""
    with read_adapter(path) as source:
        return source


def refused(path: Path, reason: Reason) -> str:
    """Read an adapter that must be refused for this reason; return the message, which names the adapter."""
    with pytest.raises(Invalid) as caught:
        read_adapter(path)
    assert caught.value.reason is reason
    assert caught.value.details == {"adapter": path.name}
    assert caught.value.message.startswith(f"adapter '{path.name}': ")
    return caught.value.message


def test_a_pickle_is_refused_and_never_opened(tmp_path: Path) -> None:
    """adapter_model.bin alone is refused by its name."""
    path = write_adapter(tmp_path / "sql")
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    message = refused(path, Reason.ADAPTER_UNSUPPORTED)
    assert "a pickle, which is never opened" in message
    assert "safe_serialization=True" in message


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """Both files are needed."""
    path = write_adapter(tmp_path / "sql")
    (path / name).unlink()
    assert f"{name} is missing" in refused(path, Reason.ADAPTER_MALFORMED)


def test_a_folder_that_is_not_there_is_unreadable(tmp_path: Path) -> None:
    """A missing folder and a file in its place say so."""
    assert "cannot be read (no such folder); check the path" in refused(tmp_path / "sql", Reason.ORIGIN_UNREADABLE)
    (tmp_path / "file").write_text("x")
    assert "is not a folder" in refused(tmp_path / "file", Reason.ORIGIN_UNREADABLE)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    """A link cannot lead the reader to files outside."""
    path = write_adapter(tmp_path / "sql")
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    message = refused(path, Reason.ORIGIN_UNREADABLE)
    assert f"{name} is a link that leads out of the folder" in message


def test_a_link_inside_the_folder_and_to_the_folder_are_followed(tmp_path: Path) -> None:
    """Links that stay inside are harmless."""
    path = write_adapter(tmp_path / "sql")
    (path / "adapter_model.safetensors").rename(path / "weights")
    (path / "adapter_model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to("sql")
    assert read(tmp_path / "link").digest == read(path).digest


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_is_not_regular_is_refused(tmp_path: Path, name: str) -> None:
    """A FIFO does not hang the reader, a folder does not confuse it."""
    path = write_adapter(tmp_path / "sql")
    (path / name).unlink()
    os.mkfifo(path / name)
    assert f"{name} is not a regular file" in refused(path, Reason.ORIGIN_UNREADABLE)


def test_files_of_a_folder_are_opened_only_if_they_are_regular_and_inside(tmp_path: Path) -> None:
    """By a link inside the folder, too; one that leads out is refused whether or not there is something."""
    path = write_adapter(tmp_path / "sql")
    (path / "inside").symlink_to(path / "adapter_config.json")
    (path / "dangling").symlink_to("gone")
    os.mkfifo(path / "fifo")
    (path / "folder").mkdir()
    (path / "loop").symlink_to("loop")
    for number, target in enumerate(("/etc", "/gone", "../gone", "folder/../../gone")):
        (path / f"out-{number}").symlink_to(target)
    before = open_files()
    with Folder(path, "sql") as folder:
        content = (path / "adapter_config.json").read_bytes()
        assert folder.read("inside", 1 << 20, "sql") == folder.read("adapter_config.json", 1 << 20, "sql") == content
        assert [folder.open(name, "sql") for name in ("gone", "dangling")] == [None, None]
        for name in ("fifo", "folder", "loop", "out-0", "out-1", "out-2", "out-3"):
            with pytest.raises(Invalid) as caught:
                folder.open(name, "sql")
            assert caught.value.reason is Reason.ORIGIN_UNREADABLE
            assert name in caught.value.message
            assert ("leads out of the folder" in caught.value.message) == name.startswith("out")
    assert open_files() == before


def test_a_folder_is_opened_beneath_a_root_and_by_no_link(tmp_path: Path) -> None:
    """What is read of it stays what it was, whatever is put into its place."""
    first, second = (write_adapter(tmp_path / "root" / name, seed=seed) for seed, name in enumerate(("a/x", "b/x")))
    digests = [read(path).digest for path in (first, second)]
    with Folder(first, "sql", tmp_path / "root") as folder:
        (tmp_path / "root" / "a").rename(tmp_path / "root" / "c")
        (tmp_path / "root" / "a").symlink_to("b")
        with read_adapter(folder) as source:
            assert source.digest == digests[0]
    assert read(first).digest == digests[1]
    for path in (first, tmp_path / "root" / "a"):
        with pytest.raises(NoAdapter):
            Folder(path, "sql", tmp_path / "root")


def test_a_refused_adapter_leaves_no_descriptor_open(tmp_path: Path) -> None:
    """A thousand bad adapters must not use up the process's descriptors."""
    path = write_adapter(tmp_path / "sql", r=16)
    before = open_files()
    refused(path, Reason.ADAPTER_MALFORMED)
    assert open_files() == before


def test_the_digest_knows_content_and_not_its_order(tmp_path: Path) -> None:
    """Equal content has one digest, whatever the tensors' order or the fields that change nothing."""
    path = write_adapter(tmp_path / "a", seed=1)
    digest = read(path).digest
    assert digest == read(write_adapter(tmp_path / "b", seed=1, lora_dropout=0.5, revision="x")).digest
    tensors = read_tensors(path)
    write_safetensors(path / "adapter_model.safetensors", dict(reversed(tensors.items())))
    assert read(path).digest == digest


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 2},
        {"alpha": 17},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 3}},
        {"base_model_name_or_path": "other"},
        {"dtype": "float16"},
        {"infix": ".default"},
        {"layers": [0]},
    ],
)
def test_the_digest_changes_with_all_that_counts(tmp_path: Path, changed: Any) -> None:
    """Bytes, scale, base model, dtypes, names."""
    first = read(write_adapter(tmp_path / "a", seed=1))
    second = read(write_adapter(tmp_path / "b", **{"seed": 1, **changed}))
    assert first.digest != second.digest


def test_what_is_hashed_while_it_is_packed_has_the_same_digest(tmp_path: Path) -> None:
    """In the order of the names, in any other, in part, twice or not at all."""
    path = write_adapter(tmp_path / "sql", shape=Dims(layers=3), modules=ALL_LINEAR, dtype="float32")
    generator = random.Random(7)
    with read_adapter(path) as source:
        names, reads = sorted(source.file.tensors), 0
        for how in range(40):
            hashing = Hashing(source)
            chosen = names if how < 8 else generator.sample(names, generator.randrange(len(names)))
            for name in chosen:
                tensor = source.file.tensors[name]
                step = generator.choice([1000, 4096, tensor.elements])
                for first in range(0, tensor.elements, step):
                    out = np.empty(min(step, tensor.elements - first), np.float32)
                    hashing.read_into(tensor, first, out)
                    assert np.array_equal(out, source.file.elements(tensor, first, out.size))
                    reads += 1
                    if how % 4 == 1 and generator.random() < 0.3:
                        hashing.read_into(tensor, first, out)
            assert hashing.digest() == source.digest
    assert reads > 1000


def test_packing_hashes_all_that_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left to be read for the digest alone, so a cold adapter is read once."""
    path = write_adapter(tmp_path / "sql", shape=Dims(layers=12), modules=ALL_LINEAR)
    again: list[str] = []
    chunks = Tensors.raw_chunks

    def counted(self: Tensors, tensor: Any, first: int = 0) -> Any:
        again.append(tensor.name)
        return chunks(self, tensor, first)

    monkeypatch.setattr(Tensors, "raw_chunks", counted)
    with open_adapter(path) as source:
        packing, hashing = plan(source, Layout("float16")), Hashing(source)
        pack(source, packing, np.empty(packing.shape, np.float16), tensors=hashing)
        digest = hashing.digest()
    assert not again
    with read_adapter(path) as source:
        assert source.digest == digest
    assert again
