"""API keys: make one, find whose a presented one is, and tell whether it is still good."""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
from hashlib import sha256
from pathlib import Path
from time import gmtime, strftime
from typing import NamedTuple

from sidecar.access.entries import KEY, AccessEntry, Key
from sidecar.access.keys_file import ID_PREFIX, SECRET_LENGTH_MAX, KeysFile
from sidecar.access.principal import Principal, Proof
from sidecar.access.store import AccessStore
from sidecar.errors import Misused, Reason, Refused
from sidecar.tasks import ended

PREFIX = "lsk_"
"""What every secret begins with, so that scanners of repositories and logs find it: lsk_<12 digits>_<64 digits>."""
ID_BYTES, SECRET_BYTES = 6, 32
SECRET = r"lsk_([0-9a-f]{12})_[0-9A-Za-z]{16,}"
"""A pattern of secrets, of those that were cut off too, with the key's id as its group."""
_SECRET = re.compile(SECRET)
LOOK_S = 1.0
"""How often the file of keys is looked at."""
UNKNOWN = "the API key is not known here; ask your operator for one"


def new_secret() -> tuple[str, str, str]:
    """Return a new key's id, its secret and the SHA-256 of the secret, which is all that may be kept."""
    key_id = secrets.token_hex(ID_BYTES)
    secret = f"{PREFIX}{key_id}_{secrets.token_hex(SECRET_BYTES)}"
    return key_id, secret, digest_of(secret)


def id_in(text: str) -> str:
    """Return a key's id, which may be given as the whole key by mistake: nothing else of it is used."""
    return text.removeprefix(PREFIX).partition("_")[0] if text.startswith(PREFIX) else text


def without_secrets(text: str) -> str:
    """Return a text in which of keys only their ids are left: callers write keys where they do not belong."""
    return _SECRET.sub(r"lsk_\1_(hidden)", text) if PREFIX in text else text


def digest_of(secret: str) -> str:
    return sha256(secret.encode(errors="replace")).hexdigest()


class _Held(NamedTuple):
    key: Key
    principal: Principal


class KeyBook:
    """The keys of a store and of `identity.keys_file`, by the SHA-256 of their secrets.

    `find` and `check` are synchronous and read memory only. They raise Misused(UNAUTHENTICATED) for a key that is
    unknown, revoked or has ended, and Refused(STATE_UNAVAILABLE) for a key of Redis that has not answered for
    `stale_max_s`: then nobody can tell whether the key was revoked. Times are in Unix seconds.
    """

    def __init__(self, store: AccessStore, keys_file: Path | None, stale_max_s: float) -> None:
        """Read the file. Raises Misused(CONFIG_INVALID) naming what is wrong with it."""
        self._store = store
        self._file = None if keys_file is None else KeysFile(keys_file)
        self._stale_max_s = stale_max_s
        self._by_digest: dict[str, _Held] = {}
        self._by_id: dict[str, _Held] = {}
        self._of_file: tuple[Key, ...] = ()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Take the keys of the store, which has started, and follow the changes of both."""
        self._store.subscribe(self._changed)
        for key in self.all():
            self._add(key)
        if self._file is not None:
            self._take_file(self._file)
            self._task = asyncio.create_task(self._watch(self._file))

    async def close(self) -> None:
        await ended(self._task)

    def find(self, secret: str, now: float) -> Principal:
        """Return whose a presented key is."""
        if len(secret) > SECRET_LENGTH_MAX:
            raise Misused(Reason.UNAUTHENTICATED, UNKNOWN)
        digest = digest_of(secret)
        held = self._by_digest.get(digest)
        # The digest of what a stranger sends tells nothing about another digest, however long the look-up takes.
        if held is None or not hmac.compare_digest(held.key.sha256, digest):
            raise Misused(Reason.UNAUTHENTICATED, UNKNOWN)
        self._check(held.key, now)
        self._store.uses.note(held.key.id, now)
        return held.principal

    def check(self, principal: Principal, now: float) -> None:
        """Return if the key of a principal that was found before is good, and stands for the same as then."""
        held = self._by_id.get(principal.subject)
        if held is None:
            raise Misused(Reason.UNAUTHENTICATED, f"the API key {principal.subject} does not exist any more")
        self._check(held.key, now)
        if held.principal != principal:
            raise Misused(Reason.UNAUTHENTICATED, f"the API key {principal.subject} was changed; call again with it")

    def all(self) -> list[Key]:
        """Return every key, those of the file last."""
        return [*self._store.keys(), *self._of_file]

    async def revoke(self, key_id: str) -> Key:
        """Revoke a key as `AccessStore.revoke` does, whose errors say then where and for how long it is still good.

        Raises Refused(INVALID_REQUEST) for a key of the file.
        """
        if any(key.id == key_id for key in self._of_file):
            raise Refused(
                Reason.INVALID_REQUEST, f"the key {key_id} is in identity.keys_file; take it out there, which ends it"
            )
        try:
            return await self._store.revoke(key_id)
        except Refused as error:
            key = self._store.get(KEY + key_id)
            if error.reason is not Reason.STATE_UNAVAILABLE or not isinstance(key, Key):
                raise
            self._add(key)
            raise Refused(error.reason, self._still_good(key, error.message)) from error

    def _still_good(self, key: Key, why: str) -> str:
        """Return what became of a revocation that failed, and until when which replicas take the key."""
        until = _utc(_earliest(self._store.clock() + self._stale_max_s, key.expires_at))
        if not self._store.is_unstored(key):
            return (
                f"the key {key.id} is revoked, and a replica that has not heard of it takes it until it does, without "
                f"Redis until {until} at the latest: {why}"
            )
        if self._store.answered_at is None:
            where, others = "on disk", "a start before then takes the key again"
        else:
            where, others = (
                "in Redis",
                f"other replicas take the key until then, without Redis until {until} at the latest",
            )
        return (
            f"the key {key.id} is refused here from now on; that is not {where} yet and is tried again until it is; "
            f"{others}: {why}"
        )

    @property
    def trouble(self) -> str:
        """Why the file of keys as it is now is not in use; "" if it is."""
        return "" if self._file is None else self._file.trouble

    def _check(self, key: Key, now: float) -> None:
        if key.revoked_at is not None:
            raise Misused(Reason.UNAUTHENTICATED, f"the API key {key.id} was revoked at {_utc(key.revoked_at)}")
        if key.expires_at is not None and now >= key.expires_at:
            raise Misused(
                Reason.UNAUTHENTICATED,
                f"the API key {key.id} ended at {_utc(key.expires_at)}; ask your operator for another",
            )
        answered_at = self._store.answered_at
        if answered_at is None or key.id.startswith(ID_PREFIX) or now - answered_at <= self._stale_max_s:
            return
        raise Refused(
            Reason.STATE_UNAVAILABLE,
            f"the API key {key.id} cannot be checked: the Redis of the keys has not answered since "
            f"{_utc(answered_at)}, and without it a key is good for {self._stale_max_s:g} s; try again later",
        )

    def _changed(self, name: str, entry: AccessEntry | None) -> None:
        if name.startswith(KEY):
            self._drop(name.removeprefix(KEY))
            if isinstance(entry, Key):
                self._add(entry)

    def _add(self, key: Key) -> None:
        self._drop(key.id)
        principal = Principal(key.tenant, Proof.KEY, key.id, key.groups, key.roles, key.klass, key.expires_at)
        self._by_id[key.id] = self._by_digest[key.sha256] = _Held(key, principal)

    def _drop(self, key_id: str) -> None:
        held = self._by_id.pop(key_id, None)
        if held is not None and self._by_digest.get(held.key.sha256) is held:
            del self._by_digest[held.key.sha256]

    async def _watch(self, file: KeysFile) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            if await asyncio.to_thread(file.look):
                self._take_file(file)

    def _take_file(self, file: KeysFile) -> None:
        for key in self._of_file:
            self._drop(key.id)
        for key in file.keys:
            self._add(key)
        self._of_file = file.keys


def _earliest(at: float, end: float | None) -> float:
    return at if end is None else min(at, end)


def _utc(at: float) -> str:
    return strftime("%Y-%m-%d %H:%M:%S UTC", gmtime(at))
