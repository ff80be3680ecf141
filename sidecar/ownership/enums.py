"""The closed sets of ownership: what members ask each other, and why a backend is given up."""

from __future__ import annotations

from enum import Enum


class Purpose(Enum):
    """What a member asks another for."""

    GO_ON = "go on without Redis"
    TAKE_OVER = "take over a lease that ended"
    MOVE = "move a backend to whom it belongs"


class Why(Enum):
    """Why a backend's queue is given up. Runs in flight continue; requests without a token may be sent elsewhere."""

    LEASE_ENDED = "lease ended"
    TAKEN = "taken"
    MOVED = "moved"
    DRAINING = "draining"
    GONE = "gone"
