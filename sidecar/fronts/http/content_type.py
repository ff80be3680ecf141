"""Accept bodies of `application/json` only.

A web page can make a browser post text, a form or untyped bytes to any address the browser reaches, without asking the
server first. It cannot post JSON that way.
"""

from __future__ import annotations

from collections.abc import Iterable

TYPE = "application/json"


def why_not_json(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return why a request's body is refused, "" if it is not; `headers` have lower-case names."""
    given = [value.decode("latin-1") for name, value in headers if name == b"content-type"]
    if len(given) != 1:
        return f"the request has {len(given) or 'no'} content-type headers; send content-type: {TYPE}"
    kind, *parameters = (part.strip() for part in given[0].split(";"))
    if kind.lower() != TYPE:
        return f'a body of content-type "{kind[:80]}" is not taken; send content-type: {TYPE}'
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset" and value.strip().strip('"').lower() not in ("utf-8", "utf8"):
            return f'a body in the charset "{value.strip()[:80]}" is not taken; JSON is UTF-8'
    return ""
