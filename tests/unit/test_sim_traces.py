"""Loads from a file: what is read, and each way in which a file can be bad, told with its line."""

from __future__ import annotations

import gzip
import os
from itertools import islice
from pathlib import Path

import pytest

from sidecar.errors import Misused, Reason
from sidecar.lab.sim.traces import rows_of, summary_of, trace_workload
from sidecar.lab.sim.workloads import Arrival

HEADER = "arrival_s,adapter,input_tokens,output_tokens"
GOOD = f"{HEADER}\n0,sql,10,20\n0.5,chat,30,40\n0.5,sql,1,1\n"


def file_of(tmp_path: Path, content: str | bytes, name: str = "load.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path) -> str:
    """Return the message with which a trace is refused, before anything is simulated."""
    with pytest.raises(Misused) as refused:
        trace_workload(path)
    assert refused.value.reason is Reason.CONFIG_INVALID
    assert str(path) in refused.value.message
    return refused.value.message


def test_a_trace_in_an_open_loop(tmp_path: Path) -> None:
    """Each line is an arrival at its time; the load can be iterated again and again."""
    load = trace_workload(file_of(tmp_path, GOOD))
    assert (load.requests, load.adapters, load.open_loop) == (3, ("sql", "chat"), True)
    assert load.shares == pytest.approx({"sql": 2 / 3, "chat": 1 / 3})
    expected = [
        Arrival(0, "sql", 10, 20),
        Arrival(500_000_000, "chat", 30, 40),
        Arrival(500_000_000, "sql", 1, 1),
    ]
    assert list(load) == list(load) == expected


def test_a_trace_in_a_closed_loop(tmp_path: Path) -> None:
    """The order counts and the times don't."""
    load = trace_workload(file_of(tmp_path, GOOD), open_loop=False)
    assert not load.open_loop
    assert [arrival.at_ns for arrival in load] == [None] * 3
    assert [arrival.adapter for arrival in load] == ["sql", "chat", "sql"]


def test_columns_in_any_order_with_a_tenant_and_others(tmp_path: Path) -> None:
    """Tenants are read, other columns are named in the summary; spaces around fields and blank lines are nothing."""
    content = (
        "tenant, adapter ,model,output_tokens,input_tokens,arrival_s\r\n\r\n acme , sql ,x,2,1, 1.5 \r\n,,x,4,3,2\r\n"
    )
    path = file_of(tmp_path, content)
    assert list(trace_workload(path)) == [
        Arrival(1_500_000_000, "sql", 1, 2, tenant="acme"),
        Arrival(2_000_000_000, "", 3, 4),
    ]
    assert trace_workload(path).adapters == ("sql",)
    assert summary_of(path).columns_unread == ("model",)


def test_the_summary_adds_up(tmp_path: Path) -> None:
    """Requests, times and tokens of all lines."""
    summary = summary_of(file_of(tmp_path, GOOD.replace("\n0,", "\n0.25,")))
    assert (summary.requests, summary.begins_s, summary.ends_s) == (3, 0.25, 0.5)
    assert (summary.input_tokens, summary.output_tokens, summary.asked) == (41, 61, {"sql": 2, "chat": 1})


def test_quoted_fields_and_a_byte_order_mark(tmp_path: Path) -> None:
    """What spreadsheets write is read."""
    path = file_of(tmp_path, f'\ufeff{HEADER}\n0,"a, ""b""",1,1\n')
    assert trace_workload(path).adapters == ('a, "b"',)


def test_clients_ask_for_at_least_so_much(tmp_path: Path) -> None:
    """The limit that clients set, where it is above what they got."""
    load = trace_workload(file_of(tmp_path, GOOD), output_tokens_max=30)
    assert [arrival.output_tokens_max for arrival in load] == [30, 40, 30]


@pytest.mark.parametrize("name", ["load.csv.gz", "load.csv"])
def test_gzip_by_its_first_bytes(tmp_path: Path, name: str) -> None:
    """Whatever the file is called."""
    load = trace_workload(file_of(tmp_path, gzip.compress(GOOD.encode()), name))
    assert len(list(load)) == 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("0.4,sql,1,1", "arrival_s 0.4 is before 0.5 of the request above"),
        ("-1,sql,1,1", "arrival_s '-1': expected seconds from the start"),
        ("nan,sql,1,1", "arrival_s 'nan': expected seconds"),
        ("inf,sql,1,1", "arrival_s 'inf': expected seconds"),
        ("1700000000,sql,1,1", "arrival_s '1700000000': expected seconds from the start of the trace, 0 to"),
        ("1e999,sql,1,1", "arrival_s '1e999'"),
        ("1_0,sql,1,1", "arrival_s '1_0'"),
        ("soon,sql,1,1", "arrival_s 'soon'"),
        (",sql,1,1", "arrival_s ''"),
        ("1,sql,0,1", "input_tokens '0': expected a whole number, 1 to"),
        ("1,sql,1,0", "output_tokens '0': expected a whole number, 1 to"),
        ("1,sql,-5,1", "input_tokens '-5'"),
        ("1,sql,1.5,1", "input_tokens '1.5'"),
        ("1,sql,nan,1", "input_tokens 'nan'"),
        ("1,sql,1,²", "output_tokens '²'"),
        ("1,sql,1,2147483648", "output_tokens '2147483648': expected a whole number, 1 to 2,147,483,647"),
        (f"1,sql,1,{'9' * 5000}", f"output_tokens '{'9' * 40}': expected"),
        ("1,sql,1", "it has 3 fields and the header has 4"),
        ("1,sql,1,1,1", "it has 5 fields and the header has 4"),
        ('1,"sql,1,1', "its quotes do not match"),
        (f"1,{'a' * 257},1,1", f"adapter '{'a' * 40}': expected up to 256 printable characters"),
        ("1,a\x00b,1,1", "adapter 'a\\x00b': expected up to 256 printable characters"),
        ("1," + "a" * 70_000 + ",1,1", "it is longer than 65,536 bytes"),
    ],
)
def test_a_bad_line_is_told_with_its_number(tmp_path: Path, line: str, said: str) -> None:
    """Line 5 of the file, counted as editors do."""
    message = refusal(file_of(tmp_path, f"{GOOD}{line}\n9,sql,1,1\n"))
    assert f"load.csv, line 5: {said}" in message
    assert len(message) < 400


def test_what_is_not_utf_8_is_told_with_its_place(tmp_path: Path) -> None:
    """The byte in the line, counted from one."""
    assert "line 5: byte 3 is not UTF-8" in refusal(file_of(tmp_path, GOOD.encode() + b"1,\xff,1,1\n"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "it is empty"),
        ("\n \n", "it is empty"),
        (HEADER, "there is no request below its header"),
        (f"{HEADER}\n\n", "there is no request below its header"),
        ("0,sql,1,1\n", "line 1: the header lacks arrival_s, adapter, input_tokens, output_tokens"),
        ("arrival_s,adapter,input\n0,a,1\n", "line 1: the header lacks input_tokens, output_tokens; it must name"),
        (f"{HEADER},adapter\n0,a,1,1,b\n", "line 1: the header names adapter more than once"),
    ],
)
def test_a_file_that_is_no_trace(tmp_path: Path, content: str, said: str) -> None:
    """Nothing in it, or a header that isn't one."""
    assert said in refusal(file_of(tmp_path, content))


@pytest.mark.parametrize("cut", [3, 12, 40, 60])
def test_a_gzip_file_cut_off(tmp_path: Path, cut: int) -> None:
    """Wherever the copy ended, in its head or in its data."""
    compressed = gzip.compress(GOOD.encode() * 20)
    assert "cut off" in refusal(file_of(tmp_path, compressed[:cut], "load.csv.gz"))


def test_a_damaged_gzip_file(tmp_path: Path) -> None:
    """A wrong checksum is seen at the end, rubbish in the data at once; each is damage and no traceback."""
    compressed = gzip.compress(GOOD.encode())
    wrong_checksum = compressed[:-8] + bytes(8)
    assert "damaged" in refusal(file_of(tmp_path, wrong_checksum))
    assert "damaged" in refusal(file_of(tmp_path, compressed[:10] + b"\xff" * 50))


def test_a_name_that_promises_gzip(tmp_path: Path) -> None:
    """Plain text under a .gz name was renamed by mistake, or its download went wrong."""
    assert "it is not gzip" in refusal(file_of(tmp_path, GOOD, "load.csv.gz"))


def test_what_cannot_be_read(tmp_path: Path) -> None:
    """A missing file, a folder, and a pipe, which gives its lines only once."""
    assert "No such file" in refusal(tmp_path / "missing.csv")
    assert "it must be a file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "it must be a file" in refusal(tmp_path / "pipe")


def test_rows_are_read_lazily(tmp_path: Path) -> None:
    """The first rows come before a bad line further down is met; a load is checked in full before it begins."""
    path = file_of(tmp_path, f"{GOOD}bad\n")
    assert [row.adapter for row in islice(rows_of(path), 3)] == ["sql", "chat", "sql"]
    assert "line 5" in refusal(path)


def test_very_many_adapters_are_served(tmp_path: Path) -> None:
    """A hundred thousand names, each once: what is kept of the file is its names, in the order of their first use."""
    path = file_of(tmp_path, HEADER + "\n" + "".join(f"{number},n{number},1,1\n" for number in range(100_000)))
    load = trace_workload(path, ranks=(8, 64))
    assert load.adapters == tuple(f"n{number}" for number in range(100_000))
    assert sorted(load.ranks.values()) == [8] * 50_000 + [64] * 50_000
    assert next(iter(load)) == Arrival(0, "n0", 1, 1)
