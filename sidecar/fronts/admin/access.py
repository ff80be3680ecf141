"""The service `lorasidecar.v1.Access`, whose RPCs are answered by several parts."""

from __future__ import annotations

from sidecar.proto import admin_pb2, admin_pb2_grpc

RPCS = tuple(method.name for method in admin_pb2.DESCRIPTOR.services_by_name["Access"].methods)


class AccessService(admin_pb2_grpc.AccessServicer):
    """Gives each RPC to the part that has a method of its name; the others answer UNIMPLEMENTED.

    A part is an object with methods as a servicer has them: `async def SetLimit(self, request, context)`.
    """

    def __init__(self, *parts: object) -> None:
        for part in parts:
            for name in RPCS:
                if hasattr(part, name):
                    setattr(self, name, getattr(part, name))
