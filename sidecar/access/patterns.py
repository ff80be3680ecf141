"""Take the tenant out of a name by a pattern, and check that a name can be one."""

from __future__ import annotations

import re
from functools import lru_cache

from sidecar.config.identities import TENANT, problem_of
from sidecar.config.identity import PLACE


def tenant_in(name: str, pattern: str | None) -> str:
    """Return the tenant in a name, which is the whole name without a pattern.

    Raises ValueError, to be completed by what the name is, if the pattern does not fit or if the tenant is malformed.
    """
    tenant = name
    if pattern is not None:
        found = _compiled(pattern).fullmatch(name)
        if found is None:
            raise ValueError("does not fit the pattern that gives its tenant")
        tenant = found[1]
    if not tenant:
        raise ValueError("is empty")
    if problem := problem_of(TENANT, tenant):
        raise ValueError(problem)
    return tenant


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> re.Pattern[str]:
    # Neither may hold a slash or a colon, and they never share a part: so there is one way to read a name.
    parts = re.split(r"(\{tenant\}|\*)", pattern)
    return re.compile("".join({PLACE: "([^/:]+)", "*": "[^/:]*"}.get(part) or re.escape(part) for part in parts))
