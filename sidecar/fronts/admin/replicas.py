"""The replicas of the pool, `lorasidecar.v1.Replicas`."""

from __future__ import annotations

from typing import Any

from sidecar.fronts.status import answers_errors
from sidecar.ownership.facts import Member
from sidecar.proto import admin_pb2, admin_pb2_grpc
from sidecar.replicas.replica import Replica


class ReplicasService(admin_pb2_grpc.ReplicasServicer):
    """Shows who there is and who owns what; None is the one and only replica."""

    def __init__(self, replica: Replica | None) -> None:
        self._replica = replica

    @answers_errors
    async def List(self, request: Any, context: Any) -> Any:  # noqa: N802
        replica = self._replica
        members = [] if replica is None else [_message(replica, member) for member in replica.members()]
        return admin_pb2.ListReplicasResponse(replicas=members)


def _message(replica: Replica, member: Member) -> Any:
    is_self = member.id == replica.member.id
    return admin_pb2.Replica(
        id=member.id,
        name=member.name,
        address=replica.address if is_self else replica.peers.addresses().get(member.id, ""),
        self=is_self,
        leads=replica.board.leader == member.id,
        draining=member.draining,
        weight=member.weight,
        owns=[
            admin_pb2.OwnedBackend(backend=backend, epoch=known.epoch, state=known.state)
            for backend, known in sorted(replica.board.standings.items())
            if known.owner == member.id
        ],
        forwards=replica.router.forwards if is_self else 0,
        reroutes=replica.router.reroutes if is_self else 0,
    )
