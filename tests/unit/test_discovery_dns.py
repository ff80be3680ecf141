"""Engines found by DNS: what counts as an answer, and that failures take none away."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from sidecar.discovery.dns import DnsFinder, resolve
from sidecar.discovery.found import Found

V4, V6 = socket.AF_INET, socket.AF_INET6
Answer = list[str] | socket.gaierror


def trouble(code: int) -> socket.gaierror:
    return socket.gaierror(code, "told by the test")


NOTHING = trouble(socket.EAI_NONAME)


class Script:
    """A name server that answers a list of turns, and time that passes by one second each turn.

    A turn is an answer for IPv4, or a pair of answers for both. The last turn is asked for again and again.
    """

    def __init__(self, *turns: Answer | tuple[Answer, Answer]) -> None:
        self._turns = [turn if isinstance(turn, tuple) else (turn, NOTHING) for turn in turns]
        self.at = -1
        self.asked: list[socket.AddressFamily] = []

    async def ask(self, host: str, port: int, family: socket.AddressFamily) -> list[str]:
        assert (host, port) == ("engines", 8001)
        self.asked.append(family)
        if family is V4:
            self.at += 1
        answer = self._turns[min(self.at, len(self._turns) - 1)][family is V6]
        if isinstance(answer, socket.gaierror):
            raise answer
        return answer

    def finder(self, empty_s: float = 3.0) -> DnsFinder:
        return DnsFinder("engines", 8001, every_s=0.0, empty_s=empty_s, ask=self.ask, clock_s=lambda: float(self.at))


async def first(watch: AsyncIterator[frozenset[Found]], count: int) -> list[set[str]]:
    """Return the addresses of the first answers."""
    async with asyncio.timeout(10):
        return [{found.address for found in await anext(watch)} for _ in range(count)]


async def test_each_address_is_an_engine() -> None:
    script = Script(["10.0.0.2", "10.0.0.1"], ["10.0.0.1", "10.0.0.2"], ["10.0.0.2"])
    assert await first(script.finder().watch(), 2) == [{"10.0.0.1:8001", "10.0.0.2:8001"}, {"10.0.0.2:8001"}]
    assert script.at == 2  # in between there was nothing new


async def test_an_engine_is_known_by_its_address() -> None:
    (found,) = await anext(Script(["10.0.0.1"]).finder().watch())
    assert found == Found("10.0.0.1", "10.0.0.1:8001", ready=True, terminating=False)


async def test_ipv6_is_asked_for_where_there_is_no_ipv4() -> None:
    """A name with both has two addresses for each engine."""
    both = Script((["10.0.0.1"], ["fd00::1"]))
    assert await first(both.finder().watch(), 1) == [{"10.0.0.1:8001"}]
    assert both.asked == [V4]
    only = Script((NOTHING, ["fd00::1"]))
    (found,) = await anext(only.finder().watch())
    assert (found.name, found.address) == ("fd00::1", "[fd00::1]:8001")


@pytest.mark.parametrize("code", [socket.EAI_AGAIN, socket.EAI_FAIL])
async def test_a_name_server_that_is_away_takes_no_engine(code: int, caplog: pytest.LogCaptureFixture) -> None:
    """However long it is; and it is said once why."""
    away = trouble(code)
    script = Script(["10.0.0.1"], *[away] * 50, ["10.0.0.2"])
    assert await first(script.finder(empty_s=0.0).watch(), 2) == [{"10.0.0.1:8001"}, {"10.0.0.2:8001"}]
    assert [record.getMessage() for record in caplog.records] == [
        "engines cannot be resolved: told by the test; engines that were found stay"
    ]


async def test_an_ipv4_question_that_fails_is_not_answered_by_ipv6() -> None:
    """Else all engines would seem to have moved."""
    script = Script(["10.0.0.1"], (trouble(socket.EAI_AGAIN), ["fd00::1"]), ["10.0.0.3"])
    assert await first(script.finder().watch(), 2) == [{"10.0.0.1:8001"}, {"10.0.0.3:8001"}]


async def test_an_empty_answer_is_believed_when_it_has_come_for_a_while() -> None:
    script = Script(["10.0.0.1"], NOTHING)
    assert await first(script.finder(empty_s=3.0).watch(), 2) == [{"10.0.0.1:8001"}, set()]
    assert script.at == 4  # empty from 1 to 4


async def test_a_failure_in_between_begins_the_while_anew() -> None:
    script = Script(["10.0.0.1"], NOTHING, NOTHING, trouble(socket.EAI_AGAIN), [], NOTHING)
    assert await first(script.finder(empty_s=3.0).watch(), 2) == [{"10.0.0.1:8001"}, set()]
    assert script.at == 7  # empty again from 4


async def test_a_name_that_is_gone_for_a_moment_takes_no_engine() -> None:
    script = Script(["10.0.0.1"], NOTHING, NOTHING, ["10.0.0.1"], NOTHING, NOTHING, ["10.0.0.1", "10.0.0.2"])
    assert await first(script.finder(empty_s=3.0).watch(), 2) == [
        {"10.0.0.1:8001"}, {"10.0.0.1:8001", "10.0.0.2:8001"},
    ]  # fmt: skip


async def test_the_systems_resolver_answers_so() -> None:
    assert await resolve("localhost", 8001, V4) == ["127.0.0.1"]
    assert await resolve("127.0.0.5", 8001, V4) == ["127.0.0.5"]
    with pytest.raises(socket.gaierror):
        await resolve("no-such-host.invalid", 8001, V4)
