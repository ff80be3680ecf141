"""The credentials of `sidecar login`: one for each listener's address, in a file that only its user can read."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import time

from sidecar.cli.exits import CommandError, Exit
from sidecar.errors import Reason

RENEWED_BEFORE_S = 30.0
"""How long before its end a token is renewed: it has to last for the call."""


@dataclass(frozen=True)
class Credential:
    """An API key, or a token with what is needed to renew it. `expires_at` is in Unix seconds, 0 if not known."""

    secret: str = field(repr=False)
    expires_at: float = 0.0
    issuer: str = ""
    client_id: str = ""
    issuer_ca: str = ""
    refresh_token: str = field(default="", repr=False)


def credentials_file() -> Path:
    """Return the file in the user's configuration folder, by the XDG base directory specification."""
    home = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    return (home if home.is_absolute() else Path("~/.config").expanduser()) / "lora-sidecar" / "credentials.json"


def secret_in(text: str, where: str) -> str:
    """Return the first line of a text. Raises CommandError, which never contains it, if it is no key or token."""
    secret = text.strip().partition("\n")[0].strip()
    if not secret or not (secret.isascii() and secret.isprintable()) or " " in secret:
        raise CommandError(f"{where} has no key or token on its first line", Exit.MISUSED)
    return secret


def secret_for(address: str, renew: Callable[[Credential, str], Credential]) -> str | None:
    """Return the secret to send to an address, a renewed one if it is a token that ends; None without a login.

    `renew` is `device_flow.renewed`.

    Raises CommandError if the login has ended.
    """
    found = _read().get(address)
    if found is None or not _ends(found):
        return None if found is None else found.secret
    with _locked():  # an issuer may take a refresh token once only: two commands must not both send it
        found = _read().get(address)
        if found is not None and _ends(found):
            found = renew(found, address)
            _write(_read() | {address: found})
    return None if found is None else found.secret


def _ends(credential: Credential) -> bool:
    return bool(credential.issuer) and 0 < credential.expires_at < time() + RENEWED_BEFORE_S


def keep(address: str, credential: Credential) -> None:
    with _locked():
        _write(_read() | {address: credential})


def forget(address: str) -> bool:
    """Return False if there was no login at this address."""
    with _locked():
        kept = _read()
        found = kept.pop(address, None)
        if found is not None:
            _write(kept)
    return found is not None


def _read() -> dict[str, Credential]:
    file = credentials_file()
    try:
        mode, text = file.stat().st_mode, file.read_text()
    except FileNotFoundError:
        return {}
    if mode & 0o077:
        raise CommandError(
            f"{file}: others can read it; its keys may be known: revoke them, chmod 600 the file and log in again",
            Exit.MISUSED,
            Reason.CONFIG_INVALID.value,
        )
    try:
        return {address: Credential(**fields) for address, fields in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise CommandError(
            f"{file}: it is damaged or of a newer release; remove it and log in again",
            Exit.MISUSED,
            Reason.CONFIG_INVALID.value,
        ) from error


def _write(kept: dict[str, Credential]) -> None:
    """Replace the file as a whole. The temporary file is made with mode 0600."""
    import tempfile  # slow to import, and every command reads the file

    file = credentials_file()
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    made = Path(name)
    try:
        with os.fdopen(descriptor, "w") as written:
            json.dump({address: asdict(credential) for address, credential in kept.items()}, written, indent=1)
        made.replace(file)
    except BaseException:
        made.unlink()
        raise


@contextmanager
def _locked() -> Iterator[None]:
    """Hold the lock of the file against other commands of the user."""
    lock = credentials_file().with_suffix(".lock")
    lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
