"""What principals may do and how much: the policy, the limits, the audit and the usage."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from sidecar.config.identities import ADAPTER, CLASS, TENANT, fitting, problem_of
from sidecar.config.section import Section

Role = Literal["operator", "publisher", "viewer"]
LIMIT_MAX = 10**15
"""The largest number of a limit. What is taken, in all and twice over, stays exact in Redis' numbers (2**53)."""


class Policies(Section):
    """What principals may do. One of three ready sets, or a file of Cedar policies.

    `open`: every principal uses every adapter that its allow list admits; a publisher changes names. `tenant_prefix`: a
    tenant uses the adapters under its own prefix, as `acme/` for tenant acme with `separator: /`, and those that an
    allow list shares with it; its publishers change those under its prefix. `roles`: as `open`, and only a viewer
    lists, shows and selects versions. Backends and access are for operators. `roles` gives roles to tenants and, as
    `group:NAME`, to groups.

    `cedar` names a file of policies that decide instead. It is read again when it changes; a faulty one changes
    nothing and is reported.
    """

    ready: Literal["open", "tenant_prefix", "roles"] = "open"
    separator: str = Field("/", pattern=r"^[/._-]$")
    roles: dict[str, tuple[Role, ...]] = {}
    cedar: str | None = None

    @field_validator("roles")
    @classmethod
    def _can_be_given(cls, roles: dict[str, tuple[Role, ...]]) -> dict[str, tuple[Role, ...]]:
        """Refuse names that no tenant and no group has: their roles would be given to nobody, and without a word."""
        for name in roles:
            head, colon, group = name.partition(":")
            if colon and head.strip().lower() in ("group", "groups") and (head != "group" or not group.strip()):
                raise ValueError(f'"{name}" stands for no group; write group:{group.strip() or "NAME"}')
            if problem := problem_of(TENANT, name.removeprefix("group:")):
                raise ValueError(f"a name {problem}")
            if not name:
                raise ValueError("a name is empty; name a tenant, or a group as group:NAME")
        return roles


class Limit(Section):
    """How much the requests that match `tenant`, `class_name` and `adapter` may take.

    "*" gives each tenant, class or adapter a budget of its own; None lets all share one. A limit with a name takes the
    place of one for each, of which it keeps the numbers that it does not set. Tokens count as `tokens` says.
    A request above `max_tokens` is refused; `default_max_tokens` is what a request without a length gets.
    """

    tenant: Annotated[str, fitting(TENANT)] | None = None
    class_name: Annotated[str, fitting(CLASS)] | None = None
    adapter: Annotated[str, fitting(ADAPTER)] | None = None
    tokens: Literal["both", "input", "output"] = "both"
    requests_per_minute: int | None = Field(None, ge=1, le=LIMIT_MAX)
    requests_per_hour: int | None = Field(None, ge=1, le=LIMIT_MAX)
    requests_per_day: int | None = Field(None, ge=1, le=LIMIT_MAX)
    tokens_per_minute: int | None = Field(None, ge=1, le=LIMIT_MAX)
    tokens_per_hour: int | None = Field(None, ge=1, le=LIMIT_MAX)
    tokens_per_day: int | None = Field(None, ge=1, le=LIMIT_MAX)
    concurrent: int | None = Field(None, ge=1, le=LIMIT_MAX)
    queued_tokens: int | None = Field(None, ge=1, le=LIMIT_MAX)
    max_tokens: int | None = Field(None, ge=1, le=LIMIT_MAX)
    default_max_tokens: int | None = Field(None, ge=1, le=LIMIT_MAX)

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if not self.model_fields_set - {"tenant", "class_name", "adapter", "tokens"}:
            raise ValueError("it limits nothing; set for instance tokens_per_minute")
        return self


class Audit(Section):
    """Where changes and denials are recorded, as JSON lines: in `file`, on stdout, or with neither in the data
    directory's audit/audit.jsonl; without a data directory in the log.

    The denials are in a file beside that of the changes, as audit.denials.jsonl, so that no flood of them pushes out a
    change. Each is rotated at `file_bytes_max` and kept `files_max` times. Repeated denials become one line per
    `aggregate_s`.
    """

    file: str | None = None
    stdout: bool = False
    file_bytes_max: int = Field(16 << 20, ge=4096)
    files_max: int = Field(10, ge=1)
    aggregate_s: float = Field(60.0, gt=0)


class Usage(Section):
    """What tenants have used, in the data directory: hours for `hours_days`, days for `days_days`."""

    enabled: bool = True
    hours_days: int = Field(90, ge=1)
    days_days: int = Field(400, ge=1)


class Access(Section):
    policies: Policies = Policies()
    limits: tuple[Limit, ...] = ()
    audit: Audit = Audit()
    usage: Usage = Usage()

    @field_validator("limits")
    @classmethod
    def _differ(cls, limits: tuple[Limit, ...]) -> tuple[Limit, ...]:
        seen: dict[tuple[str | None, ...], int] = {}
        for number, limit in enumerate(limits):
            first = seen.setdefault((limit.tenant, limit.class_name, limit.adapter, limit.tokens), number)
            if first != number:
                raise ValueError(
                    f"numbers {first + 1} and {number + 1} are for the same tenant, class, adapter and kind of tokens; "
                    "write them as one"
                )
        return limits
