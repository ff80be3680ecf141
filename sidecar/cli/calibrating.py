"""`sidecar calibrate`: derive an engine's step times from published measurements or from a live run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from sidecar.cli.exits import CommandError, Exit
from sidecar.cli.show import AsJson, JournalPolicies, console, facts, print_json
from sidecar.pace.cost import CostModel, cost_name
from sidecar.pace.cost_table import UNLIMITED_TOKENS, CostTable, cost_table_text

Advance = Callable[[str, int, int], None]
"""Takes what is counted, the number done and the total."""


def calibrate(
    model: Annotated[str | None, typer.Option(help="llama-3.1-8b and others.", show_default=False)] = None,
    gpu: Annotated[str | None, typer.Option(help="a100_sxm and others.", show_default=False)] = None,
    engine: Annotated[str | None, typer.Option(help="trtllm or vllm.", show_default=False)] = None,
    from_journal: Annotated[
        Path | None,
        typer.Option(help="Measure a live run instead: its journal or data directory.", show_default=False),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="The engine of the run, if it had several.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write; cost_MODEL_GPU_ENGINE.json unless given.", show_default=False)
    ] = None,
    policy: JournalPolicies = None,
    as_json: AsJson = False,
) -> None:
    """Write a cost file: the step times for emulated and simulated engines, and for schedulers' estimates."""
    if from_journal is not None:
        table, report, name = _from_journal(from_journal, policy or [], backend, model, gpu, engine)
    else:
        table, report, name = _from_measurements(model, gpu, engine)
        if backend is not None:
            raise CommandError("--backend names an engine of a run; it goes with --from-journal", Exit.MISUSED)
    path = out or Path(name)
    _write(path, cost_table_text(table))
    record = {"file": str(path), **_record(table), **report}
    if as_json:
        print_json(record)
    else:
        console().print(facts(_lines(record)))


def _from_measurements(model: str | None, gpu: str | None, engine: str | None) -> tuple[CostTable, dict[str, Any], str]:
    from sidecar.lab.calibrate.measured import Measured, short_name
    from sidecar.lab.calibrate.table import measured_table

    if model is None or gpu is None or engine is None:
        raise CommandError(
            "calibrate wants --model, --gpu and --engine (as llama-3.1-8b, a100_sxm, vllm), or --from-journal DIR",
            Exit.MISUSED,
        )
    measured = Measured(model, gpu, engine)
    with _progress_bars() as told:
        table = measured_table(measured, told)
    return table, {}, cost_name(short_name(model), gpu, engine)


def _from_journal(
    path: Path, policies: list[str], backend: str | None, model: str | None, gpu: str | None, engine: str | None
) -> tuple[CostTable, dict[str, Any], str]:
    from sidecar.lab.calibrate.history import read_history
    from sidecar.lab.calibrate.live import Labels, live_table
    from sidecar.lab.calibrate.measured import short_name

    with _progress_bars() as told:
        history = read_history(path, told, policies)
    table, fit, chosen = live_table(history, backend, Labels(model, gpu, engine))
    name = cost_name(short_name(model), gpu, engine) if model and gpu and engine else f"cost_{chosen}.json"
    report = {key: value for key, value in asdict(fit).items() if key != "plane"}
    return table, {"backend": chosen, **report}, name


def _write(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    begun = path.with_name(f".{path.name}.unfinished")
    try:
        begun.write_text(text, "utf-8")
        begun.replace(path)
    except OSError as error:
        begun.unlink(missing_ok=True)
        raise CommandError(f"{path}: {error.strerror}; --out names another place") from error


def _record(table: CostTable) -> dict[str, Any]:
    plane = CostModel(table).plane()
    return {
        "model": table.model,
        "gpu": table.gpu,
        "engine": table.engine,
        "dtype": table.dtype,
        "decode_points": len(table.decode.first) * len(table.decode.second),
        "prefill_points": len(table.prefill.first) * len(table.prefill.second),
        "kv_tokens": None if table.kv_tokens == UNLIMITED_TOKENS else table.kv_tokens,
        "plane": plane._asdict(),
        "source": list(table.source),
    }


def _lines(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    plane = record["plane"]
    yield "file", record["file"]
    yield "measured", f"{record['model']} on {record['gpu']}, {record['engine']}, {record['dtype']}"
    yield "points", f"{record['decode_points']} for decode steps, {record['prefill_points']} for prompts"
    yield "KV room", f"{record['kv_tokens']:,} tokens" if record["kv_tokens"] else "no limit"
    yield (
        "a step",
        (
            f"at most about {plane['fixed_ns'] / 1e6:.2f} ms + {plane['per_seat_ns'] / 1e6:.4f} ms a request + "
            f"{plane['per_context_token_ns'] / 1e6:.7f} ms a token of context + "
            f"{plane['per_prompt_token_ns'] / 1e6:.4f} ms a prompt token"
        ),
    )
    if "backend" in record:
        yield from _fit_lines(record)
    yield "use it", f"sidecar emulate --cost {record['file']}"


def _fit_lines(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    (fewest, most), (shortest, longest) = record["batches"], record["contexts_tokens"]
    yield (
        "fitted to",
        (
            f"{record['equations']} stretches at {record['backend']}, {record['stalled']} left out as stalls; batches "
            f"of {fewest:.0f} to {most:.0f}, mean contexts of {shortest:.0f} to {longest:.0f} tokens"
        ),
    )
    yield "residuals", f"{record['residual_rms']:.1%} root mean square, {record['residual_worst']:.1%} at worst"


@contextmanager
def _progress_bars() -> Iterator[Advance]:
    """Yield a progress callback that draws a bar on stderr for each counter, if stderr is a terminal."""
    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        yield advance
