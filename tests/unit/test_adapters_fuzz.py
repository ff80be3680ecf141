"""Damaged folders: whatever a stranger sends, the answer is an adapter or Invalid, never another exception."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.adapters.packed import Layout, measure
from sidecar.adapters.peft import read_adapter
from sidecar.errors import Invalid
from tests.fuzz.adapters import run
from tests.kit.peft_files import write_adapter

FILES = ("adapter_config.json", "adapter_model.safetensors")
damage = st.lists(
    st.tuples(st.sampled_from(FILES), st.integers(0, 2000), st.binary(min_size=0, max_size=4)),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a good adapter."""
    path = write_adapter(tmp_path_factory.mktemp("good") / "sql", rank=1, layers=[0])
    return {name: (path / name).read_bytes() for name in FILES}


@settings(max_examples=300)
@given(damage=damage, is_cut=st.booleans())
def test_a_damaged_folder_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    pristine: dict[str, bytes],
    damage: list[tuple[str, int, bytes]],
    is_cut: bool,
) -> None:
    """Bytes overwritten, or the rest cut off, anywhere in config, header or data."""
    folder: Path = tmp_path_factory.mktemp("damaged")
    contents = dict(pristine)
    for name, place, written in damage:
        old = contents[name]
        place %= len(old) or 1
        contents[name] = old[:place] + written + (b"" if is_cut else old[place + len(written) :])
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    refusal, share = outcome(folder)
    assert refusal is None or (refusal.details == {"adapter": folder.name} and len(refusal.message) < 800)
    assert 0 <= share <= 1


def outcome(folder: Path) -> tuple[Invalid | None, float]:
    """Read and pack a folder; return why it was refused, or what rounding cost."""
    try:
        with read_adapter(folder) as source:
            return None, measure(source, Layout("float16")).flushed_share
    except Invalid as error:
        return error, 0.0


def test_seeded_damage_ends_in_an_adapter_or_a_typed_refusal(tmp_path: Path) -> None:
    """The first cases of `make fuzz`: bytes, headers, configs and indexes; memory stays within twice the files."""
    found = run(range(1500), seed=1, scratch=tmp_path, memory_every=25)
    assert found.outcomes["packed"] > 50
    assert found.outcomes["ADAPTER_MALFORMED"] > 500
    assert found.outcomes["ADAPTER_UNSUPPORTED"] > 50
    assert found.memory_excess_bytes <= 0


def test_json_that_would_fill_memory_is_refused(tmp_path: Path) -> None:
    """A megabyte of empty lists is turned away before it is parsed."""
    path = write_adapter(tmp_path / "sql")
    (path / "adapter_config.json").write_text('{"r": [' + "[]," * 300_000 + "[]]}")
    refusal, _ = outcome(path)
    assert refusal is not None
    assert "it holds more than 262144 items" in refusal.message
