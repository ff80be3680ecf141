"""The state of one backend at this member: a class for each phase, with the fields that exist only in it.

FREE ─→ ASKING ─→ ACQUIRING ─→ OWNED ─→ HANDING_OVER ─→ FREE
  └────────────────↗            ↓ ↑
                               LAPSED        every state may fall back to FREE
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sidecar.ownership.effects import SendAcquire


@dataclass
class Round:
    """One question to several members. `missing` maps the number of each open ask to its member."""

    sent_ns: int
    missing: dict[int, str]
    agreed: list[str] = field(default_factory=list)
    refused: bool = False
    holder: bool = False
    """One of them holds the backend."""


@dataclass
class Free:
    """Not this member's. `since_ns` is when the backend became free as far as is known; None while it is held."""

    since_ns: int | None = None


@dataclass
class Ground:
    """The basis of an acquisition: Redis's generation, and until when, on Redis's clock, it may be carried out."""

    generation: str
    by_ns: int


@dataclass
class Asking:
    """Other members are asked before a lease is taken over. `vouched` are those that agree without being asked.

    `witnesses` are those of the lease, its holder included; empty if Redis knows of no lease.
    """

    free: Free
    ground: Ground
    round: Round
    vouched: tuple[str, ...]
    witnesses: tuple[str, ...]


@dataclass
class Acquiring:
    """Redis was asked for the lease."""

    free: Free
    call: SendAcquire
    sent_ns: int


@dataclass
class Call:
    """A renewal or a claim that Redis has not answered yet."""

    number: int
    sent_ns: int


@dataclass
class Hold:
    """A lease. It ends at `valid_ns` of this member's own clock.

    `witnesses` maps the number of the last answered renewal, and of each later one, to the witnesses that it named:
    Redis has recorded one of them.
    """

    token: str
    epoch: int
    granted_ns: int
    """When the request that Redis granted last was sent."""
    valid_ns: int
    renew_ns: int
    witnesses: dict[int, tuple[str, ...]]
    claimed: bool = False
    """A claim was sent and not yet granted, so Redis may have given this very lease a newer epoch."""
    call: Call | None = None
    round: Round | None = None
    ask_ns: int | None = None
    """When to ask the witnesses; None while Redis answers."""


@dataclass
class Owned:
    hold: Hold


@dataclass
class Lapsed:
    """A lease that ended while Redis was unreachable and a witness had not pledged in time.

    It is owned again, under its epoch, if all witnesses pledge it and none has agreed to another owner before.
    """

    hold: Hold


@dataclass
class HandingOver:
    """Nothing is dispatched any more. Once nothing is in flight either, the lease is given back.

    It must be given back to a Redis that knows of it: otherwise the release means nothing and every member would wait.
    """

    hold: Hold
    is_idle: bool = False


State = Free | Asking | Acquiring | Owned | Lapsed | HandingOver

MAY_FOLLOW: dict[type, tuple[type, ...]] = {
    Free: (Asking, Acquiring),
    Asking: (Acquiring, Free),
    Acquiring: (Owned, Free),
    Owned: (HandingOver, Lapsed, Free),
    Lapsed: (Owned, Free),
    HandingOver: (Free,),
}


@dataclass
class Slot:
    """One backend as this member sees it. `home` is the name of its replica, "" if any may own it."""

    backend: str
    home: str = ""
    state: State = field(default_factory=Free)

    def become(self, state: State) -> None:
        assert type(state) in MAY_FOLLOW[type(self.state)], f"{self.backend}: {self.state} → {state}"
        self.state = state

    @property
    def asking_hold(self) -> Hold | None:
        """The lease whose witnesses may be asked to let it continue."""
        return self.state.hold if isinstance(self.state, Owned | Lapsed) else None

    @property
    def hold(self) -> Hold | None:
        return self.state.hold if isinstance(self.state, Owned | HandingOver) else None


@dataclass
class Pledge:
    """This member neither acquires a backend nor pledges it to another before `until_ns`."""

    to: str
    until_ns: int


@dataclass
class Move:
    """A backend that its owner was asked to hand over to this member. At `again_ns` it is asked again."""

    backend: str
    owner: str
    number: int
    again_ns: int
    agreed: bool = False
