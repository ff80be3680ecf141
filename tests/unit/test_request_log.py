"""One line a request, and the forms that log lines take."""

from __future__ import annotations

import io
import json
import logging
from functools import partial
from typing import Any

import pytest

from sidecar.core import events as ev
from sidecar.core.effects import Settle
from sidecar.core.enums import Fault, Outcome
from sidecar.errors import Reason
from sidecar.shell.chronicle import Chronicle
from sidecar.shell.logs import Fields, LogWriter, QueuedHandler, configure_logging
from sidecar.shell.request_log import RequestLog
from sidecar.telling.naming import version_label
from sidecar.telling.record import Record
from tests.kit.corekit import MS, World


def logged(world: World) -> None:
    """Show an observer what a world went through."""
    log = RequestLog(partial(version_label, world.core.state))
    chronicle = Chronicle(lambda: world.core.state, lambda _: None)
    chronicle.on_end.append(log.ended)
    for (now_ns, event), effects in zip(world.events, world.by_step, strict=True):
        log.observed(event, effects, now_ns)
        chronicle.observed(event, effects, now_ns)
        for effect in effects:
            if isinstance(effect, Settle):
                chronicle.given_up(effect)
    assert not chronicle._open


def lines_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Return the values of the request lines."""
    return [
        record.msg.values
        for record in caplog.records
        if record.name == "sidecar.requests" and isinstance(record.msg, Fields)
    ]


def test_every_request_has_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """Each request that arrives, served or refused, is logged exactly once, and its values say how it went."""
    caplog.set_level(logging.INFO)
    world = World()
    world.register("sql")
    for _ in range(3):
        world.send("sql", tenant="acme", input_tokens=12)
    world.send("nobody")
    world.send("")
    world.run()
    logged(world)
    lines = {line["request"]: line for line in lines_of(caplog)}
    assert sorted(lines) == [1, 2, 3, 4, 5]
    assert len(lines_of(caplog)) == 5
    first = lines[1]
    assert (first["outcome"], first["adapter"], first["version"], first["backend"]) == ("ok", "sql", "v1", "b0")
    assert (first["tenant"], first["cache"], first["input_tokens"], first["output_tokens"]) == (
        "acme", "fetched", 12, 10,
    )  # fmt: skip
    assert first["queue_ms"] >= first["load_ms"] > 0
    assert lines[2]["cache"] == "joined"
    assert lines[4]["reason"] == "UNKNOWN_ADAPTER"
    assert "unknown adapter" in lines[4]["error"]
    assert lines[5]["cache"] == "base"
    assert lines[5]["version"] == ""


def test_the_line_has_the_bound_or_why_it_is_void(caplog: pytest.LogCaptureFixture) -> None:
    """What was promised stands beside the wait; a promise that was void says for what, one never made says nothing."""
    caplog.set_level(logging.INFO)
    world = World(seats=1)
    kept = world.send()
    promise = world.core.state.requests[kept].promise
    assert promise is not None
    world.run()
    world.send()
    void = world.send()
    world.lose("b0")
    never = world.send()
    world.bring_up("b0")
    world.run()
    logged(world)
    lines = {line["request"]: (line["bound_ms"], line["voided"]) for line in lines_of(caplog)}
    assert lines[kept] == (pytest.approx(promise.bound_ns / 1e6, abs=0.001), "")
    assert lines[void] == (None, "backend lost")
    assert lines[never] == (None, "")


def test_the_version_is_called_the_same_before_and_after_it_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    """Who groups lines by version finds those that were cancelled while they waited, too."""
    caplog.set_level(logging.INFO)
    received = ev.Received(1, "sql", "", "default", input_tokens=1, output_tokens_max=1)
    settle = Settle(
        1, Outcome.CANCELLED, "sql", "", "default", 5, 1, reason=Reason.CANCELLED, version="0123456789abcdef"
    )
    for ordinal in (3, 0):
        RequestLog(str).ended(Record(received, 0, 0, version=settle.version, ordinal=ordinal, settle=settle))
    assert [line["version"] for line in lines_of(caplog)] == ["v3", "0123456789ab"]


def test_a_failed_request_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """With its id and the error, where only warnings are logged; what was served or refused is none."""
    caplog.set_level(logging.WARNING)
    world = World()
    world.send("nobody")
    served = world.send("")
    world.run()
    failed = world.send("", client_id="mine")
    world.run(for_ns=1 * MS)
    world.fail_run(failed, Fault.REJECTED)
    world.run()
    logged(world)
    assert world.settled[served].reason is None
    (line,) = lines_of(caplog)
    assert (line["request"], line["id"], line["outcome"]) == (failed, "mine", "failed")
    assert "engine says rejected" in line["error"]


def test_a_heal_is_counted_on_the_line(caplog: pytest.LogCaptureFixture) -> None:
    """A request that was dispatched twice because the engine had lost its adapter says so."""
    caplog.set_level(logging.INFO)
    world = World()
    world.register("sql")
    world.send("sql")
    world.run()
    world.engines["b0"].lie()
    world.send("sql")
    world.run()
    logged(world)
    assert [line["heals"] for line in lines_of(caplog)] == [0, 1]


def test_lost_backends_and_quarantines_are_warnings(caplog: pytest.LogCaptureFixture) -> None:
    """An adapter that kills two engines leaves two warnings of lost backends and one of a quarantine."""
    caplog.set_level(logging.INFO)
    world = World(engines=3)
    world.register("bad")
    for engine in world.engines.values():
        engine.crash_on_load.add(world.digest("bad"))
    world.send("bad")
    world.run()
    logged(world)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum(" is lost: the engine died" in warning for warning in warnings) == 2
    assert sum(warning.startswith("bad@v1 is quarantined: its first loads coincided") for warning in warnings) == 1
    assert lines_of(caplog)[0]["reason"] == "QUARANTINED"


def test_a_backend_that_stays_lost_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """A second report that a backend is gone is not a second loss."""
    world = World()
    world.lose("b0")
    world.feed(ev.BackendLost("b0", "connection refused"))
    logged(world)
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def test_a_client_cannot_write_a_line_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    """Line breaks in what a client sends are quoted in the text form."""
    caplog.set_level(logging.INFO)
    world = World()
    world.send("x\nrequest ended request=9 outcome=ok", tenant="t\n\x1b[2J")
    logged(world)
    text = caplog.records[-1].getMessage()
    assert text.isprintable()


def written(form: Any, *messages: Any) -> str:
    """Return what is written to the stream for these messages."""
    stream = io.StringIO()
    writer = configure_logging(form, "info", stream)
    for message in messages:
        logging.getLogger("sidecar.test").info(message)
    writer.stop()
    return stream.getvalue()


def test_text_lines() -> None:
    """The text form has the time, the level, the logger, the sentence and the values, quoted where need be."""
    line = written("text", Fields("request ended", request=7, tenant="a b", reason="", queue_ms=0.0))
    assert line.endswith('Z INFO sidecar.test: request ended request=7 tenant="a b" queue_ms=0.0\n')


def test_nothing_that_is_logged_begins_a_line_or_moves_a_cursor() -> None:
    """In a message of any logger, and in a traceback below it, whose own lines stay."""
    assert written("text", "lost: a\nb\x1b[2J\u202e").endswith("lost: a\\nb\\x1b[2J\\u202e\n")
    stream = io.StringIO()
    writer = configure_logging("text", "info", stream)
    try:
        raise ValueError("two\x1b[2J")
    except ValueError:
        logging.getLogger("sidecar.test").exception("broke")
    writer.stop()
    first, *below = stream.getvalue().splitlines()
    assert first.endswith("broke")
    assert below[0] == "Traceback (most recent call last):"
    assert below[-1] == "ValueError: two\\x1b[2J"


def test_json_lines() -> None:
    """The JSON form is one object a line, values as members of their own type."""
    lines = written("json", Fields("request ended", request=7, queue_ms=0.5), "plain").splitlines()
    first, second = map(json.loads, lines)
    assert (first["message"], first["request"], first["queue_ms"]) == ("request ended", 7, 0.5)
    assert (first["level"], first["logger"]) == ("info", "sidecar.test")
    assert second["message"] == "plain"


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("digits", [64, 40])
def test_no_line_has_an_api_key(form: str, digits: int) -> None:
    """Clients write one where a name or an id belongs, and an error shows the beginning of a name."""
    key = "lsk_3fdca2eb99c0_" + "a" * digits
    lines = written(form, Fields("request ended", id=key, error=f'there is no "{key}"'), f"lost {key}")
    assert "a" * 16 not in lines
    assert lines.count("lsk_3fdca2eb99c0_(hidden)") == 3


def test_a_traceback_is_a_member() -> None:
    """An exception that is logged stays on its line in the JSON form."""
    stream = io.StringIO()
    writer = configure_logging("json", "info", stream)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("sidecar.test").exception("it failed for %s", "sql")
    writer.stop()
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["message"] == "it failed for sql"
    assert "ValueError: broken" in json.loads(line)["error"]


def test_stopping_twice_is_once() -> None:
    """The log can be stopped by the process and again at exit."""
    writer: LogWriter = configure_logging("text", "info", io.StringIO())
    writer.stop()
    writer.stop()
    assert not any(isinstance(handler, QueuedHandler) for handler in logging.getLogger().handlers)


def test_a_slow_stream_never_blocks_the_caller() -> None:
    """With the queue full a record is left out, and the next that gets through says how many were."""
    handler = QueuedHandler(queued_max=2)
    for number in range(5):
        handler.handle(logging.makeLogRecord({"msg": f"line {number}", "levelno": logging.INFO}))
    taken = [handler.records.popleft().getMessage() for _ in range(2)]
    handler.handle(logging.makeLogRecord({"msg": "after", "levelno": logging.INFO}))
    taken += [handler.records.popleft().getMessage() for _ in range(2)]
    assert taken == [
        "line 0", "line 1", "3 log lines were left out: stderr takes them too slowly", "after",
    ]  # fmt: skip


def test_faults_without_a_loss_are_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    """One broken stream while the backend stands is healed without a warning that the backend is lost."""
    world = World()
    request = world.send("")
    world.run(for_ns=1 * MS)
    world.fail_run(request, Fault.LOST)
    world.run()
    logged(world)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
