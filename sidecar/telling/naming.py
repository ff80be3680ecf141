"""What people call a version in what they are shown. Several names may stand for the same content."""

from __future__ import annotations

from collections import Counter

from policies.views import BASE
from sidecar.core.state import Backend, State


def called(state: State, digest: str, backend: Backend | None = None) -> str:
    """Return a version's name, with its ordinal unless it is the current one; the start of its digest if it has none.

    Of several names it is the one that most of its requests at a backend, or at all, ask for, and the first of equals;
    "a = b" while nobody asks.
    """
    if digest == BASE:
        return "base model"
    names = names_of(state, digest, backend)
    shown = (name if state.names[name].digest == digest else _numbered(state, name, digest) for name in names)
    return " = ".join(shown) or digest[:12]


def version_label(state: State, digest: str) -> str:
    """Return what `called` does, always with the ordinal."""
    return " = ".join(_numbered(state, name, digest) for name in names_of(state, digest)) or digest[:12]


def names_of(state: State, digest: str, backend: Backend | None = None) -> list[str]:
    """Return the one name by which a version is asked for, or all its names in order."""
    version = state.versions.get(digest)
    if version is None or len(version.names) < 2:
        return [] if version is None else list(version.names)
    asked: Counter[str] = Counter()
    for each in state.backends.values() if backend is None else (backend,):
        queued = each.queued_by_version.get(digest, ())
        for request in (state.requests[number] for number in (*each.running, *queued)):
            if request.version == digest and request.view.name in version.names:
                asked[request.view.name] += 1
    return [min(asked, key=lambda name: (-asked[name], name))] if asked else sorted(version.names)


def _numbered(state: State, name: str, digest: str) -> str:
    return f"{name}@v{max(number for number, held in state.names[name].versions.items() if held == digest)}"
