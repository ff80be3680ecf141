"""Let only replicas call the port of the replicas, and no client whose certificate the same authority has signed.

All replicas of a pool have one certificate, or certificates with a name in common.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from cryptography import x509

from sidecar.access.certificates import names_of_grpc
from sidecar.errors import Misused, Reason
from sidecar.files import read_regular
from sidecar.fronts.checked_messages import maker_of, method_of
from sidecar.fronts.status import abort


def names_in(certificate: Path) -> frozenset[str]:
    """Return the names in a PEM file's first certificate. Raises Misused(CONFIG_INVALID)."""
    try:
        found = x509.load_pem_x509_certificate(read_regular(certificate))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise Misused(Reason.CONFIG_INVALID, f"replicas.tls.certificate: {certificate}: {why}") from error
    common = [str(each.value) for each in found.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
    try:
        alternative = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return frozenset(common)
    kinds = (x509.DNSName, x509.UniformResourceIdentifier, x509.IPAddress)
    return frozenset(str(name) for kind in kinds for name in alternative.get_values_for_type(kind))


class PeersOnly(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses calls of clients whose certificate has none of these names."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._handlers: dict[str, Any] = {}

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None
        guarded = self._handlers.get(details.method)
        if guarded is None:
            guarded = self._handlers[details.method] = self._guarded(handler)
        return guarded

    def _guarded(self, handler: Any) -> Any:
        method = method_of(handler)

        async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
            await self._check(context)
            async for answer in method(request, context):
                yield answer

        async def handle(request: Any, context: Any) -> Any:
            await self._check(context)
            return await method(request, context)

        guarded = generate if inspect.isasyncgenfunction(method) else handle
        return maker_of(handler)(guarded, handler.request_deserializer, handler.response_serializer)

    async def _check(self, context: Any) -> None:
        if self._names.isdisjoint(names_of_grpc(context.auth_context())):
            text = "only replicas may call this port, and this certificate has none of their names"
            await abort(context, Misused(Reason.UNAUTHENTICATED, text))
