"""The base class of backends: keeps runs and loads by id, watches the engine, loses it and takes it back.

All public methods return at once and post what comes of them. One watcher task looks at the engine every second; a run
whose connection breaks makes it look at once.

A subclass implements the abstract methods, and sets `WIRE_ERRORS` and `streams`. It overrides `forget` if its engines
refer to what the store drops, and `call` if its models are native to KServe. It tells the pulse when it has begun
(`_reach`), and when it was seen and has counted steps (`_look`). A run calls `_heard` for each reply, delivers the
reply to its ticket before it posts the event for the core, and posts exactly one end unless `_wire_broke` is true.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from time import monotonic
from typing import Any, ClassVar, Protocol, TypeVar

import grpc
import grpc.aio

from sidecar.backends.api import UNTOLD, LoadResult, Signs, Ticket, Wear, Weights
from sidecar.backends.pulse import Pulse
from sidecar.backends.unseen import Follower
from sidecar.config.plugins import told
from sidecar.core.effects import Dispatch, Load
from sidecar.core.enums import Cache, Fault
from sidecar.core.events import (
    BackendLost,
    BackendMeasured,
    BackendProbed,
    BackendUp,
    Event,
    LoadDone,
    LoadFailed,
    Progress,
    RunEnded,
    RunFailed,
)
from sidecar.core.facts import EngineFacts
from sidecar.errors import Misused, SidecarError
from sidecar.tasks import Tasks

logger = logging.getLogger(__name__)
T = TypeVar("T")

LOOK_S = 1.0
PROGRESS_S = 0.1
REACH_S = 0.2
LATE_LOOKS = 2
"""Steps are counted at a look, and a busy server answers looks late: so many make no silence."""
NOT_YET_S = 5.0
"""How long an engine that has never been up may leave us without an answer before the log warns of it."""
UNHEARD_S, LACKING_S = 30.0, 2.0
"""How long it counts that nothing has been heard of a run, and how long an engine lacks runs before one is given up."""
STEPS_AGAIN_S = 0.1
"""Interval of reading the steps of an engine that may be stalled."""


class Running(Protocol):
    """One dispatched request on an engine."""

    effect: Dispatch
    tokens: int
    cancelled: bool
    waits_for_client: bool
    goes_past: bool
    """Its answer goes to its client without us; what is told of it counts as progress."""
    ticket: Ticket

    def cancel(self) -> None:
        """Cancel it. Its end is posted all the same."""


class Endpoint(ABC):
    """One engine endpoint. It may leave looks unanswered for `patience_s`, within which it gets several."""

    WIRE_ERRORS: ClassVar[tuple[type[Exception], ...]]
    """The exceptions of the kind's client library for an engine that does not answer."""

    def __init__(
        self, identity: str, address: str, patience_s: float, pulse: Pulse, is_encrypted: bool = False
    ) -> None:
        self.id = identity
        self.is_encrypted = is_encrypted
        self.address = address
        self.pulse = pulse
        self._look_s = min(LOOK_S, patience_s / 4)
        self._patience_s = patience_s
        self._post: Callable[[Event], None] = lambda event: None
        self._up = False
        self._trouble = "not reached yet"
        self._told = logging.NOTSET
        """The level at which the log says that it is not up."""
        self._awaited_until_s = 0.0
        self._closing = ""
        self._runs: dict[tuple[int, int], Running] = {}
        self._whole: set[tuple[int, int]] = set()
        """The runs whose answers come all at once."""
        self._tasks = Tasks()
        self._loads: dict[int, asyncio.Task[bool]] = {}
        self._sent: set[int] = set()
        self._progress: dict[int, int] = {}
        self._is_used = asyncio.Event()
        """Set while there may be progress to report."""
        self._measured: BackendMeasured | None = None
        self.follower = Follower(lambda event: self._post(event), self._heard, self._lacks)
        """Follows answers that go past us."""
        self._foreign = self._inside_before = 0
        self._ours_before = deque((0, 0), 2)
        """Our sequences at the last two looks: a busy engine may count one only at the look after the next."""
        self._unheard: dict[tuple[int, int], float] = {}
        """Runs of which nothing has been heard for long, and when that was last found."""
        self._lacking_since_s: float | None = None
        self._checking: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[None] | None = None

    # Implemented by each kind.

    @property
    @abstractmethod
    def streams(self) -> bool:
        """True if the engine answers token by token; a class attribute if all engines of the kind do."""

    @abstractmethod
    async def _reach(self) -> EngineFacts:
        """Return the facts of the engine. Raises Misused if it cannot be used, WIRE_ERRORS if it is unreachable."""

    @abstractmethod
    async def _look(self) -> str | None:
        """Return why an engine that is up must be treated as a new one, None if it need not. Raises as `_reach`."""

    async def _inside(self) -> int | None:
        """Return how many requests the engine has, whoever sent them; None if it does not tell. Raises WIRE_ERRORS."""
        return None

    def _seen_inside(self) -> int | None:
        """Return the same as the last look has seen it."""
        return None

    async def _lacks(self, run: Running, is_silent: bool) -> bool:
        """Return True if the engine no longer has a run of which nothing has been heard for long; ask again if not.

        It has not if, for a while, it has told of fewer requests than there are such runs. One of them is taken for it.
        Where other answers are told of and this one is not (`is_silent`), it has not once it has fewer requests than
        there are runs of ours.
        """
        key, now_s = (run.effect.request, run.effect.attempt), monotonic()
        self._unheard[key] = now_s
        try:
            inside = await self._inside() if self._up else 0
        except self.WIRE_ERRORS:
            return False
        if is_silent:
            return inside is None or inside - self._foreign < self._sequences
        known = sum(at_s > now_s - UNHEARD_S for at_s in self._unheard.values())
        if inside is None or inside >= known:
            self._lacking_since_s = None
            return False
        if self._lacking_since_s is None:
            self._lacking_since_s = now_s
        if now_s - self._lacking_since_s < LACKING_S:
            return False
        self._unheard.pop(key, None)
        return True

    def _seen_generated(self) -> int | None:
        """Return how many tokens the engine has made as the last look has seen it; None if it does not tell."""
        return None

    @abstractmethod
    async def _steps(self) -> int | None:
        """Return the engine's step count; None if it does not publish one. Raises WIRE_ERRORS."""

    @abstractmethod
    async def _answers(self, within_s: float) -> bool:
        """Return True if the engine answers a request of ours for one token."""

    @abstractmethod
    async def _look_after(self, text: str) -> None:
        """Look at an engine after bad news; call `_lose` or `_close` if they are true."""

    @abstractmethod
    async def _perform(self, effect: Load, weights: Weights) -> LoadResult:
        """Load an adapter and return how that ended. Raises SidecarError if it cannot be sent."""

    @abstractmethod
    def _begin(self, effect: Dispatch, ticket: Ticket) -> Running:
        """Return a run that has not begun."""

    @abstractmethod
    async def _go(self, run: Any, weights: Weights | None) -> None:
        """Carry out a run to its end. Raises CancelledError if it is cancelled."""

    @abstractmethod
    async def _leave(self) -> None:
        """Close connections."""

    @abstractmethod
    def _describe(self) -> str:
        """Return a phrase for operators about an engine that is up."""

    async def forget(self, key: str) -> None:  # noqa: B027 — there may be nothing to do
        """Do nothing: most engines copy what they load and refer to nothing of the store."""

    def register_regions(self) -> None:  # noqa: B027 — most engines have none
        """Do nothing: most engines have no regions."""

    @property
    def own_models(self) -> tuple[str, ...]:
        return ()

    async def call(self, verb: str, request: Any) -> Any:
        text, empty = f"{self.id} does not speak KServe, and has no {verb}", grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(grpc.StatusCode.UNIMPLEMENTED, empty, empty, text, None)

    def _kept(self) -> Wear | None:
        """Return what an engine that is up keeps until it is restarted; None for one that frees what it loads."""
        return None

    def _measures(self) -> BackendMeasured | None:
        """Return the engine's capacity and load; None if they are unknown."""
        return None

    def _was_lost(self) -> None:  # noqa: B027 — most kinds have nothing to give up
        """Give up what belonged to an engine that is gone."""

    @staticmethod
    def _is_late(error: Exception) -> bool:
        """Return True for a timeout, which a busy engine may cause once."""
        return False

    @staticmethod
    def _error_text(error: Exception) -> str:
        return str(error) or type(error).__name__

    # Called by the shell.

    @property
    def wear(self) -> Wear | None:
        return self._kept() if self._up else None

    async def files_removed(self) -> None:  # noqa: B027 — most engines know no files
        """Do nothing: most engines keep no name of what they have read."""

    def keeps_at_least(self, versions: int) -> None:  # noqa: B027 — most engines keep nothing
        """Do nothing: most engines free what they load."""

    def restarted(self) -> None:
        if self._up:
            self._lose("it is being restarted")

    async def start(self, post: Callable[[Event], None]) -> None:
        self._post, self._awaited_until_s = post, monotonic() + NOT_YET_S
        self._tasks.spawn(self._watch())
        self._tasks.spawn(self._report_progress())

    async def stop(self) -> None:
        self._up = False
        for run in list(self._runs.values()):
            run.cancel()
        await self._tasks.stop()
        await self._leave()

    def detail(self) -> str:
        if not self._up:
            return self._trouble
        return f"{self._closing}; {len(self._runs)} still run" if self._closing else self._describe()

    def signs(self) -> Signs:
        now_s = monotonic()
        return Signs(self._silent_s(now_s), self.pulse.tokens_per_s(now_s))

    def _silent_s(self, now_s: float) -> float | None:
        """Return how long nothing has come from the engine, None if nothing has to: see `Signs`."""
        if self._sent or any(key not in self._whole for key, run in self._runs.items() if not run.waits_for_client):
            return self.pulse.silent_s(now_s)
        if self._waits_for_engine and self.pulse.is_counted:
            return max(0.0, self.pulse.silent_s(now_s) - LATE_LOOKS * self._look_s)
        return None

    def run(self, effect: Dispatch, ticket: Ticket, weights: Weights | None = None) -> None:
        if not self._takes:
            _release(weights)
            return  # the core is about to hear of the loss, which ends this run too
        self._quiet_ends()
        key = effect.request, effect.attempt
        try:
            run = self._runs[key] = self._begin(effect, ticket)
        except Exception:  # another package's dialect may fail in it, and must not end the process
            logger.exception("run %s.%s on %s could not begin", *key, self.id)
            self._post(RunFailed(*key, Fault.REJECTED, "the sidecar failed to send it; its log says why", 0))
            _release(weights)
            return
        self._is_used.set()
        if ticket.is_whole:
            self._whole.add(key)
        task = self._tasks.spawn(self._run(run, ticket.client_id, weights))
        if weights is not None:
            task.add_done_callback(lambda _: _release(weights))

    async def ask(self, ticket: Ticket) -> None:
        run = self._begin(Dispatch(UNTOLD, 0, self.id, "", "", 0, 0, Cache.BASE, 0, 0, 0), ticket)
        try:
            await self._tasks.spawn(self._go(run, None))  # so that it ends when the backend is stopped
        except asyncio.CancelledError:
            run.cancel()
            raise

    async def _run(self, run: Running, client_id: str, weights: Weights | None) -> None:
        key = (run.effect.request, run.effect.attempt)
        try:
            await self._go(run, weights)
        except asyncio.CancelledError:
            if not run.cancelled:
                raise
            self._post(RunEnded(*key, run.tokens))
        except Exception as error:
            logger.exception("run %s.%s (id %s) on %s broke", *key, client_id, self.id)
            self._post(RunFailed(*key, Fault.REJECTED, f"the sidecar failed: {error}", run.tokens))
        finally:
            self._runs.pop(key, None)
            self._whole.discard(key)
            self._unheard.pop(key, None)
            self._progress.pop(run.effect.request, None)
            self._close_if_idle()

    def cancel(self, request: int, attempt: int) -> None:
        run = self._runs.get((request, attempt))
        if run is not None:
            run.cancel()

    def load(self, effect: Load, weights: Weights) -> None:
        if not self._takes:
            weights.release(settled=True)
            return
        task = self._tasks.spawn(self._load(effect, weights))
        self._loads[effect.load] = task
        task.add_done_callback(lambda done: self._load_ended(effect.load, weights, done))

    def _load_ended(self, load: int, weights: Weights, done: asyncio.Task[bool]) -> None:
        del self._loads[load]
        self._sent.discard(load)
        # Here: a task that is cancelled before it begins never reaches a `finally`.
        weights.release(not done.cancelled() and done.exception() is None and done.result())

    def _load_sent(self, load: int) -> None:
        """Note that a load has been sent: until then the silence was ours, since sending a large one takes time."""
        self._quiet_ends()
        self._sent.add(load)

    async def _load(self, effect: Load, weights: Weights) -> bool:
        """Load, and post how it ended; return True if the engine has answered."""
        try:
            result = await self._perform(effect, weights)
        except SidecarError as refused:
            result = LoadResult(refused.message, unanswered=refused.reason.row.retryable)
        except Exception as error:
            logger.exception("load %s on %s broke", effect.load, self.id)
            result = LoadResult(f"the sidecar failed: {error}", unanswered=True)
        if result.error is None:
            self._heard(0, 0)
            self._post(LoadDone(effect.load))
        elif not await self._explained(result):
            self._post(LoadFailed(effect.load, result.fault, result.error))
        return not (result.unanswered or result.lost)

    def probe(self, within_s: float) -> None:
        if self._up and (self._probing is None or self._probing.done()):
            self._probing = self._tasks.spawn(self._probe(within_s))

    async def _probe(self, within_s: float) -> None:
        """Look for a sign of life: a counted step if something is in flight, else a token for a request of ours."""
        begun_s, by_steps = monotonic(), self.pulse.is_counted and self._waits_for_engine
        alive = False
        with suppress(TimeoutError, Misused, *self.WIRE_ERRORS):
            async with asyncio.timeout(within_s):
                alive = await (self._makes_a_step() if by_steps else self._says_something(within_s))
        if not self._up:
            return
        now_s = monotonic()
        if alive or self.pulse.silent_s(now_s) < now_s - begun_s:
            self._post(BackendProbed(self.id, True))
            return
        text = f"it {'made no step' if by_steps else 'answered no token'} within {within_s:.1f} s of a probe"
        logger.warning("%s seems to be stalled: %s; %s runs are in flight", self.id, text, len(self._runs))
        self._post(BackendProbed(self.id, False, text))

    async def _hangs(self) -> bool:
        """Return True if an engine with something in flight has been silent for so long that it must hang.

        A silent engine whose steps are counted makes none. One without a count may be busy with a long answer that
        comes all at once, so it is asked for one token.
        """
        if not self.pulse.is_still(monotonic()):
            return False
        if not self.pulse.is_counted and await self._answers(self._patience_s):
            self.pulse.heard(monotonic())
            return False
        return True

    async def _makes_a_step(self) -> bool:
        before = None
        while True:
            steps = await self._steps()
            if before is not None and steps is not None and steps != before:
                return True
            before = steps if before is None else before
            await asyncio.sleep(STEPS_AGAIN_S)

    async def _says_something(self, within_s: float) -> bool:
        """Return True if the engine answers one token, or could not: runs that answer all at once are not silent.

        A request of ours might wait behind them.
        """
        held = [run for run in self._runs.values() if not run.waits_for_client]
        return bool(held and not any(run.tokens for run in held)) or await self._answers(within_s)

    async def _explained(self, result: LoadResult) -> bool:
        """Return True if a load failed because the engine is lost or closing: that ends all its loads."""
        assert result.error is not None
        if result.fault is Fault.LOST:
            return await self._wire_broke(result.error)
        return not self._takes

    # Watching.

    @property
    def _takes(self) -> bool:
        """True if requests may be sent. Those sent meanwhile end with the loss that the core is about to hear of."""
        return self._up and not self._closing

    def _heard(self, request: int, tokens: int) -> None:
        self.pulse.heard(monotonic())
        if tokens and request != UNTOLD:
            self.follower.scale.counted(tokens)
            self._progress[request] = self._progress.get(request, 0) + tokens

    def _quiet_ends(self) -> None:
        """Restart the count of silence at the first request or load, instead of at the last reply before."""
        if not self._waits_for_engine:
            self.pulse.heard(monotonic())

    @property
    def _sequences(self) -> int:
        """Sequences that the engine runs for us."""
        return sum(1 if run.ticket.facts is None else run.ticket.facts.sequences for run in self._runs.values())

    @property
    def _waits_for_engine(self) -> bool:
        """True if something is in flight that only the engine can advance."""
        return bool(self._sent) or any(not run.waits_for_client for run in self._runs.values())

    async def _report_progress(self) -> None:
        while True:
            await self._is_used.wait()
            await asyncio.sleep(PROGRESS_S)
            if not self._runs:
                self._is_used.clear()  # an idle engine costs no timer
            held = (run for run in self._runs.values() if run.waits_for_client and not run.goes_past)
            held_up = [run.effect.request for run in held]
            if self._up and (self._progress or held_up):
                progress, self._progress = self._progress, {}
                self._post(Progress(self.id, dict.fromkeys(held_up, 0) | progress))

    async def _watch(self) -> None:
        while True:
            try:
                if self._up:
                    await self._look_once()
                else:
                    await self._reach_once()
            except Misused as error:
                self._down(error.message, is_fault=True)
            except self.WIRE_ERRORS as error:
                late_s = monotonic() - self.pulse.seen_at_s  # a busy server may be late once
                if not self._up or not self._is_late(error) or late_s > self._patience_s:
                    self._down(self._silence(error))
            except Exception as error:
                trouble = f"the sidecar failed to look at it: {told(error)}"
                if trouble != self._trouble:
                    logger.exception("looking at %s failed", self.id)
                self._down(trouble)
            await asyncio.sleep(self._look_s if self._up else min(REACH_S, self._look_s))

    def _silence(self, error: Exception) -> str:
        """Return that the engine does not answer. Its address is said once: `_down` and tables begin with the id."""
        who = "it" if self.address == self.id else self.address
        return f"{who} does not answer: {self._error_text(error).replace(f'ipv4:{self.address}: ', '')}"

    def _down(self, trouble: str, is_fault: bool = False) -> None:
        """Record why the engine is not up, and log it once, and again for a fault of another kind.

        One that starts beside us is not there at once: that it does not answer yet is no warning.
        """
        if self._up:
            self._lose(trouble)
            return
        is_new, self._trouble = is_fault and trouble != self._trouble, trouble
        is_awaited = not is_fault and monotonic() < self._awaited_until_s
        level = logging.INFO if is_awaited else logging.WARNING
        if is_new or level > self._told:
            self._told = level
            logger.log(level, "%s is %s: %s", self.id, "not up yet" if is_awaited else "down", trouble)

    async def _reach_once(self) -> None:
        facts = await self._reach()
        self._foreign = self._inside_before = await self._inside() or 0
        self._ours_before.extend((0, 0))
        self.follower.scale.look(self._seen_generated(), 0, is_alone=False)
        self._up, self._measured, self._told, self._awaited_until_s = True, None, logging.NOTSET, 0.0
        address = "" if self.address == self.id else f"{self.address}, "
        logger.info("%s is up: %s%s", self.id, address, self.detail())
        self._post(BackendUp(self.id, facts, self._foreign))

    async def _look_once(self) -> None:
        replaced = await self._look()
        if not self._up:
            return  # lost during the look
        if self._waits_for_engine and await self._hangs():
            self._hung()
        elif replaced is not None:
            self._close(replaced)
        else:
            self._report_measures()

    def _hung(self) -> None:
        if self._up:
            self._lose(
                f"it answered nothing for {self.pulse.silent_s(monotonic()):.0f} s with {len(self._runs)} requests and "
                f"{len(self._sent)} loads in flight, and {'made no step' if self.pulse.is_counted else 'no probe'}"
            )

    def _close(self, cause: str) -> None:
        """Send nothing more, and report the backend lost once its runs have ended: the engine finishes them."""
        if self._takes:
            logger.warning("%s takes nothing new: %s", self.id, cause)
            self._closing = cause
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._up and self._closing and not self._runs:
            self._lose(self._closing)

    def _report_measures(self) -> None:
        """Tell the core the engine's capacity and load if they have changed."""
        before = self._foreign
        self._look_at_load()
        measured = self._measures()
        if measured is None and self._foreign != before:
            measured = BackendMeasured(self.id, None, None)
        if measured is not None and (measured := replace(measured, others=self._foreign)) != self._measured:
            self._measured = measured
            self._post(measured)

    def _look_at_load(self) -> None:
        """Find how many requests the engine has that this process did not send, such as those of one before it.

        Its gauge lags behind ours, so that while ours run the number only falls. What others send meanwhile is not
        counted: no gauge could tell it from ours.
        """
        ours = self._sequences
        inside = self._seen_inside()
        least, most = min(ours, *self._ours_before), max(ours, self._ours_before[-1])
        self._ours_before.append(ours)
        is_alone = not self._foreign and inside is not None and inside <= most
        self.follower.scale.look(self._seen_generated(), most, is_alone)
        if inside is None:
            return
        before, self._inside_before = self._inside_before, inside
        self._foreign = min(inside, before) if not (ours or least) else min(self._foreign, max(0, inside - least))

    async def _wire_broke(self, text: str, begun: bool = False) -> bool:
        """Find out whether the engine is gone or only one stream broke; return True if the backend's loss ends the run.

        A run whose answer has begun is ended at once, without waiting for the others.
        """
        if self._takes:
            if self._checking is None or self._checking.done():
                self._checking = self._tasks.spawn(self._look_after(text))
            await asyncio.shield(self._checking)
        return not self._up or (bool(self._closing) and not begun)

    def _lose(self, cause: str) -> None:
        """Report the backend lost and give up all runs and loads; what can be cancelled is cancelled."""
        self._up, self._closing, self._told = False, "", logging.WARNING  # whoever hears of the event logs it
        self._trouble = cause
        self._post(BackendLost(self.id, cause))
        for run in list(self._runs.values()):
            run.cancel()
        for task in list(self._loads.values()):
            task.cancel()
        self._was_lost()
        self._progress.clear()


def _release(weights: Weights | None) -> None:
    if weights is not None:
        weights.release()
