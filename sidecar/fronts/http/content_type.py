"""Bodies come as `application/json`. A web page can have a browser post text, a form or bytes without a type to any
address that the browser reaches, without asking there; JSON it cannot.
"""

from __future__ import annotations

from collections.abc import Iterable

TYPE = "application/json"


def why_not_json(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Say why a request's body is not taken, from its headers with lower-case names; "" where it is."""
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
