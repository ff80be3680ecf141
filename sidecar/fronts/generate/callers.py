"""Who asks for what by `Generate`: the words of its request, and those that came as metadata of the call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sidecar.config.identities import checked, clipped, session_of
from sidecar.errors import Reason, Refused
from sidecar.fronts.callers import earliest
from sidecar.fronts.kserve.parameters import PARAMETERS, own_metadata, seconds_until

FIELDS = {"lora_name": "adapter", "lora_tenant": "tenant", "lora_class": "class", "lora_session": "session"}
"""The fields that say the same as our parameters elsewhere."""


@dataclass(frozen=True)
class Said:
    """What a request and its call say together. `tenant` is what the client claims of itself."""

    adapter: str
    tenant: str
    klass: str
    session: str
    deadline_s: float | None


def said_by(request: Any, metadata: Mapping[str, str]) -> Said:
    """Read both. Of two deadlines the earlier counts; two words for anything else are a mistake.

    Raises Refused(INVALID_REQUEST) for those, and for what is not as it may be.
    """
    own = own_metadata(metadata)
    for name, field in FIELDS.items():
        text = checked(PARAMETERS[name], getattr(request, field), f'the field "{field}"')
        if text and own.setdefault(name, text) != text:
            raise Refused(
                Reason.INVALID_REQUEST,
                f'the request says {field} "{clipped(text)}" and the metadata {name.replace("_", "-")} '
                f'"{clipped(own[name])}"; say it once',
            )
    deadline_s = request.deadline_ms / 1000 if request.deadline_ms else None
    return Said(
        own.get("lora_name", ""),
        own.get("lora_tenant", ""),
        own.get("lora_class") or "default",
        session_of(own.get("lora_session", "")),
        earliest(deadline_s, seconds_until(own.get("lora_deadline_ms"))),
    )
