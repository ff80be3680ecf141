"""Parse the URL of the folder that an adapter comes from.

A URL is parsed once and refused if it could be read in two ways (dot segments, encoded slashes, a user
name): the allow list compares the parsed parts, and the stores open the same parts.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace
from typing import Self
from urllib.parse import unquote, urlsplit

from sidecar.adapters.names import shown
from sidecar.errors import Invalid, Reason

WEB = ("http", "https")
BUCKETS = ("hf", "s3", "gs", "az")
PUSHED = "push"
"""The scheme of files that a client pushed: `push://<digest>` records their source and cannot be fetched."""

SHOWN_LENGTH_MAX = 200
URL_LENGTH_MAX = 8192
"""Long, because signed URLs are."""
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_HOST = re.compile(r"[a-z0-9]([a-z0-9._-]{0,252}[a-z0-9])?\Z")
_PORTS = {"http": 80, "https": 443}
_SECRETS = re.compile(r"(\w+://)(?:[^\s/@'\"]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*?(?=[;,.:)]*(?:[\s'\"]|$)))?")
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f\\]")


@dataclass(frozen=True)
class Origin:
    """A folder behind a URL. `host` is a host with its port, a bucket, or the owner of a repository.

    `path` has no slash at either end. `query` is sent with every file request and nowhere else: it may be a
    signature.
    """

    scheme: str
    host: str
    path: str
    query: str = ""

    def __str__(self) -> str:
        """Return the URL without its query, safe for the registry, a log and a message."""
        return f"{self.scheme}://{self.host}" + (f"/{self.path}" if self.path else "")

    @property
    def is_web(self) -> bool:
        return self.scheme in WEB

    def file(self, name: str) -> Self:
        """Return the URL of a file in the folder."""
        return replace(self, path=f"{self.path}/{name}" if self.path else name)

    def is_within(self, prefix: Origin) -> bool:
        """Return True if this equals the prefix or lies below it; "/a" is no prefix of "/ab".

        A prefix without a host covers every host.
        """
        if self.scheme != prefix.scheme or (prefix.host and self.host != prefix.host):
            return False
        below = self.path.removeprefix(prefix.path) if self.path.startswith(prefix.path) else None
        # A revision follows a repository's name: hf://owner/name@main/folder.
        ends = ("/", "@") if self.scheme == "hf" else ("/",)
        return below is not None and (not prefix.path or not below or below.startswith(ends))


def is_url(text: str) -> bool:
    """Return True if a text is a URL, not a path of this machine."""
    return _URL.match(text) is not None


def parse_origin(text: str) -> Origin:
    """Parse a URL. Raises Invalid(ORIGIN_NOT_ALLOWED) for a malformed, ambiguous or unsupported one."""
    scheme = text.partition("://")[0].lower()
    if scheme not in WEB + BUCKETS:
        raise _refused(text, f'"{scheme[:20]}" is not one of {", ".join(WEB + BUCKETS)}; give one, or a path')
    if _FORBIDDEN.search(text) or (scheme not in WEB and "::" in text):
        raise _refused(text, "it has spaces, control characters, backslashes or '::'; percent-encode them")
    if len(text) > URL_LENGTH_MAX:
        raise _refused(text, f"it is longer than {URL_LENGTH_MAX} characters")
    try:
        parts = urlsplit(text.encode().decode())
    except ValueError as error:  # also what is no UTF-8
        raise _refused(text, "it is not a URL") from error
    if "@" in parts.netloc:
        raise _refused(text, "a URL with a user name is not accepted; put credentials where the store's own tools look")
    path = parts.path.strip("/")
    _check_path(text, path, encoded_slashes=scheme == "hf")
    if scheme in WEB:
        return Origin(scheme, _web_host(text), path, parts.query)
    if not parts.netloc:
        raise _refused(text, "it names no bucket or repository")
    return Origin(scheme, parts.netloc, path)


def parse_prefix(text: str) -> Origin:
    """Parse an entry of the allow list: an origin, or `https://` alone, which covers every host."""
    scheme, _, rest = text.partition("://")
    return Origin(scheme, "", "") if scheme in WEB + BUCKETS and not rest else parse_origin(text)


def without_secrets(text: str) -> str:
    """Return a text with the query and the user name removed from each URL in it."""
    return _SECRETS.sub(r"\1\2", text)


def _check_path(text: str, path: str, encoded_slashes: bool) -> None:
    decoded = unquote(path)
    if not encoded_slashes and ("\\" in decoded or decoded.count("/") != path.count("/")):
        raise _refused(text, "its path has encoded slashes")
    if path and any(segment in ("", ".", "..") for segment in decoded.split("/")):
        raise _refused(text, "its path has empty, '.' or '..' segments")


def _web_host(text: str) -> str:
    """Return host:port as the request will name it: in lower case, without a default port."""
    parts = urlsplit(text)
    try:
        host, port = parts.hostname or "", parts.port
        if ":" in host:
            host = f"[{ipaddress.IPv6Address(host)}]"
        elif not _HOST.match(host):
            raise ValueError("write international names in their ASCII form, xn--…")
    except ValueError as error:
        raise _refused(text, f"it names no host to connect to ({error})") from error
    return host if port in (None, _PORTS[parts.scheme]) else f"{host}:{port}"


def _refused(text: str, why: str) -> Invalid:
    return Invalid(Reason.ORIGIN_NOT_ALLOWED, f"origin {shown(without_secrets(text), SHOWN_LENGTH_MAX)}: {why}")
