"""How a download fails: for now (tried again), for good (told at once), or for want of room."""

from __future__ import annotations

from pathlib import Path

from sidecar.adapters.origins.origin import Origin, without_secrets
from sidecar.errors import Invalid, Reason, Refused

TEXT_LENGTH_MAX = 300


class Transient(Exception):
    """An attempt failed and another may not: a cut connection, a server that is busy.

    `retry_after_s` is what the server asked for; `restart` says that what has come so far is of no use.
    """

    def __init__(self, why: str, retry_after_s: float = 0.0, restart: bool = False) -> None:
        super().__init__(why)
        self.why = without_secrets(why)[:TEXT_LENGTH_MAX]
        self.retry_after_s = retry_after_s
        self.restart = restart


class Missing(Exception):
    """The origin has no file of that name."""


class Stopped(Exception):
    """Nobody waits for the download any more."""


def unreadable(origin: Origin, why: str) -> Invalid:
    """The origin will not give the file, and asking again will not help."""
    return Invalid(Reason.ORIGIN_UNREADABLE, f"{origin}: {without_secrets(why)[:TEXT_LENGTH_MAX]}")


def unavailable(origin: Origin, why: str) -> Refused:
    """The origin could not give the file now."""
    return Refused(Reason.ADAPTER_UNAVAILABLE, f"{origin} could not be fetched: {why}; try again later")


def too_large(what: str, size_bytes: int, bytes_max: int) -> Invalid:
    """More bytes than are allowed, claimed or received."""
    return Invalid(
        Reason.ADAPTER_TOO_LARGE,
        f"{what} has {size_bytes} bytes or more and {bytes_max} are allowed; raise origins.size_bytes_max if it is "
        "meant to be that large",
    )


def no_room(what: str, folder: Path, error: OSError) -> Refused:
    """The disk of a folder will not take it: it is full, or may not be written to."""
    return Refused(
        Reason.ADAPTER_UNAVAILABLE,
        f"no room for {what} on the disk of {folder} ({error.strerror or error}); free some, or give this process a "
        "data directory that it can write to",
    )
