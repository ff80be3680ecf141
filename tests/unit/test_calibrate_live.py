"""Cost tables out of live runs: what the emulated engine took is found again from the events that it caused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from sidecar.config.plugins import policies_of
from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.config import CoreConfig
from sidecar.core.core import Core
from sidecar.core.enums import Cache
from sidecar.core.facts import EngineFacts, Packed
from sidecar.errors import Misused
from sidecar.journal.writer import Journal
from sidecar.lab.calibrate.history import History, read_history
from sidecar.lab.calibrate.live import Labels, live_table
from sidecar.lab.engine.engine import Engine, Output, Request
from sidecar.lab.engine.shape import TINY
from sidecar.lab.engine.spec import EngineSpec
from sidecar.pace.cost import LINEAR_TABLE, CostModel, StepBatch
from sidecar.pace.cost_plane import Plane
from sidecar.pace.cost_table import UNLIMITED_TOKENS, CostTable, Grid, cost_table_text, load_cost_table
from tests.kit.cli_runs import runner
from tests.kit.corekit import BLOB_BYTES, World

REQUESTS = 90
MS = 1_000_000
TRUE = Plane(11e6, 40_000.0, 60.0, 62_000.0)
BATCHES = ((1, 200), (8, 500), (32, 1500), (64, 1000), (64, 3000))

Arrival = tuple[int, int, int]
"""When, input tokens, output tokens."""


def table_of(plane: Plane) -> CostTable:
    """Return a table that gives a plane's step times."""
    axis = (1.0, 1000.0)

    def grid(seat: float, token: float) -> Grid:
        rows = ((plane.fixed_ns + seat * row + token * row * column for column in axis) for row in axis)
        return Grid(axis, axis, tuple(tuple(value / 1e6 for value in row) for row in rows))

    return replace(
        load_cost_table(LINEAR_TABLE),
        fixed_ms=plane.fixed_ns / 1e6,
        decode=grid(plane.per_seat_ns, plane.per_context_token_ns),
        prefill=grid(0.0, plane.per_prompt_token_ns),
    )


class LiveRun:
    """An emulated engine at work, and the events that a backend would report of it."""

    def __init__(self, cost: CostModel, seats: int = 64, backend: str = "b0") -> None:
        spec = EngineSpec(
            shape=TINY, lora_modules=(), max_batch_size=seats, max_input_tokens=8192, max_seq_tokens=16384,
            kv_blocks=1 << 20, tokens_per_block=64,
        )  # fmt: skip
        self.backend = backend
        self.history = History()
        self._engine = Engine(spec, cost)
        self._started: dict[int, None] = {}
        self._progress: dict[int, int] = {}
        self._report_ns = 0

    def run(self, arrivals: Iterable[Arrival], until_ns: int) -> History:
        """Send requests and let the engine work until then."""
        for number, (at_ns, inputs, outputs) in enumerate(arrivals, 1):
            self._work(at_ns)
            received = ev.Received(number, "", "tenant", "class", inputs, outputs)
            self.history.take(at_ns, received, [dispatch(number, self.backend)])
            self._engine.submit(Request(number, inputs, outputs), at_ns)
        self._work(until_ns)
        return self.history

    def _work(self, until_ns: int) -> None:
        for output in self._engine.advance(until_ns):
            while self._report_ns + 100 * MS < output.at_ns:
                self._report()
            self._tell(output)

    def _report(self) -> None:
        self._report_ns += 100 * MS
        if self._progress:
            self.history.take(self._report_ns, ev.Progress(self.backend, self._progress), ())
            self._progress = {}

    def _tell(self, output: Output) -> None:
        for number in output.tokens:
            self._progress[number] = self._progress.get(number, 0) + 1
            if number not in self._started:
                self._started[number] = None
                self.history.take(output.at_ns, ev.FirstToken(number, 1), ())
        for ending in output.endings:
            ended = ev.RunEnded(ending.request_id, 1, ending.output_tokens)
            self.history.take(output.at_ns, ended, ())


def dispatch(number: int, backend: str) -> do.Dispatch:
    return do.Dispatch(
        request=number, attempt=1, backend=backend, name="", digest="", ordinal=0, task_id=0, cache=Cache.BASE,
        queue_ns=0, load_ns=0, heals=0,
    )  # fmt: skip


def varied(seed: int = 0) -> Iterator[Arrival]:
    """Yield lone requests, then waves of more and more of them, short and long."""
    random = Random(seed)
    at_ns = 0
    for inputs in (100, 300, 1000, 2000, 4000):
        yield at_ns, inputs, 30
        at_ns += 2_000 * MS
    for wave in (2, 4, 8, 16, 32, 48, 64, 64):
        for _ in range(wave):
            yield at_ns, random.randrange(50, 3000), random.randrange(20, 600)
            at_ns += random.randrange(0, 60) * MS
        at_ns += 15_000 * MS


def fitted(history: History) -> tuple[CostTable, Plane]:
    table, fit, _ = live_table(history, None, Labels())
    return table, fit.plane


@pytest.mark.parametrize("seed", range(3))
def test_known_costs_are_found_again(seed: int) -> None:
    """Decode steps and prompts of the fitted table are within 5 % of what the engine really took."""
    true = table_of(TRUE)
    table, _ = fitted(LiveRun(CostModel(true)).run(varied(seed), 400_000 * MS))
    found, known = CostModel(table), CostModel(true)
    for decoding, context in BATCHES:
        step = StepBatch(0, 0, decoding, decoding * context, 0, 0, 0)
        assert found.step_ns(step) == pytest.approx(known.step_ns(step), rel=0.05), (decoding, context)
    for tokens in (200, 1000, 4000):
        prompt = StepBatch(tokens, 1, 0, 0, 0, 0, 0)
        assert found.step_ns(prompt) == pytest.approx(known.step_ns(prompt), rel=0.05), tokens


def test_an_engine_that_is_no_plane_is_found_within_its_curvature() -> None:
    """A run on measured A100 times gives a plane within a sixth of them, and says how far it is off."""
    known = CostModel.from_file()
    table, fit, _ = live_table(LiveRun(known).run(varied(), 400_000 * MS), None, Labels())
    assert 0.005 < fit.residual_rms < 0.1
    for decoding, context in BATCHES:
        step = StepBatch(0, 0, decoding, decoding * context, 0, 0, 0)
        assert CostModel(table).step_ns(step) == pytest.approx(known.step_ns(step), rel=0.17), (decoding, context)


def test_a_stall_is_left_out() -> None:
    """An engine that stood still for two minutes in the middle of a run gives the same plane, and is reported."""
    history = LiveRun(CostModel(table_of(TRUE))).run(varied(), 400_000 * MS)
    before = live_table(history, None, Labels())[1]
    middle_ns = sorted(run.ended_ns for run in history.runs)[60] - 1
    for run in history.runs:
        run.marks = [(at_ns + (120_000 * MS if at_ns > middle_ns else 0), tokens) for at_ns, tokens in run.marks]
        run.dispatched_ns += 120_000 * MS if run.dispatched_ns > middle_ns else 0
        assert run.over_ns is not None
        run.over_ns += 120_000 * MS if run.over_ns > middle_ns else 0
    after = live_table(history, None, Labels())[1]
    assert after.stalled > before.stalled
    assert after.plane.step_ns(32, 32_000) == pytest.approx(before.plane.step_ns(32, 32_000), rel=0.03)


def constant(at_once: int, outputs: int) -> Iterator[Arrival]:
    for round_number in range(30):
        for _ in range(at_once):
            yield round_number * outputs * 20 * MS, 400, outputs


@pytest.mark.parametrize(("at_once", "outputs"), [(16, 200), (1, 200)])
def test_a_run_without_variety_is_refused(at_once: int, outputs: int) -> None:
    """A run that always looked the same cannot tell the terms apart; the error names them and what there was."""
    history = LiveRun(CostModel(table_of(TRUE))).run(constant(at_once, outputs), 1_000_000 * MS)
    message = rf"backend b0 holds too little variety: .* cannot be separated: .* batches of {at_once} to {at_once}"
    with pytest.raises(Misused, match=message):
        live_table(history, None, Labels())


def test_a_run_that_is_too_short_is_refused() -> None:
    """A handful of requests is too little; so is nothing."""
    history = LiveRun(CostModel(table_of(TRUE))).run([(0, 100, 50)], 10_000 * MS)
    with pytest.raises(Misused, match=r"it gives 2 stretches of decoding, and 12 are needed; record one with few"):
        live_table(history, None, Labels())
    with pytest.raises(Misused, match="holds no dispatched request"):
        live_table(History(), None, Labels())


def test_one_of_several_engines_must_be_named() -> None:
    """A run at several engines is not mixed; an engine that had no request is refused, with those that had."""
    history = LiveRun(CostModel(table_of(TRUE))).run(varied(), 400_000 * MS)
    other = LiveRun(CostModel(table_of(TRUE.times(2))), backend="b1").run(varied(), 900_000 * MS)
    history.runs += other.runs
    with pytest.raises(Misused, match="several engines; name one with --backend: b0, b1"):
        live_table(history, None, Labels())
    with pytest.raises(Misused, match='backend "b2", but to b0, b1'):
        live_table(history, "b2", Labels())
    slow = live_table(history, "b1", Labels())[1].plane
    assert slow.step_ns(32, 32_000) == pytest.approx(2 * TRUE.step_ns(32, 32_000), rel=0.05)


def load(number: int, size_bytes: int) -> do.Load:
    return do.Load(number, "b0", "sql", "digest", Packed("key", 1, size_bytes, 1))


def test_loads_give_overhead_and_bandwidth() -> None:
    """Loads of several sizes are told apart into what each takes and what each byte takes; few are not measured."""
    history = LiveRun(CostModel(table_of(TRUE))).run(varied(), 400_000 * MS)
    assumed = live_table(history, None, Labels())[0]
    assert "too few to measure" in assumed.source[-1]
    for number, size_bytes in enumerate((50_000_000, 100_000_000, 200_000_000, 400_000_000)):
        begun_ns = number * 1_000 * MS
        history.take(begun_ns, ev.Tick(), [load(number, size_bytes)])
        history.take(begun_ns + 10 * MS + size_bytes // 2, ev.LoadDone(number), ())
    model = CostModel(live_table(history, None, Labels())[0])
    for size_bytes in (0, 300_000_000):
        both_ns = model.adapter_put_ns(size_bytes) + model.adapter_copy_ns(size_bytes)
        assert both_ns == pytest.approx(10 * MS + size_bytes / 2, rel=0.01)


def test_room_for_keys_and_values_is_what_the_engine_says() -> None:
    """KV room is taken from what is known of the engine, and is unlimited where nothing is."""
    history = LiveRun(CostModel(table_of(TRUE))).run(varied(), 400_000 * MS)
    assert fitted(history)[0].kv_tokens == UNLIMITED_TOKENS
    history.facts["b0"] = EngineFacts(
        base_models=("llama",), dtype="bfloat16", layers=32, heads=32, kv_heads=8, head_size=128, kv_tokens=448_675
    )
    table, _ = fitted(history)
    assert (table.kv_tokens, table.kv_token_bytes, table.model) == (448_675, 131_072, "llama")


def journal_of(directory: Path, world: World, segment_bytes: int = 1 << 20) -> None:
    """Write the journal of what happened to a world's core."""
    core = Core(world.config, policies_of(world.config))
    journal = Journal(core, directory, segment_bytes, 1000)
    journal.start()
    for now_ns, event in world.events:
        journal.observed(event, core.step(event, now_ns), now_ns)
        journal.flush()  # how much a segment holds depends on what of it is written
    journal.stop()


def busy_world() -> World:
    """Return a world in which `REQUESTS` requests were answered, a few at a time."""
    world = World(CoreConfig(store_bytes=64 * BLOB_BYTES), host_pages=4, device_pages=4, seats=4)
    world.register("a", "b", "c")
    for number in range(REQUESTS):
        world.send("abc"[number % 3])
        world.run(for_ns=8 * MS)
    world.run()
    return world


@pytest.mark.parametrize("segment_bytes", [1 << 20, 4096])
def test_a_journal_tells_who_ran_when(tmp_path: Path, segment_bytes: int) -> None:
    """Runs and Loads come out of a journal as they were, in one segment or in many."""
    world = busy_world()
    journal_of(tmp_path, world, segment_bytes)
    assert (len(list(tmp_path.iterdir())) > 3) == (segment_bytes == 4096)
    told: list[tuple[str, int, int]] = []
    history = read_history(tmp_path, lambda *reading: told.append(reading))
    dispatches = [effect for effect in world.effects if isinstance(effect, do.Dispatch)]
    assert len(history.runs) == len(dispatches) == REQUESTS
    assert all(run.marks and run.whole and run.over_ns is not None for run in history.runs)
    assert len(history.loads) == sum(isinstance(effect, do.Load) for effect in world.effects)
    assert told[-1][1] == told[-1][2]
    assert "b0" in history.facts


def test_a_journal_that_begins_in_the_middle_still_tells(tmp_path: Path) -> None:
    """Requests that ran when the oldest segment was begun are known from its state."""
    journal_of(tmp_path, busy_world(), segment_bytes=4096)
    segments = sorted(tmp_path.iterdir())
    for path in segments[: len(segments) // 2]:
        path.unlink()
    history = read_history(tmp_path, lambda what, done, total: None)
    assert 0 < len(history.runs) < REQUESTS
    assert all(run.over_ns is not None for run in history.runs)


def test_a_journal_that_replays_otherwise_is_refused(tmp_path: Path) -> None:
    """Effects that are not those that were recorded end the reading: nobody knows then what was dispatched."""
    journal_of(tmp_path, busy_world())
    (path,) = tmp_path.iterdir()
    lines = path.read_text().splitlines()
    record = json.loads(lines[-3])
    lines[-3] = json.dumps({**record, "effects": "0" * 16})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(Misused, match=r"does not give the effects that were recorded .*sidecar replay"):
        read_history(tmp_path, lambda what, done, total: None)


def test_the_command_refuses_a_run_that_tells_too_little(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`calibrate --from-journal` on a thin run exits with 2, says what to record, and writes nothing."""
    journal_of(tmp_path / "journal", busy_world())
    out = tmp_path / "cost.json"
    ended = runner(capfd)("calibrate", "--from-journal", str(tmp_path), "--out", str(out), "--json")
    assert ended.code == 2
    assert "too little variety" in ended.error()["message"]
    assert not out.exists()


def test_the_command_writes_what_was_fitted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`calibrate --from-journal` writes a file that can be used, and reports residuals and ranges."""
    history = LiveRun(CostModel(table_of(TRUE))).run(varied(), 400_000 * MS)
    monkeypatch.setattr("sidecar.lab.calibrate.history.read_history", lambda path, told, allowed: history)
    out = tmp_path / "cost.json"
    ended = runner(capfd)("calibrate", "--from-journal", str(tmp_path), "--gpu", "l4", "--out", str(out), "--json")
    record = ended.json()
    assert (ended.code, record["backend"], record["gpu"]) == (0, "b0", "l4")
    assert record["residual_rms"] < 0.02
    assert record["batches"][1] > 40
    table = load_cost_table(out)
    assert cost_table_text(table) == out.read_text()
    step = StepBatch(0, 0, 32, 32_000, 0, 0, 0)
    assert CostModel(table).step_ns(step) == pytest.approx(TRUE.step_ns(32, 32_000), rel=0.05)
