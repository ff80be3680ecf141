"""The salts of engines' prefix caches: no tenant is answered faster for what another one has asked.

An engine with a prefix cache tells by its time to the first token whether somebody asked the same before. With a salt
blocks are found again only by requests with the same one. Each tenant has its own, made of a secret that is kept beside
the keys: it is the same at all replicas, and nobody can make another's.
"""

from __future__ import annotations

import hmac
import logging
import secrets

from sidecar.access.entries import SALT, Salt
from sidecar.access.store import AccessStore
from sidecar.errors import Refused

logger = logging.getLogger(__name__)


class Salts:
    """Makes salts."""

    def __init__(self, store: AccessStore) -> None:
        self._store = store
        self._own = Salt(secret=secrets.token_hex(32))

    async def start(self) -> None:
        """Make the secret, unless the store has one already."""
        if self._store.get(SALT) is None:
            try:
                await self._store.put(self._own)
            except Refused as refused:  # another replica may have been first
                if self._store.get(SALT) is None:
                    logger.warning("prefix caches are salted by a secret of this process alone: %s", refused.message)

    def of(self, tenant: str, own: str = "") -> str:
        """Return the salt of a tenant's requests. `own` is the client's own salt: what it keeps apart stays apart.

        Adapters of a single tenant are salted too: others may get their names, and engines find blocks by name.
        """
        held = self._store.get(SALT)
        secret = held if isinstance(held, Salt) else self._own
        message = "\0".join((tenant, own) if own else (tenant,))
        return hmac.new(bytes.fromhex(secret.secret), message.encode(), "sha256").hexdigest()
