"""Read `probe.jsonl` beside an adapter's weights: prompts, and the adapter's expected answers.

Each line is {"prompt": …, "expect": …}; `expect` is the beginning of the greedy answer. The file is not part of a
version: the same weights with another probe.jsonl are the same version.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidecar.adapters.folder import Folder, NoAdapter, opened
from sidecar.adapters.refusal import malformed
from sidecar.adapters.strict_json import parse_object

FILE_NAME = "probe.jsonl"
BYTES_MAX = 1 << 20


@dataclass(frozen=True)
class Probe:
    """A prompt, and the beginning of the expected answer."""

    prompt: str
    expect: str


def read_probes(source: Path | Folder, adapter: str) -> list[Probe] | None:
    """Return the probes of a folder's probe.jsonl, or None if it has none. Raises Invalid naming a faulty line."""
    try:
        with opened(source, adapter) as folder:
            data = folder.read(FILE_NAME, BYTES_MAX, adapter)
    except NoAdapter:
        return None
    if data is None:
        return None
    lines = enumerate(data.splitlines(), 1)
    return [_probe(line, number, adapter) for number, line in lines if line.strip()]


def _probe(line: bytes, number: int, adapter: str) -> Probe:
    try:
        record = parse_object(line)
    except ValueError as error:
        raise malformed(adapter, f"line {number} of {FILE_NAME}: {error}") from error
    return Probe(_text(record, "prompt", number, adapter), _text(record, "expect", number, adapter))


def _text(record: dict[str, Any], key: str, number: int, adapter: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise malformed(
            adapter, f'line {number} of {FILE_NAME} has no text under "{key}"; write {{"prompt": …, "expect": …}}'
        )
    return value
