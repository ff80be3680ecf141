"""The allow list: URL prefixes and folders of this machine. Nothing outside it is ever opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from sidecar.adapters.folder import Folder
from sidecar.adapters.names import shown
from sidecar.adapters.origins.origin import Origin, is_url, parse_prefix
from sidecar.errors import Invalid, Misused, Reason, SidecarError

LINKS_MAX = 40  # on the way to a folder, as for Linux


@dataclass(frozen=True)
class AllowList:
    """The folders and URL prefixes that adapters may be registered from. An empty list allows nothing."""

    roots: tuple[Path, ...] = ()
    prefixes: tuple[Origin, ...] = ()
    refused: Callable[[str, str], SidecarError] | None = None
    """Returns the error for a path that a tenant may not register, given it and why, which tenants are not told."""
    written: tuple[Path, ...] = ()
    """The roots as they are configured: a way to one of them may be a link."""

    @classmethod
    def of(cls, allow: Iterable[str] = (), roots: Iterable[Path] = ()) -> AllowList:
        """Parse the configured prefixes; a prefix without a scheme is a folder. Raises Misused(CONFIG_INVALID)."""
        entries = list(allow)
        folders = [each.expanduser() for each in (*roots, *(Path(text) for text in entries if not is_url(text)))]
        try:
            prefixes = tuple(parse_prefix(text) for text in entries if is_url(text))
        except Invalid as error:
            raise Misused(Reason.CONFIG_INVALID, f"origins.allow: {error.message}") from error
        return cls(
            tuple(each.resolve() for each in folders), prefixes, written=tuple(each.absolute() for each in folders)
        )

    def below(self, name: str) -> AllowList:
        """Return this list with the folder of that name in each root as the root."""
        roots, written = (tuple(folder / name for folder in folders) for folders in (self.roots, self.written))
        return replace(self, roots=roots, written=written)

    def open(self, name: str, path: str) -> Folder:
        """Open a folder that a caller names by its path. It lies in one of the roots, whatever becomes of links.

        Raises Invalid, or what `refused` returns: then the error tells nothing of what is there.
        """
        try:
            try:
                found = self._beneath(Path(path)) if self.refused else Path(path).expanduser().resolve()
            except (OSError, RuntimeError, ValueError) as error:  # links in a circle, no such user, a zero byte
                why = f"{name}: {shown(path, 200)} is no path of this machine: {error}"
                raise Invalid(Reason.ORIGIN_UNREADABLE, why, adapter=name) from error
            if found is None or (root := self._root_of(found)) is None:
                roots = ", ".join(str(root) for root in self.roots) or "none are configured"
                raise Invalid(
                    Reason.ORIGIN_NOT_ALLOWED,
                    f"{name}: {shown(path, 200)} is outside the allowed roots ({roots}); move it there, add its "
                    "folder to adapters.roots, or send its files with register --push",
                    adapter=name,
                )
            return Folder(found, name, root)
        except Invalid as error:
            if self.refused is None:
                raise
            raise self.refused(path, error.message) from None

    def _beneath(self, path: Path) -> Path | None:
        """Return the folder that a path leads to; None if its text, or that of a link on the way, leaves the roots.

        Nothing outside of them is looked at: `LINK/../x` would tell whether the host has that link, and to what depth.
        """
        for _ in range(LINKS_MAX):
            spelled = zip((*self.written, *self.roots), self.roots * 2, strict=True)
            at, root = next(((at, root) for at, root in spelled if path.is_relative_to(at)), (path, None))
            if root is None or ".." in path.parts:
                return None
            path = root / path.relative_to(at)
            ways = (way for way in reversed((path, *path.parents)) if way.is_relative_to(root))
            link = next((way for way in ways if way.is_symlink()), None)
            if link is None:
                return path
            path = Path(os.path.normpath(link.parent / link.readlink()), path.relative_to(link))
        return None

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
