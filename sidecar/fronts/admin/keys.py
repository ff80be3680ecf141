"""Answer `Access.CreateKey`, `Access.ListKeys` and `Access.RevokeKey`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from sidecar.access.access import CLASS_DEFAULT, Access
from sidecar.access.configured import unknown_class
from sidecar.access.entries import Key
from sidecar.access.keys import KeyBook, id_in, new_secret
from sidecar.access.principal import TIME_MAX, Action, Proof, Resource, Sort
from sidecar.access.store import AccessStore
from sidecar.config.identities import clipped
from sidecar.config.section import problems
from sidecar.errors import Reason, Refused
from sidecar.fronts import callers
from sidecar.fronts.status import answers_errors
from sidecar.proto import admin_pb2
from sidecar.proto.filling import filled


class KeyCalls:
    """Makes, lists and revokes keys, which may stand for one of `classes`; a part of `AccessService`."""

    def __init__(self, store: AccessStore, book: KeyBook, classes: Sequence[str], access: Access) -> None:
        self._access = access
        self._store = store
        self._book = book
        self.classes = classes

    @answers_errors
    async def CreateKey(self, request: Any, context: Any) -> Any:  # noqa: N802 — gRPC's names, here and below
        key_id, secret, digest = new_secret()
        key = self._key(request, key_id, digest)
        self._check_grant(key, callers.id_of_call(context))
        try:
            await self._store.put(key)
        except Refused:
            if self._store.get(key.name) != key:
                raise
            # It is stored, and a replica that has not heard of it yet will. Nobody else knows its secret.
        return admin_pb2.CreateKeyResponse(secret=secret, key=self._message(key, 0.0))

    def _check_grant(self, key: Key, request_id: str) -> None:
        """Raise Refused(NOT_ALLOWED) if a caller that manages its own tenant gives a key more than it has itself."""
        caller = callers.CALLER.get()
        principal = self._access.judged(caller)
        if principal is None or self._access.decide(principal, Action.MANAGE).allowed:
            return
        more = sorted({*key.roles} - {*principal.roles} | {*key.groups} - {*principal.groups})
        if principal.klass not in ("", key.klass):
            more.append(f"class {key.klass or CLASS_DEFAULT}")
        # A token of an issuer ends in minutes, and is how people come to make keys.
        if principal.proof is Proof.KEY and (key.expires_at or TIME_MAX) > (principal.expires_at or TIME_MAX):
            more.append("a later end")
        if not more:
            return
        why = f"you may give a key no more than you have yourself, and this one would have {', '.join(more)}"
        self._access.denied(
            caller, Action.MANAGE, Resource(Sort.TENANT, key.tenant), why, request_id, "Access.CreateKey"
        )
        if self._access.mode == "enforce":
            raise Refused(Reason.NOT_ALLOWED, f'{why}; ask your operator with id "{request_id}"')

    def _key(self, request: Any, key_id: str, digest: str) -> Key:
        """Return the key that is asked for. Raises Refused(INVALID_REQUEST)."""
        maker = callers.CALLER.get().principal
        now, expires_s = self._store.clock(), request.expires_s
        if not 0 <= expires_s < TIME_MAX - now:
            raise Refused(
                Reason.INVALID_REQUEST,
                f"the key would end after {expires_s:g} s; that must be before the year 10000, or 0 for a key without "
                "an end",
            )
        klass = getattr(request, "class")
        if klass and klass not in self.classes:
            raise Refused(Reason.INVALID_REQUEST, unknown_class(clipped(klass), self.classes))
        try:
            return Key(
                id=key_id,
                sha256=digest,
                tenant=request.tenant,
                roles=tuple(request.roles),
                groups=tuple(request.groups),
                klass=klass,
                note=request.note,
                created_by=maker.subject or maker.proof.value,
                created_at=now,
                expires_at=now + expires_s if expires_s else None,
            )
        except ValidationError as error:
            raise Refused(Reason.INVALID_REQUEST, "; ".join(problems(error, Key))) from None

    @answers_errors
    async def ListKeys(self, request: Any, context: Any) -> Any:  # noqa: N802
        used = await self._store.uses.all()
        listed = [key for key in self._book.all() if not request.tenant or key.tenant == request.tenant]
        return admin_pb2.ListKeysResponse(keys=[self._message(key, used.get(key.id, 0.0)) for key in listed])

    @answers_errors
    async def RevokeKey(self, request: Any, context: Any) -> Any:  # noqa: N802
        key = await self._book.revoke(id_in(request.id))
        return self._message(key, (await self._store.uses.all()).get(key.id, 0.0))

    def _message(self, key: Key, used_at: float) -> Any:
        state = key.state(self._store.clock())
        return filled(admin_pb2.Key, key, used_at=used_at, state=state, **{"class": key.klass})
