"""The allow list: prefixes of URLs and folders of this machine. What it does not name is never opened."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sidecar.adapters.names import shown
from sidecar.adapters.origins.origin import Origin, is_url, parse_prefix
from sidecar.errors import Invalid, Misused, Reason


@dataclass(frozen=True)
class AllowList:
    """What may be registered from. Empty: nothing."""

    roots: tuple[Path, ...] = ()
    prefixes: tuple[Origin, ...] = ()

    @classmethod
    def of(cls, allow: Iterable[str] = (), roots: Iterable[Path] = ()) -> AllowList:
        """Parse the configured prefixes; those without a scheme are folders. Raises Misused(CONFIG_INVALID)."""
        entries = list(allow)
        folders = [*roots, *(Path(text) for text in entries if not is_url(text))]
        try:
            prefixes = tuple(parse_prefix(text) for text in entries if is_url(text))
        except Invalid as error:
            raise Misused(Reason.CONFIG_INVALID, f"origins.allow: {error.message}") from error
        return cls(tuple(folder.expanduser().resolve() for folder in folders), prefixes)

    def check_path(self, name: str, path: str) -> Path:
        """Return a local path as it really is. Raises Invalid for one outside the roots, or that is no path."""
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
        """Raise Invalid(ORIGIN_NOT_ALLOWED) for a URL that no prefix covers; `how` says what led there."""
        if not any(origin.is_within(prefix) for prefix in self.prefixes):
            prefixes = ", ".join(str(prefix) for prefix in self.prefixes) or "no URL"
            raise Invalid(
                Reason.ORIGIN_NOT_ALLOWED,
                f"{origin} {how} outside the allowed origins ({prefixes}); add a prefix of it to origins.allow",
            )

    def names_host(self, origin: Origin) -> bool:
        """Whether a prefix names the host itself: then its address may be private."""
        return any(prefix.host == origin.host and origin.is_within(prefix) for prefix in self.prefixes)
