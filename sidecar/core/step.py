"""One step of the core in progress: the state, the time and the effects so far.

Its acts are in `queueing`, `running` and `storing`: `running` uses `queueing`, and both use `storing`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sidecar.core.effects import Effect, Heal
from sidecar.core.state import Backend, HealNote, State


@dataclass(slots=True)
class Step:
    """What one step works on. `dirty` names the backends whose queue may be able to move now."""

    state: State
    now_ns: int
    effects: list[Effect] = field(default_factory=list)
    dirty: dict[str, None] = field(default_factory=dict)
    hungry: bool = False
    """Something was fetched, freed or requested: look at the fetches again."""
    taken_over: tuple[Backend, int] | None = None
    """The last backend that took over a request, and that request."""
    stuck: dict[str, None] = field(default_factory=dict)
    """Backends that could not send what they took over, because their ordering policy lets no request overtake."""

    def emit(self, effect: Effect) -> None:
        self.effects.append(effect)

    def heal(self, backend: Backend, reason: str, version: str) -> None:
        backend.heals.append(HealNote(self.now_ns, reason, version))
        self.emit(Heal(backend.id, reason, version))
