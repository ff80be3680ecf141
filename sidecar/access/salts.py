"""The salts of engines' prefix caches: no tenant is answered faster for what another one has asked.

An engine with a prefix cache tells by its time to the first token whether somebody asked the same before. With a salt
blocks are found again only by requests with the same one. Each tenant has its own, made of a secret that is kept beside
the keys: it is the same at all replicas, and nobody can make another's.
"""

from __future__ import annotations

import hmac
import logging
import secrets
from collections.abc import Iterable

from sidecar.access.entries import SALT, Salt
from sidecar.access.policy import prefix_owner
from sidecar.access.store import AccessStore
from sidecar.config.access import Policies
from sidecar.errors import Refused

logger = logging.getLogger(__name__)


class Salts:
    """Makes salts. `policies` say who may use an adapter, but for a file of Cedar: then anybody may."""

    def __init__(self, store: AccessStore, policies: Policies) -> None:
        self._store = store
        self._policies = policies
        self._own = Salt(secret=secrets.token_hex(32))

    async def start(self) -> None:
        """Make the secret, unless the store has one already."""
        if self._store.get(SALT) is None:
            try:
                await self._store.put(self._own)
            except Refused as refused:  # another replica may have been first
                if self._store.get(SALT) is None:
                    logger.warning("prefix caches are salted by a secret of this process alone: %s", refused.message)

    def of(self, tenant: str, names: Iterable[tuple[str, tuple[str, ...] | None]], own: str = "") -> str | None:
        """Return the salt of a tenant's requests to an adapter; None if the tenant has its KV cache for itself.

        `names` are all that hold one of its versions, with their allow lists; none for the base model. `own` is the
        client's own salt: what it keeps apart stays apart.
        """
        users = [self._users(*each) for each in names]
        if users and None not in users and len(set().union(*filter(None, users))) == 1:
            return None
        held = self._store.get(SALT)
        secret = held if isinstance(held, Salt) else self._own
        message = "\0".join((tenant, own) if own else (tenant,))
        return hmac.new(bytes.fromhex(secret.secret), message.encode(), "sha256").hexdigest()

    def _users(self, name: str, allow: tuple[str, ...] | None) -> set[str] | None:
        """Return the tenants that may use an adapter; None for any."""
        if self._policies.cedar is not None:
            return None
        if allow is None and self._policies.ready == "tenant_prefix":
            allow = tuple(filter(None, [prefix_owner(name, self._policies.separator)])) or None
        return None if allow is None else set(allow)
