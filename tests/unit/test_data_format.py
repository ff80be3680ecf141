"""A data directory has a number, and so has each line of an audit; another number is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sidecar.access.audit_log import FORMAT, read
from sidecar.errors import Misused, Reason
from sidecar.state.registry import FORMAT_FILE, REGISTRY_FILE, lock_data_directory


def test_a_new_directory_gets_its_number_and_is_opened_again(tmp_path: Path) -> None:
    for _ in range(2):
        lock_data_directory(tmp_path / "data").close()
    assert (tmp_path / "data" / FORMAT_FILE).read_text() == "1\n"


@pytest.mark.parametrize("number", ["2\n", "", None])
def test_another_number_is_refused(number: str | None, tmp_path: Path) -> None:
    """Also a registry without a number, as builds before the number wrote it."""
    (tmp_path / REGISTRY_FILE).touch()
    if number is not None:
        (tmp_path / FORMAT_FILE).write_text(number)
    for _ in range(2):  # the lock is free again
        with pytest.raises(Misused, match=f"{tmp_path} has format .*, and this version reads 1") as raised:
            lock_data_directory(tmp_path)
        assert raised.value.reason is Reason.STATE_INCOMPATIBLE


def test_an_audit_line_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    line = {"format": FORMAT, "time": "2026-01-01T00:00:00.000Z"}
    path.write_text(json.dumps(line) + "\n")
    assert [found for _, found in read(path, 0.0)] == [line]
    with path.open("a") as file:
        file.write(json.dumps(line | {"format": 2}) + "\n")
    with pytest.raises(Misused, match="has format 2, and this version reads 1"):
        list(read(path, 0.0))
