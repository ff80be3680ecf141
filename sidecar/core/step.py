"""One step of the core in the making: the state, the time, the effects so far.

What a step does is in `queueing`, `running` and `storing`, which stand on each other in this order, the last lowest.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sidecar.core.effects import Effect, Heal
from sidecar.core.state import Backend, HealNote, State


@dataclass
class Step:
    """What one `step` works on. `dirty` names the backends whose queue may now be able to move."""

    state: State
    now_ns: int
    effects: list[Effect] = field(default_factory=list)
    dirty: dict[str, None] = field(default_factory=dict)
    hungry: bool = False
    """Something was fetched, freed or asked for: look at the fetches again."""
    taken_over: tuple[Backend, int] | None = None
    """Who has taken over which request last."""
    stuck: dict[str, None] = field(default_factory=dict)
    """Backends that could not send what they took over, for their policy lets nobody pass."""

    def emit(self, effect: Effect) -> None:
        self.effects.append(effect)

    def heal(self, backend: Backend, reason: str, version: str) -> None:
        backend.heals.append(HealNote(self.now_ns, reason, version))
        self.emit(Heal(backend.id, reason, version))
