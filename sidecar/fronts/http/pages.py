"""Refuse what web pages have a browser send to a listener that believes whoever is on this machine.

A browser there sends what a page of anybody's tells it to. It says so by `Origin`, with each POST and wherever the page
would read the answer, and by `Sec-Fetch-Site`. A page that leads a name of its own to this machine, so that the browser
takes it for the page's own server (DNS rebinding), shows by that name in `Host`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from ipaddress import ip_address
from socket import gethostname

from starlette.types import Receive, Scope, Send

from sidecar.fronts.openai.answering import send_failure
from sidecar.fronts.openai.errors import closing, failure
from sidecar.fronts.openai.headers import request_id_of

Application = Callable[[Scope, Receive, Send], Awaitable[None]]
ORIGIN, SITE, HOST = b"origin", b"sec-fetch-site", b"host"
OWN = (".localhost", ".local", ".internal")
"""Ends of names that nobody can have led here: the public DNS has none of them."""


def without_pages(app: Application, origins: Sequence[str] = (), any_host: bool = False) -> Application:
    """Return an application that refuses requests by pages, but for those of `origins`; "*" means every page.

    `any_host` is for who is asked by the names of others: behind a proxy, or by TLS, which no page can lead here.
    """

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if why := why_by_page(scope["headers"], origins, any_host):
            await send_failure(send, closing(failure(403, why, "by_a_page")), request_id_of(scope["headers"]))
        else:
            await app(scope, receive, send)

    return app if "*" in origins else serve


def why_by_page(headers: Iterable[tuple[bytes, bytes]], origins: Sequence[str], any_host: bool) -> str:
    """Return why a request is refused as a page's, "" if it is not; `headers` have lower-case names."""
    told = {name: value.decode("latin-1")[:80] for name, value in headers if name in (ORIGIN, SITE, HOST)}
    origin, host = told.get(ORIGIN, ""), told.get(HOST, "")
    if origin and origin not in origins:
        return (
            f'a page of "{origin}" had a browser ask, and listeners.http.cors_origins does not name it; other programs '
            "send no Origin"
        )
    if not any_host and not _is_own(host):
        return f'"{host}" is no name of this machine, so a page may have led it here; ask 127.0.0.1 or localhost'
    if told.get(SITE) == "cross-site" and not origin:
        return "a page of another site had a browser ask; ask from a program, or name it in listeners.http.cors_origins"
    return ""


def _is_own(host: str) -> bool:
    """Return True for an address, and for a name that is not somebody's in the public DNS."""
    name = host.lower() if host.endswith("]") else host.rpartition(":")[0].lower() or host.lower()
    name = name.strip("[]").rstrip(".")
    try:
        return bool(ip_address(name))
    except ValueError:
        return "." not in name or name.endswith(OWN) or name == gethostname().lower()
