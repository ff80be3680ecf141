"""How an engine is restarted."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from sidecar.config.section import Section


class Restart(Section):
    """One way to restart an engine: a command, or deleting its pod, in whose place its workload makes another.

    `command` is a program and its arguments; no shell reads it. It finds the engine in its environment
    (`ENGINE_ID`, `ENGINE_URL`, `ENGINE_ADDRESS`) and ends within `timeout_s`, once the old
    engine takes no more connections. The new one must answer within `ready_s`.
    """

    command: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    delete_pod: bool = False
    timeout_s: float = Field(300.0, gt=0)
    ready_s: float = Field(900.0, gt=0)

    @model_validator(mode="after")
    def _is_one_way(self) -> Self:
        if bool(self.command) == self.delete_pod:
            raise ValueError("it needs one of command and delete_pod")
        return self
