"""Prefetch nothing: queued versions are fetched, opened ones are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from policies.views import Spare


class Nothing:
    """Stateless: there is nothing to decide."""

    def on_request(self, version: str, size_bytes: int, now_ns: int) -> None:
        pass

    def advise(self, spare: Spare, now_ns: int) -> Sequence[str]:
        return ()

    def snapshot(self) -> Any:
        return None

    def restore(self, state: Any) -> None:
        pass
