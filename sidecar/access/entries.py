"""What the access registry keeps: API keys, the limits that were set at run time, and a secret for salts. No I/O.

A key is stored as `key/<id>`, a limit as `limit/<tenant>/<class>/<adapter>`, with `/input`
or `/output` if it counts only those tokens, the secret as `salt`. An entry with a field that this release
does not know is unreadable: the field may restrict what a key is good for. The registry sets it aside and keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypeAlias
from urllib.parse import quote

from pydantic import AfterValidator, Field, ValidationError

from sidecar.config.access import Limit, Role
from sidecar.config.identities import CLASS, TENANT, Shape, fitting, is_reserved
from sidecar.config.section import Section, problems
from sidecar.state.codec import Codec, UnreadableRecord

KEY, LIMIT, SALT = "key/", "limit/", "salt"
WHY_LENGTH_MAX = 300
NOTE = Shape("the note", 512, 2048)
GROUP = Shape("the group", 256, 1024)


def _is_not_ours(tenant: str) -> str:
    if is_reserved(tenant):
        raise ValueError("it is the sidecar's own; name another")
    if tenant == "*":
        raise ValueError('"*" is no tenant: limits name each tenant by it; name one')
    return tenant


Tenant = Annotated[str, Field(min_length=1), fitting(TENANT), AfterValidator(_is_not_ours)]
Group = Annotated[str, Field(min_length=1), fitting(GROUP)]
Class = Annotated[str, fitting(CLASS)]
Note = Annotated[str, fitting(NOTE)]


class Key(Section):
    """An API key without its secret, of which only the SHA-256 is kept. Times are in Unix seconds."""

    id: str = Field(pattern=r"^(file-)?[0-9a-f]{12}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tenant: Tenant
    roles: tuple[Role, ...] = ()
    groups: tuple[Group, ...] = ()
    klass: Class = ""
    note: Note = ""
    created_by: str = ""
    created_at: float = 0.0
    expires_at: float | None = None
    revoked_at: float | None = None

    @property
    def name(self) -> str:
        return KEY + self.id

    def state(self, now: float) -> str:
        """Return "revoked", "expired" or "active"."""
        if self.revoked_at is not None:
            return "revoked"
        return "active" if self.expires_at is None or now < self.expires_at else "expired"


@dataclass(frozen=True)
class LimitEntry:
    """A limit that was set at run time; its tenant, class, adapter and kind of tokens identify it."""

    limit: Limit

    @property
    def name(self) -> str:
        kind = () if self.limit.tokens == "both" else (self.limit.tokens,)
        parts = (self.limit.tenant, self.limit.class_name, self.limit.adapter, *kind)
        return LIMIT + "/".join(quote(part or "", safe="*") for part in parts)


class Salt(Section):
    """The secret that the salts of prefix caches are made of, in hexadecimal."""

    secret: str = Field(pattern=r"^[0-9a-f]{64}$")

    @property
    def name(self) -> str:
        return SALT


AccessEntry: TypeAlias = Key | LimitEntry | Salt


def to_json(entry: AccessEntry) -> str:
    written: Section = entry.limit if isinstance(entry, LimitEntry) else entry
    return written.model_dump_json(exclude_defaults=True)


def from_json(name: str, text: str) -> AccessEntry:
    """Return a stored entry. Raises UnreadableRecord with the fault."""
    model = Key if name.startswith(KEY) else Salt if name == SALT else Limit
    try:
        if model is Limit and not name.startswith(LIMIT):
            raise ValueError("it is of a kind that this release does not know")
        found = model.model_validate_json(text, strict=True)
        entry = LimitEntry(found) if isinstance(found, Limit) else found
        if entry.name != name:
            raise ValueError(f"it says that it is {entry.name}")
    except ValidationError as error:
        raise UnreadableRecord("; ".join(problems(error, model))[:WHY_LENGTH_MAX]) from error
    except ValueError as error:
        raise UnreadableRecord(str(error)[:WHY_LENGTH_MAX]) from error
    assert isinstance(entry, Key | LimitEntry | Salt)
    return entry


def _name_of(entry: AccessEntry) -> str:
    return entry.name


CODEC: Codec[AccessEntry] = Codec(_name_of, to_json, from_json, "entries", "access-", "a key or a limit")
