"""Which backends' queues are this replica's own: what is sent to an engine is decided in one place at a time.

An answer that has begun goes on when its backend is given up. All else that is here for it is refused, so that it can
be sent to the new owner: what ran without a token is cancelled, and may run a second time.
"""

from __future__ import annotations

from sidecar.core import healing, operators
from sidecar.core.enums import Phase, Voided
from sidecar.core.events import BackendGivenUp, BackendTaken
from sidecar.core.silence import Silence
from sidecar.core.step import Turn
from sidecar.errors import Reason


def taken(turn: Turn, event: BackendTaken) -> None:
    """Serve a backend from now on, or go on under a newer epoch. Others may have made its engine evict anything."""
    backend = turn.state.backends[event.backend]
    was_owned, backend.owned, backend.epoch = backend.owned, True, event.epoch
    if was_owned:
        return
    backend.silence = Silence()
    turn.state.forget_servers()
    healing.forget_idle(turn, backend)
    turn.route_the_unrouted()
    turn.dirty[backend.id] = None
    if backend.phase is Phase.UP:
        operators.want_all_pinned(turn, backend)


def given_up(turn: Turn, event: BackendGivenUp) -> None:
    """Send nothing more to a backend, and give back what has no token yet."""
    backend = turn.state.backends[event.backend]
    if not backend.owned:
        return
    backend.owned = False
    backend.warmups.clear()
    turn.state.forget_servers()
    turn.void_promises(backend, Voided.MOVED)
    message = f"{backend.id} is another replica's now ({event.cause}); send the request again"
    for request in [turn.state.requests[number] for number in (*backend.queued, *backend.running)]:
        if not request.first_token and not request.settled:
            turn.cancel(request, Reason.NOT_OWNER, message)
    turn.route_the_unrouted()
