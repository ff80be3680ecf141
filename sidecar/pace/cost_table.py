"""The file behind a cost model: step times of one model on one GPU, written by `sidecar calibrate`.

A JSON object with exactly these fields (times in ms, sizes in bytes, all numbers finite):

    format, version      "step-cost", 2
    model, gpu, engine, dtype
                         texts: what was measured
    source               list of sentences: where each part comes from, and what is assumed
    fixed_ms             the part of a step that does not grow with its work; a mixed step pays it once
    decode               {batch: [...], context: [...], step_ms: [[...]]}: one step of `batch` sequences
                         that hold `context` tokens each; a row for each batch, a column for each context
    prefill              {requests: [...], tokens: [...], step_ms: [[...]]}: one step that reads `requests`
                         prompts of `tokens` tokens each
    kv                   {tokens, token_bytes}: room for keys and values without adapters, size of a token;
                         null: there is always room
    copies               {to_device: {gb_per_s, overhead_us}, to_host: {gb_per_s, overhead_us}}: an adapter's
                         way from the host cache to the GPU, and from a request to the host cache; the
                         overhead is the part of each copy that does not grow with its size
    lora                 {modules: [...], ranks: [...], loss: [[...]], adapters, loss_from_2_to_64,
                         least_share}: share of the throughput that is lost when adapters change so many
                         kinds of projection (a row each) in an engine built for such ranks (a column each),
                         with so many adapters in the batch; share lost between 2 and 64 adapters; part of
                         the loss that a single request with an adapter costs its batch. Equal columns say
                         that the rank does not matter, zeros that adapters cost nothing

Axes rise strictly and have two points or more; a straight line needs two, for what lies beyond an axis
follows its last two points. Anything else is refused with the file's path and the field's name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from sidecar.files import DOCUMENT_BYTES_MAX, read_regular

FORMAT = "step-cost"
VERSION = 2
UNLIMITED_TOKENS = 1 << 50
"""The KV tokens of a table that gives no limit: more than any run can ask for."""


class BadCostTable(ValueError):
    """A cost table that cannot be used. The message names the file, the field and what was expected."""


@dataclass(frozen=True)
class Grid:
    """Step times in ms over two rising axes; a row for each point of the first."""

    first: tuple[float, ...]
    second: tuple[float, ...]
    step_ms: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Copy:
    """The bandwidth of one copy path of adapters, and the fixed time of every copy."""

    gb_per_s: float
    overhead_us: float


@dataclass(frozen=True)
class LoraLoss:
    """Fraction of throughput lost to adapters: a row for each number of module kinds, a column for each rank.

    `loss` holds for `adapters` adapters in the batch and grows with their number.
    """

    modules: tuple[float, ...]
    ranks: tuple[float, ...]
    loss: tuple[tuple[float, ...], ...]
    adapters: float
    loss_from_2_to_64: float
    least_share: float


@dataclass(frozen=True)
class CostTable:
    """Everything in the file that enters a computation."""

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
    to_device: Copy
    to_host: Copy
    lora: LoraLoss


def load_cost_table(path: Path) -> CostTable:
    """Return the table in a file. Raises BadCostTable for missing, unknown or out-of-range fields."""
    try:
        return _read(read_regular(path, DOCUMENT_BYTES_MAX).decode("utf-8"))
    except OSError as error:
        raise BadCostTable(f"{path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadCostTable(f"{path}: not JSON: {error}") from error
    except BadCostTable as error:
        raise BadCostTable(f"{path}: {error}") from None


@lru_cache(maxsize=8)
def _read(text: str) -> CostTable:
    return read_cost_table(json.loads(text))


def cost_table_text(table: CostTable) -> str:
    """Return a table as the text that `load_cost_table` reads, a row of numbers on each line."""
    text = json.dumps(_plain(_document(table)), indent=2, ensure_ascii=False)
    return re.sub(r"\[\s+([-\d.,e\s]+?)\s+\]", lambda numbers: f"[{' '.join(numbers[1].split())}]", text) + "\n"


def read_cost_table(document: Any) -> CostTable:
    """Return the table in a file's JSON value. Raises BadCostTable, which names the field."""
    words = ("model", "gpu", "engine", "dtype")
    parts = ("source", "fixed_ms", "decode", "prefill", "kv", "copies", "lora")
    if not isinstance(document, dict) or (document.get("format"), document.get("version")) != (FORMAT, VERSION):
        raise BadCostTable(f"format and version: expected {FORMAT!r} and {VERSION}")
    fields = _fields(document, "file", ("format", "version", *words, *parts))
    kv_tokens, kv_token_bytes = _kv(fields["kv"])
    copies = _fields(fields["copies"], "copies", ("to_device", "to_host"))
    return CostTable(
        **{word: _word(fields[word], word) for word in words},
        source=_sentences(fields["source"]),
        fixed_ms=_number_or_0(fields["fixed_ms"], "fixed_ms"),
        decode=_grid(fields["decode"], "decode", ("batch", "context")),
        prefill=_grid(fields["prefill"], "prefill", ("requests", "tokens")),
        kv_tokens=kv_tokens,
        kv_token_bytes=kv_token_bytes,
        to_device=_copy(copies["to_device"], "copies.to_device"),
        to_host=_copy(copies["to_host"], "copies.to_host"),
        lora=_lora(fields["lora"]),
    )


def _plain(value: Any) -> Any:
    """Return the value with integral floats as integers."""
    if isinstance(value, dict):
        return {key: _plain(held) for key, held in value.items()}
    if isinstance(value, tuple):
        return [_plain(held) for held in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _document(table: CostTable) -> dict[str, Any]:
    decode, prefill = table.decode, table.prefill
    kv = {"tokens": table.kv_tokens, "token_bytes": table.kv_token_bytes}
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": table.model,
        "gpu": table.gpu,
        "engine": table.engine,
        "dtype": table.dtype,
        "source": table.source,
        "fixed_ms": table.fixed_ms,
        "decode": {"batch": decode.first, "context": decode.second, "step_ms": decode.step_ms},
        "prefill": {"requests": prefill.first, "tokens": prefill.second, "step_ms": prefill.step_ms},
        "kv": None if table.kv_tokens == UNLIMITED_TOKENS else kv,
        "copies": {"to_device": asdict(table.to_device), "to_host": asdict(table.to_host)},
        "lora": asdict(table.lora),
    }


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


def _number_or_0(value: Any, name: str) -> float:
    """Return a number that is zero or more."""
    return 0.0 if value == 0 and not isinstance(value, bool) else _number(value, name)


def _numbers(value: Any, name: str, length: int | None = None) -> tuple[float, ...]:
    return tuple(_number(entry, name) for entry in _list(value, name, length))


def _list(value: Any, name: str, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or length not in (None, len(value)):
        raise BadCostTable(f"{name}: expected a list of {'' if length is None else f'{length} '}numbers")
    return value


def _axis(value: Any, name: str) -> tuple[float, ...]:
    axis = _numbers(value, name)
    if len(axis) < 2 or any(here >= after for here, after in pairwise(axis)):
        raise BadCostTable(f"{name}: expected two or more rising numbers")
    return axis


def _rows(value: Any, name: str, length: int, each: str) -> list[Any]:
    if not isinstance(value, list) or len(value) != length:
        raise BadCostTable(f"{name}: expected {length} rows, one for each {each}")
    return value


def _grid(value: Any, name: str, axes: tuple[str, str]) -> Grid:
    fields = _fields(value, name, (*axes, "step_ms"))
    first, second = (_axis(fields[axis], f"{name}.{axis}") for axis in axes)
    rows = _rows(fields["step_ms"], f"{name}.step_ms", len(first), axes[0])
    return Grid(first, second, tuple(_numbers(row, f"{name}.step_ms", len(second)) for row in rows))


def _kv(value: Any) -> tuple[int, int]:
    if value is None:
        return UNLIMITED_TOKENS, 1
    fields = _fields(value, "kv", ("tokens", "token_bytes"))
    return int(_number(fields["tokens"], "kv.tokens")), int(_number(fields["token_bytes"], "kv.token_bytes"))


def _copy(value: Any, name: str) -> Copy:
    fields = _fields(value, name, ("gb_per_s", "overhead_us"))
    return Copy(
        gb_per_s=_number(fields["gb_per_s"], f"{name}.gb_per_s"),
        overhead_us=_number_or_0(fields["overhead_us"], f"{name}.overhead_us"),
    )


def _losses(value: Any, length: int) -> tuple[float, ...]:
    return tuple(_number_or_0(loss, "lora.loss") for loss in _list(value, "lora.loss", length))


def _lora(value: Any) -> LoraLoss:
    names = ("modules", "ranks", "loss", "adapters", "loss_from_2_to_64", "least_share")
    fields = _fields(value, "lora", names)
    modules, ranks = _axis(fields["modules"], "lora.modules"), _axis(fields["ranks"], "lora.ranks")
    rows = _rows(fields["loss"], "lora.loss", len(modules), "number of modules")
    lora = LoraLoss(
        modules=modules,
        ranks=ranks,
        loss=tuple(_losses(row, len(ranks)) for row in rows),
        adapters=_number(fields["adapters"], "lora.adapters"),
        loss_from_2_to_64=_number_or_0(fields["loss_from_2_to_64"], "lora.loss_from_2_to_64"),
        least_share=_number_or_0(fields["least_share"], "lora.least_share"),
    )
    if max(lora.loss_from_2_to_64, *(max(row) for row in lora.loss)) >= 1 or lora.least_share > 1:
        raise BadCostTable("lora: losses must be below 1, least_share at most 1")
    return lora
