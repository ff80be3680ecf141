"""Decide when an engine that keeps as many adapter versions as it may is drained and restarted.

Pure: time is an argument, in seconds of a monotonic clock. One engine at a time goes through a round:

    DRAINING     it takes nothing new        → RESTARTING once nothing is in flight
    RESTARTING   the command runs            → AWAY
    AWAY         it does not answer yet      → the round ends once it does, or once another one is up in its place

A round begins only while other engines serve all that this one serves, and ends without a restart as soon as they do
not. A drain by an operator is never ended here, and an operator's undrain ends the round. While an engine is away no
other round begins, however long that takes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from sidecar.backends.api import Wear

PAUSE_S = 30.0
"""Pause after the first failure at an engine; each further one doubles it."""
PAUSE_MAX_S = 1800.0
STANDS_S = 30.0
"""How long an engine that is to be restarted must have been kept from it before that is told."""


@dataclass(frozen=True)
class Engine:
    """An engine as it is now.

    `instance` is equal as long as it is the same endpoint; one found again at another address is another. `is_declared`
    says that it is to be restarted, and `is_owned` that this process has its queue. `others_serve` says that each
    version it serves, and its base model, are served by another engine that takes requests. `in_place` says that a
    restart brings the same endpoint back, which must answer within `ready_s`.
    """

    instance: object
    pool: str = ""
    wear: Wear | None = None
    is_declared: bool = False
    is_owned: bool = True
    is_up: bool = True
    is_draining: bool = False
    in_flight: int = 0
    others_serve: bool = False
    in_place: bool = True
    ready_s: float = 900.0

    @property
    def is_out(self) -> bool:
        return self.wear is not None and self.wear.is_out


class Stage(Enum):
    DRAINING = "draining"
    RESTARTING = "restarting"
    AWAY = "away"


class Do(Enum):
    """What is to be done now."""

    DRAIN = "drain"
    UNDRAIN = "undrain"
    RESTART = "restart"
    SAY = "say"


@dataclass(frozen=True)
class Act:
    """`text` is for the log; `warns` says that a person should look."""

    do: Do
    backend: str
    text: str
    warns: bool = False


@dataclass
class Round:
    """One engine's way through drain and restart. `before` are the instances that its pool had at the beginning."""

    backend: str
    instance: object
    pool: str
    before: Collection[object]
    since_s: float
    ready_s: float
    stage: Stage = Stage.DRAINING
    until_s: float = 0.0
    """When it is too late for an engine that is away."""
    in_place: bool = True
    error: str | None = None
    """How the restart ended: "" if well, None if it has not."""
    operator: bool | None = None
    """What an operator has set meanwhile: drained, or not; None if nobody has."""


class Rounds:
    """The rounds of one process.

    A drain takes at most `drain_timeout_s`: then the engine goes back into service and nothing is cut off. With other
    replicas an engine is drained for `settle_s` at least before it is restarted, so that replicas which began at the
    same time have heard of each other.
    """

    def __init__(self, drain_timeout_s: float, settle_s: float = 0.0) -> None:
        self._drain_timeout_s = drain_timeout_s
        self._settle_s = settle_s
        self.round: Round | None = None
        self._failed: dict[str, int] = {}
        self._not_before_s: dict[str, float] = {}
        self._told: dict[str, str] = {}
        self._kept_since_s: dict[str, tuple[str, float]] = {}
        """Why each engine that is out is not restarted, and since when."""

    def operator_set(self, backend: str, draining: bool) -> None:
        """Note that an operator has drained an engine or returned it to service."""
        if self.round is not None and self.round.backend == backend:
            self.round.operator = draining

    def restarted(self, error: str) -> None:
        """Note how the restart of the round's engine ended: "" if well."""
        assert self.round is not None, "no restart is under way"
        self.round.error = error

    def step(self, now_s: float, engines: Mapping[str, Engine], elsewhere: Collection[str] = ()) -> list[Act]:
        """Return what is to be done now. `elsewhere` are the engines that other replicas say they are restarting."""
        acts = [*self._tell(now_s, engines, bool(elsewhere))]
        if self.round is None:
            acts += self._begin(now_s, engines, elsewhere)
        else:
            acts += _STAGES[self.round.stage](self, self.round, now_s, engines, elsewhere)
        return acts

    # Words about engines that are at their limit.

    def _tell(self, now_s: float, engines: Mapping[str, Engine], is_elsewhere: bool) -> Iterator[Act]:
        """Say once of each engine at its limit why it stays there, and again when the reason changes."""
        self._told = {backend: text for backend, text in self._told.items() if backend in engines}
        kept = self._kept_since_s
        self._kept_since_s = {}
        for backend, engine in engines.items():
            if engine.wear is None or (engine.is_declared and (self.round is not None or is_elsewhere)):
                continue  # another round, which may be all that keeps this one from its own
            if not engine.is_out:
                self._told.pop(backend, None)
            elif engine.is_owned and engine.is_up and (why := _why_it_stays(backend, engine)):
                before, since_s = kept.get(backend, (why, now_s))
                since_s = since_s if before == why else now_s
                self._kept_since_s[backend] = why, since_s
                if self._told.get(backend) != why and (not engine.is_declared or now_s - since_s >= STANDS_S):
                    self._told[backend] = why
                    limit = f"which only a restart frees, and it may keep {engine.wear.limit}"
                    yield Act(Do.SAY, backend, f"{_kept(engine)}, {limit}: {why}", warns=True)

    # Rounds.

    def _begin(self, now_s: float, engines: Mapping[str, Engine], elsewhere: Collection[str]) -> Iterator[Act]:
        if elsewhere:
            return
        for backend in sorted(engines, key=lambda each: (self._failed.get(each, 0), each)):
            engine = engines[backend]
            if (
                engine.is_declared
                and engine.is_owned
                and engine.is_out
                and engine.is_up
                and not engine.is_draining
                and engine.others_serve
                and now_s >= self._not_before_s.get(backend, now_s)
            ):
                before = [each.instance for each in engines.values() if each.pool == engine.pool]
                self.round = Round(backend, engine.instance, engine.pool, before, now_s, engine.ready_s)
                yield Act(Do.DRAIN, backend, f"{_kept(engine)}: it is drained, to be restarted")
                return

    def _draining(
        self, at: Round, now_s: float, engines: Mapping[str, Engine], elsewhere: Collection[str]
    ) -> Iterator[Act]:
        engine = engines.get(at.backend)
        if engine is None or engine.instance is not at.instance:
            self.round = None  # it went by itself
        elif at.operator is True:
            self.round = None
            yield Act(Do.SAY, at.backend, "an operator drains it: it is not restarted, and stays drained")
        elif at.operator is False:
            yield from self._give_up(at, now_s, "an operator has returned it to service")
        elif not engine.is_up:
            at.stage, at.until_s = Stage.AWAY, now_s + at.ready_s
            yield Act(Do.SAY, at.backend, "it was lost while it was drained")
        elif not engine.is_out or not engine.is_owned:
            self.round = None
            why = "another replica has it now" if not engine.is_owned else "it has been restarted by somebody else"
            yield Act(Do.UNDRAIN, at.backend, why)
        elif any(other < at.backend for other in elsewhere):
            self.round = None
            yield Act(Do.UNDRAIN, at.backend, f"another replica restarts {min(elsewhere)} first")
        elif not engine.others_serve and elsewhere and now_s - at.since_s < self._settle_s:
            return  # the other one is drained, too, and gives way to this one
        elif not engine.others_serve:
            yield from self._give_up(
                at, now_s, "no other engine serves all that it serves any more", undrain=True, warns=True
            )
        elif not engine.in_flight and now_s - at.since_s >= self._settle_s:
            at.stage, at.error = Stage.RESTARTING, None
            yield Act(Do.RESTART, at.backend, "nothing is in flight: it is restarted")
        elif now_s - at.since_s > self._drain_timeout_s:
            why = (
                f"{engine.in_flight} requests and loads were in flight after drain_timeout_s "
                f"({self._drain_timeout_s:g} s), and none is cut off for a restart"
            )
            yield from self._give_up(at, now_s, why, undrain=True, warns=True)

    def _restarting(
        self, at: Round, now_s: float, engines: Mapping[str, Engine], elsewhere: Collection[str]
    ) -> Iterator[Act]:
        if at.error is None:
            return
        engine = engines.get(at.backend)
        is_same = engine is not None and engine.instance is at.instance
        if at.error and engine is not None and is_same and engine.is_up:
            why = f"its restart failed: {at.error}"
            yield from self._give_up(at, now_s, why, undrain=at.operator is None, warns=True)
            return
        at.stage, at.until_s = Stage.AWAY, now_s + at.ready_s
        if at.error:
            at.until_s = now_s + self._fail(at.backend, now_s)
            yield Act(Do.SAY, at.backend, f"its restart failed, and it does not answer: {at.error}", warns=True)
        elif engine is not None:
            at.in_place = engine.in_place

    def _away(
        self, at: Round, now_s: float, engines: Mapping[str, Engine], elsewhere: Collection[str]
    ) -> Iterator[Act]:
        engine = engines.get(at.backend)
        is_same = engine is not None and engine.instance is at.instance
        if engine is not None and engine.is_up and is_same and at.in_place and engine.is_out:
            why = f"its restart ended well, and it still keeps {_versions(engine)}: is it what was restarted?"
            yield from self._give_up(at, now_s, why, undrain=at.operator is None, warns=True)
        elif engine is not None and engine.is_up and (at.in_place or not is_same):
            self._end(at)
            yield Act(Do.UNDRAIN if is_same and at.operator is None else Do.SAY, at.backend, "it is up again")
        elif self._is_replaced(at, engines) and not (is_same and at.in_place):
            self._end(at)
            yield Act(Do.SAY, at.backend, "another engine is up in its place")
        elif now_s >= at.until_s:
            pause_s = self._fail(at.backend, now_s)
            lost = "it does not come back: look at its log, for no other engine is restarted until then"
            at.until_s = now_s + max(pause_s, at.ready_s)
            if is_same and at.in_place:
                at.stage, at.error = Stage.RESTARTING, None
                yield Act(Do.RESTART, at.backend, f"{lost}; it is restarted again", warns=True)
            else:
                yield Act(Do.SAY, at.backend, lost, warns=True)

    def _end(self, at: Round) -> None:
        self.round = None
        self._failed.pop(at.backend, None)
        self._not_before_s.pop(at.backend, None)

    def _is_replaced(self, at: Round, engines: Mapping[str, Engine]) -> bool:
        return bool(at.pool) and any(
            each.pool == at.pool and each.is_up and not any(each.instance is other for other in at.before)
            for each in engines.values()
        )

    def _give_up(self, at: Round, now_s: float, why: str, undrain: bool = False, warns: bool = False) -> Iterator[Act]:
        self.round = None
        pause_s = self._fail(at.backend, now_s)
        text = f"{why}; its restart is tried again in {pause_s:.0f} s"
        yield Act(Do.UNDRAIN if undrain else Do.SAY, at.backend, text, warns)

    def _fail(self, backend: str, now_s: float) -> float:
        times = self._failed[backend] = self._failed.get(backend, 0) + 1
        pause_s = min(PAUSE_S * 2.0 ** min(times - 1, 10), PAUSE_MAX_S)
        self._not_before_s[backend] = now_s + pause_s
        return pause_s


def _versions(engine: Engine) -> str:
    assert engine.wear is not None
    return f"{engine.wear.versions} adapter versions in memory"


def _kept(engine: Engine) -> str:
    return f"it keeps {_versions(engine)}"


def _why_it_stays(backend: str, engine: Engine) -> str:
    """Return why an engine that is out is not restarted, with the way out; "" if it will be."""
    if not engine.is_declared:
        return (
            f'"sidecar backends drain {backend}", restart it once nothing runs there, then "sidecar backends undrain '
            f'{backend}"'
        )
    if engine.is_draining:
        return "an operator drains it, so it is not restarted"
    if not engine.others_serve:
        return (
            "it is not restarted, for no other engine that takes requests serves all that it serves; start another one "
            "of its base model"
        )
    return ""


_STAGES = {
    Stage.DRAINING: Rounds._draining,
    Stage.RESTARTING: Rounds._restarting,
    Stage.AWAY: Rounds._away,
}
