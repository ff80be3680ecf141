"""The one place that fronts and the gateway ask: who calls, and may this request be made.

Three modes share one path. With `off` a client is believed, as `tenant_from` says. With `enforce` a call needs a proven
principal, and a request needs the policy's consent. With `observe` clients notice nothing: the same questions are
asked, and who would be denied is counted and logged.

What a principal may not use looks like what does not exist. Both are refused here, before the core hears of the
request, with one text, and nothing else is asked for either.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from time import time
from typing import Any, NoReturn

from sidecar.access.audit import Audit
from sidecar.access.budgets.budgets import Budgets, Reservation, Standing
from sidecar.access.budgets.charges import Demand
from sidecar.access.deciding import CachedPolicy
from sidecar.access.external import ExternalCheck, why_denied
from sidecar.access.keys import KeyBook
from sidecar.access.policy import Open, Roles
from sidecar.access.principal import (
    INFERENCE,
    SYSTEM,
    Action,
    Decision,
    Presented,
    Principal,
    Proof,
    Purpose,
    Resource,
    Sort,
)
from sidecar.access.proving import Proving
from sidecar.access.resources import Resources, adapter_resource, version_resource
from sidecar.access.salts import Salts
from sidecar.access.tokens import Tokens
from sidecar.adapters.names import shown
from sidecar.adapters.origins.allowing import AllowList
from sidecar.config.identities import OWN_TENANTS, clipped
from sidecar.config.identity import Identity
from sidecar.config.openai import LOADS
from sidecar.errors import Family, Reason, Refused, SidecarError, error_for
from sidecar.model.reference import Reference
from sidecar.state.records import Record

CLASS_DEFAULT = "default"
RESERVED_CLASSES = (LOADS,)
"""Classes of the sidecar's own requests: a client may not take their place in the queue."""
OPERATORS = Principal(proof=Proof.LOCAL, roles=("operator",))
UNAUTHENTICATED, NOT_PERMITTED, LIMIT = "unauthenticated", "not_permitted", "limit"
DENIALS = tuple((cause, seen) for cause in (UNAUTHENTICATED, NOT_PERMITTED, LIMIT) for seen in ("false", "true"))
"""The causes of denials, each refused ("false") or only observed ("true")."""
OF_FILES = frozenset(
    (Reason.ADAPTER_UNAVAILABLE, Reason.QUARANTINED, *(each for each in Reason if each.row.family is Family.INVALID))
)
"""The reasons whose messages tell of an adapter's files, and so where they are."""
REFERENCE_MAX = 256

NOBODY = Principal()


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a call.

    `principal` is whose its requests are. With `is_believed` the tenant is the one that each request claims. In observe
    mode `proven` is who it was proven to be, None if it was not, and `doubt` why not. With `is_recorded` the call has
    been judged already, and its denial, if it is one, is recorded: a call counts once.
    """

    principal: Principal = NOBODY
    peer: str = ""
    is_believed: bool = False
    proven: Principal | None = None
    doubt: str = ""
    is_recorded: bool = False


OURSELVES = Caller(OPERATORS)
"""The sidecar itself: its requests need no consent."""


@dataclass(frozen=True, slots=True)
class Permit:
    """What the policy says of one reference. `versions` are the ordinals that may answer; None for any."""

    versions: tuple[int, ...] | None = None


ANY_VERSION = Permit()


class Charge:
    """What a request has reserved of its budgets, as its ticket settles it."""

    def __init__(self, reservation: Reservation, input_tokens: int | None) -> None:
        self._reservation = reservation
        self._input_tokens = input_tokens

    def dispatched(self) -> None:
        self._reservation.dispatched()

    def settle(self, output_tokens: int, ran: bool, prompt_tokens: int | None) -> None:
        input_tokens = self._input_tokens if prompt_tokens is None else prompt_tokens
        self._reservation.settle(input_tokens, output_tokens if ran else 0, ran)


class Access:
    """Decides for one process. `record_of` returns a name's record; what is None is not configured."""

    def __init__(
        self,
        identity: Identity,
        tenant_from: str,
        record_of: Callable[[str], Record | None],
        policy: CachedPolicy,
        audit: Audit | None,
        *,
        by_version: bool = False,
        keys: KeyBook | None = None,
        tokens: Tokens | None = None,
        budgets: Budgets | None = None,
        external: ExternalCheck | None = None,
        salts: Salts | None = None,
        change_of: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time,
    ) -> None:
        self._change_of = change_of
        self.denials = dict.fromkeys(DENIALS, 0)
        """How many calls were denied."""
        self._resources = Resources()
        self._listed: tuple[int, Sequence[Resource]] = (-1, ())
        """All names as resources at a change of the registry."""
        self.mode = identity.mode
        self.ends_revoked = identity.on_revoked == "end"
        self._proving = Proving(identity, keys, tokens, clock, external)
        self._asked_besides = None if external is None or external.proves else external
        self._tenant_from = tenant_from
        self._record_of = record_of
        self._policy = policy
        self._audit = audit
        self._by_version = by_version
        self.budgets = budgets
        self.salts = salts

    @classmethod
    def off(cls, record_of: Callable[[str], Record | None], tenant_from: str = "metadata") -> Access:
        """Return one that believes every client."""
        return cls(Identity(), tenant_from, record_of, CachedPolicy(Open(Roles({}), "/")), None)

    # Who calls.

    async def identify(self, presented: Presented, purpose: Purpose = INFERENCE) -> Caller:
        """Return the sender of a call. Raises, in enforce mode, Misused(UNAUTHENTICATED) or what `ExternalCheck` does.

        In observe mode it records who would be denied. Inference is left to `permit`, which is asked for each request
        of a stream; what the external check says is recorded once for the call, which does not wait for it.
        """
        if self.mode == "off":
            return self._believed(presented)
        try:
            proven = await self._proving.prove(presented, purpose)
        except SidecarError as error:
            why = why_denied(error)
            if self.mode == "observe":
                believed = self._believed(presented)
                caller = Caller(believed.principal, presented.peer, believed.is_believed, None, why)
                if purpose.action is not Action.INFER:
                    self._denied_call(caller, purpose, why)
                return caller
            self._denied_call(Caller(peer=presented.peer), purpose, why)
            raise
        external = self._asked_besides
        if self.mode == "observe":
            believed = self._believed(presented)
            caller = Caller(believed.principal, presented.peer, believed.is_believed, proven)
            if external is not None:
                tell = partial(self._would_deny, caller, purpose)
                external.check_beside(presented, purpose, proven, tell)
            return caller
        caller = Caller(proven, presented.peer, proven=proven)
        if external is not None:
            try:
                await external.check(presented, purpose, proven)
            except SidecarError as error:
                self._denied_call(caller, purpose, why_denied(error))
                raise
        return caller

    def _would_deny(self, caller: Caller, purpose: Purpose, error: SidecarError) -> None:
        self._denied_call(caller, purpose, why_denied(error))

    def _denied_call(self, caller: Caller, purpose: Purpose, why: str) -> None:
        self.denied(caller, purpose.action, SYSTEM, why, purpose.request_id, purpose.verb)

    def _believed(self, presented: Presented) -> Caller:
        if self._tenant_from == "metadata":
            return Caller(Principal(proof=Proof.CLAIMED), presented.peer, is_believed=True)
        if self._tenant_from == "certificate" and presented.certificate:
            name = presented.certificate[0]
            return Caller(Principal(name, Proof.CERTIFICATE, name), presented.peer)
        return Caller(peer=presented.peer)

    def check(self, caller: Caller) -> None:
        """Raise Misused(UNAUTHENTICATED) if the caller's credential has ended since it was identified."""
        if caller.proven is not None and self.mode == "enforce":
            self._proving.check(caller.proven)

    def ended(self) -> Callable[[Caller, bool], bool]:
        """Return a function that says now, of a caller and whether its request runs, if the request is to end.

        It is to end if the caller's credential has ended; one that runs, only with `on_revoked: end`. A credential is
        looked at once for all of its requests.
        """
        has_ended: dict[int, bool] = {}  # by the principal's identity: requests keep it alive

        def is_over(caller: Caller, runs: bool) -> bool:
            if self.mode != "enforce" or (runs and not self.ends_revoked):
                return False
            known = has_ended.get(id(caller.proven))
            if known is None:
                known = has_ended[id(caller.proven)] = self._has_ended(caller)
            return known

        return is_over

    def _has_ended(self, caller: Caller) -> bool:
        try:
            self.check(caller)
        except SidecarError:
            return True
        return False

    def tenant_of(self, caller: Caller, claims: Sequence[str], request_id: str = "") -> str:
        """Return the tenant of a request that claims to be of some, its own words first.

        Raises Refused(INVALID_REQUEST) if a client that is believed claims two, and in enforce mode
        Refused(NOT_ALLOWED) for a claim of another tenant than the credential's.
        """
        if caller.is_believed:
            if len(claims) > 1:
                raise Refused(
                    Reason.INVALID_REQUEST,
                    f'the request says tenant "{clipped(claims[0])}" and the metadata lora-tenant '
                    f'"{clipped(claims[1])}"; say it once',
                )
            claimed = claims[0] if claims else ""
            _check_reserved(claimed)
            if claims and caller.proven is not None and claimed != caller.proven.tenant:
                why = f'the request says tenant "{clipped(claimed)}", its credential "{caller.proven.tenant}"'
                self.denied(caller, Action.INFER, SYSTEM, why, request_id)
            return claimed
        tenant = caller.principal.tenant
        _check_reserved(tenant)
        others = [claim for claim in claims if claim != tenant] if self.mode == "enforce" else []
        if others:
            why = (
                f'the request says tenant "{clipped(others[0])}" and its credential is of tenant "{tenant}"; leave the '
                "tenant out of the request"
            )
            self.denied(caller, Action.INFER, SYSTEM, why, request_id)
            raise Refused(Reason.NOT_ALLOWED, why)
        return tenant

    def class_of(self, caller: Caller, asked: str) -> str:
        """Return the class of a request. Raises Refused if the client may not choose it."""
        if caller is OURSELVES:
            return asked
        if asked in RESERVED_CLASSES:
            raise Refused(Reason.INVALID_REQUEST, f'class "{asked}" is the sidecar\'s own; name another, or none')
        own = caller.principal.klass
        if not own or self.mode != "enforce" or asked == own:
            return asked
        if asked != CLASS_DEFAULT:
            raise Refused(
                Reason.NOT_ALLOWED,
                f'the request says class "{clipped(asked)}" and its credential is of class "{own}"; leave the class '
                "out of the request",
            )
        return own

    # What it may do.

    def permit(
        self, caller: Caller, reference: str, request_id: str, is_base: bool = False, tenant: str = ""
    ) -> Permit:
        """Return what may answer a request for `reference`, a name with or without a version, or a base model.

        `tenant` is what `tenant_of` has returned; in observe mode it has recorded a false claim.
        Raises Misused(UNAUTHENTICATED) if the credential has ended, and in enforce mode Refused(UNKNOWN_ADAPTER) for
        a name that is not there or not permitted.
        """
        if self.mode == "off" or caller is OURSELVES:
            return ANY_VERSION
        if self.mode == "observe":
            claims_another = (
                caller.is_believed and caller.proven is not None and tenant not in ("", caller.proven.tenant)
            )
            if not claims_another:
                self._observe(caller, reference, request_id, is_base)
            return ANY_VERSION
        self.check(caller)
        permit, why = self._judge(caller.principal, reference, is_base)
        if permit is None:
            self.refuse(caller, Action.INFER, reference, why, request_id)
        self._record_version(caller, caller.principal, reference, permit, request_id)
        return permit

    def _observe(self, caller: Caller, reference: str, request_id: str, is_base: bool) -> None:
        if caller.proven is None:
            self.denied(caller, Action.INFER, _named(reference), caller.doubt, request_id)
            return
        permit, why = self._judge(caller.proven, reference, is_base)
        if permit is not None:
            self._record_version(caller, caller.proven, reference, permit, request_id)
        elif why:  # a name that does not exist is refused in each mode
            self.denied(caller, Action.INFER, _named(reference), why, request_id)

    def _record_version(
        self, caller: Caller, principal: Principal, reference: str, permit: Permit, request_id: str
    ) -> None:
        """Record the denial of a version that a request selects. The core refuses it, as one that does not exist."""
        name, selector = Reference.of(reference)
        if not selector or permit.versions is None:
            return
        record = self._record_of(name)
        version = None if record is None else record.selected(selector)
        if record is None or version is None or version.ordinal in permit.versions:
            return
        action = Action.INFER if version.ordinal == record.current else Action.INFER_VERSION
        resource = version_resource(record, version.ordinal)
        self.denied(caller, action, resource, self._policy.decide(principal, action, resource).by, request_id)

    def _judge(self, principal: Principal, reference: str, is_base: bool) -> tuple[Permit | None, str]:
        """Return a permit, or None and why not; "" for a name that does not exist."""
        name, selector = Reference.of(reference)
        record = self._record_of(name)
        if record is None:
            if not is_base:
                return None, ""
            decision = self._policy.decide(principal, Action.INFER, Resource(Sort.BASE, reference))
            return (ANY_VERSION if decision.allowed else None), decision.by
        decision = self._policy.decide(principal, Action.INFER, adapter_resource(record))
        if not decision.allowed:
            return None, decision.by
        if not self._by_version:  # an operator need not be on the allow list
            every = None if record.is_for(principal.tenant) else tuple(each.ordinal for each in record.versions)
            return Permit(every), decision.by
        versions = tuple(self._versions(principal, record, bool(selector)))
        if not versions and not selector:
            return None, "neither the current version nor the canary may be used"
        return Permit(versions), decision.by

    def _versions(self, principal: Principal, record: Record, is_selected: bool) -> Sequence[int]:
        """Return the ordinals that may answer: of all if the request selects one, else the current and the canary."""
        canary = record.canary[0] if record.canary is not None else None
        ordinals = [each.ordinal for each in record.versions] if is_selected else [record.current, canary]
        return [
            ordinal
            for ordinal in ordinals
            if ordinal is not None and self._may_answer(principal, record, ordinal, is_selected)
        ]

    def _may_answer(self, principal: Principal, record: Record, ordinal: int, is_selected: bool) -> bool:
        is_current = ordinal == record.current
        action = Action.INFER_VERSION if is_selected and not is_current else Action.INFER
        return self._policy.decide(principal, action, version_resource(record, ordinal)).allowed

    def reserve(
        self,
        caller: Caller,
        tenant: str,
        klass: str,
        adapter: str,
        input_tokens: int,
        output_tokens_max: int | None,
        is_estimated: bool,
        sequences: int,
        request_id: str,
    ) -> Charge | None:
        """Take a permitted request from its tenant's budgets; return what is to be settled at its end.

        Raises Refused if too little remains, or if the request is larger than it may be.
        """
        if self.budgets is None or caller is OURSELVES:
            return None
        with self._recording_limits(caller, adapter, request_id):
            reservation = self.budgets.reserve(
                tenant,
                klass,
                _limited(adapter),
                input_tokens,
                output_tokens_max,
                is_estimated=is_estimated,
                sequences=sequences,
            )
        return Charge(reservation, None if is_estimated else input_tokens)

    def check_together(
        self, caller: Caller, tenant: str, klass: str, adapter: str, asked: Demand, requests: int, request_id: str
    ) -> None:
        """Raise Refused(INVALID_REQUEST) for requests of one list that limits never let in; `asked` is their sum."""
        if self.budgets is not None and caller is not OURSELVES:
            with self._recording_limits(caller, adapter, request_id):
                self.budgets.check((tenant, klass, _limited(adapter)), asked, requests)

    @contextmanager
    def _recording_limits(self, caller: Caller, adapter: str, request_id: str) -> Iterator[None]:
        """Record a refusal by a limit."""
        try:
            yield
        except Refused as refused:
            self.denied(caller, Action.INFER, _named(adapter), refused.message, request_id, by_limit=True)
            raise

    def standing(self, tenant: str, klass: str, adapter: str) -> Standing:
        """Return what remains of the budgets for requests like this one."""
        return Standing() if self.budgets is None else self.budgets.standing(tenant, klass, _limited(adapter))

    def default_max_tokens(self, tenant: str, klass: str, adapter: str) -> int | None:
        """Return the length of a request that names none; None if no limit says."""
        if self.budgets is None:
            return None
        return self.budgets.default_max_tokens(tenant, klass, _limited(adapter))

    def may(self, caller: Caller, action: Action, resource: Resource = SYSTEM) -> Decision:
        """Return whether a caller may do something other than infer. In observe mode everything is allowed."""
        if self.mode != "enforce" or caller is OURSELVES:
            return Decision(True, f"identity.mode is {self.mode}")
        return self._policy.decide(caller.principal, action, resource)

    def judged(self, caller: Caller) -> Principal | None:
        """Return whom the policy judges, to refuse it or only to record that; None if nobody is judged."""
        if caller is OURSELVES or self.mode == "off":
            return None
        if self.mode == "enforce":
            return caller.principal
        return None if caller.is_recorded else caller.proven

    def decide(self, principal: Principal, action: Action, resource: Resource = SYSTEM) -> Decision:
        """Return what the policy says of a principal that `judged` returned."""
        return self._policy.decide(principal, action, resource)

    def is_operator(self, caller: Caller) -> bool:
        """Return True if a caller may see all names; what it may do is another question."""
        return self.may(caller, Action.LIST).allowed

    async def visible(self, caller: Caller, tenant: str, records: Sequence[Record]) -> Collection[str]:
        """Return the names of those records that a list may show; without delaying others for long."""
        if self.mode == "enforce":
            change = self._change_of()
            if self._listed[0] != change:
                self._listed = change, self._resources.of(records)
            return await self._policy.visible(caller.principal, self._listed[1], change)
        return {record.name for record in records if self.may_see(caller, tenant, record)}

    def folders_of(self, caller: Caller, allow: AllowList, path: str, request_id: str) -> AllowList:
        """Return the folders of this machine from which a caller may register; `path` is the one that it names.

        Under `tenant_prefix` tenants publish from a folder of their own name in one of the roots: else each would have
        the weights of all others under a name of its own. Nobody but an operator is told why a path is refused.
        """
        principal = self.judged(caller)
        if principal is None or self.decide(principal, Action.LIST).allowed:
            return allow
        tenant, own, whose = principal.tenant, allow, "adapters.roots"
        if self._policy.source == "tenant_prefix":
            is_name = "/" not in tenant and tenant not in ("", ".", "..")
            own = allow.below(tenant) if is_name else AllowList()
            whose = f"{tenant}/ in one of adapters.roots"

        def refused(named: str, why: str) -> Refused:
            self.denied(caller, Action.REGISTER, SYSTEM, why, request_id)
            return Refused(
                Reason.NOT_ALLOWED,
                f'{shown(named, 200)} is no folder that tenant "{tenant}" may register; give one that is there, below '
                f"{whose}, or push the files",
            )

        confined = replace(allow, roots=own.roots, written=own.written, refused=refused)
        if self.mode == "enforce":
            return confined
        if own is not allow and path and "://" not in path:
            with suppress(Refused):
                confined.open("", path).close()
        return allow

    def may_change(self, caller: Caller, record: Record) -> bool:
        """Return True if a caller may change a name, and so see where its files are and whom it is for."""
        return self.may(caller, Action.REGISTER, adapter_resource(record)).allowed

    def may_see_base(self, caller: Caller, name: str) -> bool:
        """Return True if a list may show a base model."""
        return self.may(caller, Action.LIST, Resource(Sort.BASE, name)).allowed

    def may_see_version(self, caller: Caller, record: Record, ordinal: int) -> bool:
        """Return True if a list may show a version of a name that it shows."""
        return not self._by_version or self.may(caller, Action.LIST, version_resource(record, ordinal)).allowed

    def may_see(self, caller: Caller, tenant: str, record: Record) -> bool:
        """Return True if a list may show a name to a caller of that tenant."""
        if self.mode != "enforce":
            return record.is_for(tenant)
        return self._policy.decide(caller.principal, Action.LIST, adapter_resource(record)).allowed

    # The record of it.

    async def changed(
        self,
        caller: Caller,
        verb: str,
        action: Action,
        resource: Resource,
        before: Mapping[str, Any],
        after: Mapping[str, Any],
        request_id: str,
        why: str = "",
    ) -> None:
        """Record a change, or with `why` one that failed."""
        if self._audit is None:
            return
        await self._audit.changed(
            caller.principal, caller.peer, action, resource, before, after, request_id, verb=verb, why=why
        )

    def denied(
        self,
        caller: Caller,
        action: Action,
        resource: Resource,
        why: str,
        request_id: str,
        verb: str = "",
        by_limit: bool = False,
    ) -> None:
        """Record and count a denial; in observe mode one that was let pass, unless a limit made it."""
        principal, observed = caller.proven, self.mode == "observe" and not by_limit
        cause = LIMIT if by_limit else NOT_PERMITTED if principal is not None else UNAUTHENTICATED
        self.denials[cause, str(observed).lower()] += 1
        proof = Proof.NONE if principal is None else principal.proof
        if self._audit is not None:
            self._audit.denied(principal, caller.peer, proof, action, resource, why, request_id, observed, verb)

    def refuse(
        self, caller: Caller, action: Action, reference: str, why: str, request_id: str, verb: str = ""
    ) -> NoReturn:
        """Record a denial, and raise the one error for a name that is not there or not permitted."""
        self.denied(caller, action, _named(reference), why or "there is no such name", request_id, verb)
        raise unknown(reference, request_id)

    def for_client(
        self, caller: Caller | None, reason: Reason | None, name: str, request_id: str
    ) -> SidecarError | None:
        """Return the error that a client gets instead of the core's, if that would tell what is there, or where.

        `caller` is None of a request that another replica has passed on: that one asks again.
        """
        if self.mode != "enforce" or reason is None:
            return None
        record = self._record_of(Reference.of(name).name)
        if reason is Reason.NOT_ALLOWED or (reason is Reason.UNKNOWN_ADAPTER and record is None):
            return unknown(name, request_id)
        if reason not in OF_FILES or caller is None or (record is not None and self.may_change(caller, record)):
            return None
        return error_for(
            reason,
            f'adapter "{clipped(name)}" cannot be used now; ask its publisher or your operator, who finds the cause in '
            f'the log by id "{request_id}"',
            adapter=name,
        )


def unknown(reference: str, request_id: str) -> Refused:
    """Return the error for a name that does not exist or may not be used: nothing in it tells which."""
    return Refused(
        Reason.UNKNOWN_ADAPTER,
        f'adapter "{clipped(reference)}" is unknown or not permitted; GET /v1/models of the http listener lists those '
        f'that you may use; ask your operator with id "{request_id}"',
        adapter=reference[:80],
    )


def _check_reserved(tenant: str) -> None:
    if tenant in OWN_TENANTS:  # one that is called as usage calls what is no tenant is told apart there
        raise Refused(Reason.INVALID_REQUEST, f'tenant "{clipped(tenant)}" is the sidecar\'s own; name another')


def _limited(adapter: str) -> str:
    """Return what limits call the adapter of a request: a request without a name asks "base"."""
    return Reference.of(adapter).name or "base"


def _named(reference: str) -> Resource:
    return Resource(Sort.ADAPTER, reference[:REFERENCE_MAX])
