"""The file behind a cost model: measured step times of one model on one GPU, written by `calibrate`.

A JSON object with exactly these fields (times in ms, sizes in bytes, all numbers finite):

    format, version      "step-cost", 1
    model, gpu, engine, dtype
                         texts: what was measured
    source               list of sentences: where each part comes from, and what is assumed
    fixed_ms             the part of a step that does not grow with its work; a mixed step pays it once
    decode               {batch: [...], context: [...], step_ms: [[...]]}: one step of `batch` sequences
                         that hold `context` tokens each; a row for each batch, a column for each context
    prefill              {requests: [...], tokens: [...], step_ms: [[...]]}: one step that reads `requests`
                         prompts of `tokens` tokens each
    kv                   {tokens, token_bytes}: room for keys and values without adapters, size of a token
    copies               {device_gb_per_s, host_gb_per_s, overhead_us}: an adapter's way from host cache to
                         GPU, and from a request to the host cache; fixed part of either
    lora                 {modules: [...], loss: [...], adapters, loss_from_2_to_64, least_share}: share of
                         the throughput that is lost when adapters change so many kinds of projection, with
                         so many adapters in the batch; share lost between 2 and 64 adapters; part of the
                         loss that a single request with an adapter costs its batch

Axes rise strictly and have two points or more. Anything else is refused with the file's path and the
field's name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

FORMAT = "step-cost"
VERSION = 1


class BadCostTable(ValueError):
    """A cost table that cannot be used; the message names the file, the field and what was expected."""


@dataclass(frozen=True)
class Grid:
    """Step times in ms over two rising axes; one row for each point of the first."""

    first: tuple[float, ...]
    second: tuple[float, ...]
    step_ms: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Copies:
    """Bandwidths of an adapter's way to the GPU, and the fixed part of each copy."""

    device_gb_per_s: float
    host_gb_per_s: float
    overhead_us: float


@dataclass(frozen=True)
class LoraLoss:
    """Share of throughput lost to adapters, by number of module kinds, and how it grows with their number."""

    modules: tuple[float, ...]
    loss: tuple[float, ...]
    adapters: float
    loss_from_2_to_64: float
    least_share: float


@dataclass(frozen=True)
class CostTable:
    """Everything in the file that is computed with."""

    model: str
    gpu: str
    engine: str
    dtype: str
    source: tuple[str, ...]
    fixed_ms: float
    decode: Grid
    prefill: Grid
    kv_tokens: int
    kv_token_bytes: int
    copies: Copies
    lora: LoraLoss


def load_cost_table(path: Path) -> CostTable:
    """Return the table in a file; raises BadCostTable for what is missing, unknown or out of range."""
    try:
        return _table(json.loads(path.read_text("utf-8")))
    except OSError as error:
        raise BadCostTable(f"{path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadCostTable(f"{path}: not JSON: {error}") from error
    except BadCostTable as error:
        raise BadCostTable(f"{path}: {error}") from None


def _table(document: Any) -> CostTable:
    words = ("model", "gpu", "engine", "dtype")
    parts = ("source", "fixed_ms", "decode", "prefill", "kv", "copies", "lora")
    fields = _fields(document, "file", ("format", "version", *words, *parts))
    if (fields["format"], fields["version"]) != (FORMAT, VERSION):
        raise BadCostTable(f"format and version: expected {FORMAT!r} and {VERSION}")
    kv = _numbers(fields["kv"], "kv", ("tokens", "token_bytes"))
    return CostTable(
        **{word: _word(fields[word], word) for word in words},
        source=_sentences(fields["source"]),
        fixed_ms=_number(fields["fixed_ms"], "fixed_ms"),
        decode=_grid(fields["decode"], "decode", ("batch", "context")),
        prefill=_grid(fields["prefill"], "prefill", ("requests", "tokens")),
        kv_tokens=int(kv["tokens"]),
        kv_token_bytes=int(kv["token_bytes"]),
        copies=Copies(**_numbers(fields["copies"], "copies", ("device_gb_per_s", "host_gb_per_s", "overhead_us"))),
        lora=_lora(fields["lora"]),
    )


def _fields(value: Any, name: str, keys: Sequence[str]) -> dict[str, Any]:
    """Return an object that has exactly these keys."""
    if not isinstance(value, dict):
        raise BadCostTable(f"{name}: expected an object")
    missing = [key for key in keys if key not in value]
    unknown = [key for key in value if key not in keys]
    if missing or unknown:
        raise BadCostTable(f"{name}: missing {missing}, unknown {unknown}")
    return value


def _word(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise BadCostTable(f"{name}: expected text")
    return value


def _sentences(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise BadCostTable("source: expected a list of sentences")
    return tuple(_word(sentence, "source") for sentence in value)


def _number(value: Any, name: str) -> float:
    """Return a number above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise BadCostTable(f"{name}: expected a number above 0, not {value!r}")
    return float(value)


def _numbers(value: Any, name: str, keys: Sequence[str]) -> dict[str, float]:
    fields = _fields(value, name, keys)
    return {key: _number(fields[key], f"{name}.{key}") for key in keys}


def _list(value: Any, name: str, length: int | None = None) -> tuple[float, ...]:
    if not isinstance(value, list) or length not in (None, len(value)):
        raise BadCostTable(f"{name}: expected a list of {'' if length is None else f'{length} '}numbers")
    return tuple(_number(entry, name) for entry in value)


def _axis(value: Any, name: str) -> tuple[float, ...]:
    axis = _list(value, name)
    if len(axis) < 2 or any(here >= after for here, after in pairwise(axis)):
        raise BadCostTable(f"{name}: expected two or more rising numbers")
    return axis


def _grid(value: Any, name: str, axes: tuple[str, str]) -> Grid:
    fields = _fields(value, name, (*axes, "step_ms"))
    first, second = (_axis(fields[axis], f"{name}.{axis}") for axis in axes)
    rows = fields["step_ms"]
    if not isinstance(rows, list) or len(rows) != len(first):
        raise BadCostTable(f"{name}.step_ms: expected {len(first)} rows, one for each {axes[0]}")
    return Grid(first, second, tuple(_list(row, f"{name}.step_ms", len(second)) for row in rows))


def _lora(value: Any) -> LoraLoss:
    fields = _fields(value, "lora", ("modules", "loss", "adapters", "loss_from_2_to_64", "least_share"))
    modules = _axis(fields["modules"], "lora.modules")
    shares = ("loss_from_2_to_64", "least_share")
    lora = LoraLoss(
        modules=modules,
        loss=_list(fields["loss"], "lora.loss", len(modules)),
        adapters=_number(fields["adapters"], "lora.adapters"),
        **{share: _number(fields[share], f"lora.{share}") for share in shares},
    )
    if max(*lora.loss, lora.loss_from_2_to_64) >= 1 or lora.least_share > 1:
        raise BadCostTable("lora: losses must be below 1, least_share at most 1")
    return lora
