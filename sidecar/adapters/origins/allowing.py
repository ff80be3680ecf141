"""The allow list: URL prefixes and folders of this machine. Nothing outside it is ever opened."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sidecar.adapters.names import shown
from sidecar.adapters.origins.origin import Origin, is_url, parse_prefix
from sidecar.errors import Invalid, Misused, Reason


@dataclass(frozen=True)
class AllowList:
    """The folders and URL prefixes that adapters may be registered from. An empty list allows nothing."""

    roots: tuple[Path, ...] = ()
    prefixes: tuple[Origin, ...] = ()

    @classmethod
    def of(cls, allow: Iterable[str] = (), roots: Iterable[Path] = ()) -> AllowList:
        """Parse the configured prefixes; a prefix without a scheme is a folder. Raises Misused(CONFIG_INVALID)."""
        entries = list(allow)
        folders = [*roots, *(Path(text) for text in entries if not is_url(text))]
        try:
            prefixes = tuple(parse_prefix(text) for text in entries if is_url(text))
        except Invalid as error:
            raise Misused(Reason.CONFIG_INVALID, f"origins.allow: {error.message}") from error
        return cls(tuple(folder.expanduser().resolve() for folder in folders), prefixes)

    def check_path(self, name: str, path: str) -> Path:
        """Return a local path with its links resolved. Raises Invalid if it is no path or lies outside the roots."""
        try:
            resolved = Path(path).expanduser().resolve()
        except (OSError, RuntimeError, ValueError) as error:  # links in a circle, no such user, a zero byte
            raise Invalid(
                Reason.ORIGIN_UNREADABLE,
                f"{name}: {shown(path, 200)} is no path of this machine: {error}",
                adapter=name,
            ) from error
        if not any(resolved.is_relative_to(root) for root in self.roots):
            roots = ", ".join(str(root) for root in self.roots) or "none are configured"
            raise Invalid(
                Reason.ORIGIN_NOT_ALLOWED,
                f"{name}: {shown(path, 200)} is outside the allowed roots ({roots}); move it there or add its folder "
                "to adapters.roots",
                adapter=name,
            )
        return resolved

    def check(self, origin: Origin, how: str = "is") -> None:
        """Raise Invalid(ORIGIN_NOT_ALLOWED) for a URL that no prefix covers; `how` is the verb of the message."""
        if not any(origin.is_within(prefix) for prefix in self.prefixes):
            prefixes = ", ".join(str(prefix) for prefix in self.prefixes) or "no URL"
            raise Invalid(
                Reason.ORIGIN_NOT_ALLOWED,
                f"{origin} {how} outside the allowed origins ({prefixes}); add a prefix of it to origins.allow",
            )

    def names_host(self, origin: Origin) -> bool:
        """Return True if a prefix names the host itself: its address may then be private."""
        return any(prefix.host == origin.host and origin.is_within(prefix) for prefix in self.prefixes)
