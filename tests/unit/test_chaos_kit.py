"""The kit of `make chaos`, where one deed of a pair does something to the replica that the other asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc.aio import Metadata

from tests.chaos.pool import ChaosPool, ReplicaProcess
from tests.kit.redis_servers import Proxy, Server

OWNERS = {"b0": "r1", "b1": "r0"}
KILLED = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, Metadata(), Metadata(), "Connection refused")


class Asked(ReplicaProcess):
    """A replica that is killed after some answers and is back after some more."""

    def __init__(self, name: str, answers: list[Any]) -> None:
        super().__init__(name, Path(name), "", "", "", Proxy(0), None)
        self.answers = answers

    async def owns(self) -> dict[str, str]:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)


async def test_the_owner_is_found_though_a_replica_is_killed_right_after(tmp_path: Path) -> None:
    """Once all agree nobody is asked again, and one that is away before is waited for."""
    away_later = Asked("r0", [OWNERS, KILLED])
    away_first = Asked("r1", [KILLED, KILLED, OWNERS])
    pool = ChaosPool([away_later, Asked("r1", [OWNERS])], [None, None], [], Server("redis", tmp_path))  # type: ignore[list-item]
    assert (await pool.owner()).name == "r1"
    pool.replicas = [Asked("r0", [OWNERS]), away_first]
    assert (await pool.owner()) is away_first
