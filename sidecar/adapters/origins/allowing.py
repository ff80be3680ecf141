"""The allow list: URL prefixes and folders of this machine. Nothing outside it is ever opened."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from sidecar.adapters.folder import Folder
from sidecar.adapters.names import shown
from sidecar.adapters.origins.origin import Origin, is_url, parse_prefix
from sidecar.errors import Invalid, Misused, Reason, SidecarError


@dataclass(frozen=True)
class AllowList:
    """The folders and URL prefixes that adapters may be registered from. An empty list allows nothing."""

    roots: tuple[Path, ...] = ()
    prefixes: tuple[Origin, ...] = ()
    refused: Callable[[str, str], SidecarError] | None = None
    """Returns the error for a path that a tenant may not register, given it and why, which tenants are not told."""

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

    def open(self, name: str, path: str) -> Folder:
        """Open a folder that a caller names by its path. It lies in one of the roots, whatever becomes of links.

        Raises Invalid, or what `refused` returns: then the error tells nothing of what is there.
        """
        try:
            try:
                named = Path(path)
                found = (named if self.refused else named.expanduser()).resolve()
            except (OSError, RuntimeError, ValueError) as error:  # links in a circle, no such user, a zero byte
                why = f"{name}: {shown(path, 200)} is no path of this machine: {error}"
                raise Invalid(Reason.ORIGIN_UNREADABLE, why, adapter=name) from error
            if (root := self._root_of(found)) is None:
                roots = ", ".join(str(root) for root in self.roots) or "none are configured"
                raise Invalid(
                    Reason.ORIGIN_NOT_ALLOWED,
                    f"{name}: {shown(path, 200)} is outside the allowed roots ({roots}); move it there or add its "
                    "folder to adapters.roots",
                    adapter=name,
                )
            return Folder(found, name, root)
        except Invalid as error:
            if self.refused is None:
                raise
            raise self.refused(path, error.message) from None

    def open_again(self, name: str, path: Path) -> Folder:
        """Open a registered folder by the path that `open` has found, which had no link. Raises Invalid."""
        return Folder(path, name, self._root_of(path) or Path(path.anchor))

    def _root_of(self, path: Path) -> Path | None:
        return next((root for root in self.roots if path.is_relative_to(root)), None)

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
