"""Why a request ended, in words: for its client, and for the log and operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from enum import Enum
from functools import cache
from typing import Any, get_args, get_type_hints

import msgspec

from sidecar.core import causes
from sidecar.core.causes import Cause
from sidecar.core.effects import Settle
from sidecar.core.facts import Suspicion
from sidecar.core.misfits import Drained, Draining
from sidecar.errors import Reason, Refused
from sidecar.model.quote import EngineId, Quote
from sidecar.telling.durations import readable
from sidecar.telling.misfits import label, reason, sentence

ADD_BACKEND = 'name one under "backends" or with --backend triton://HOST:PORT, or add it with "sidecar backends add"'
NEVER_REPEATED = "an answer that has begun is never repeated, so send the request again if you want a new one"
AN_ENGINE, ASK = "an engine", "ask your operator"


class Voice(Enum):
    """Whom the words are for."""

    OPERATOR = "operator"
    CLIENT = "client"
    """A client is told no commands and no configuration keys, which only operators have."""
    STRANGER = "stranger"
    """A client who may not know which engines there are (`hide_backend`), nor what they say when they fail."""

    @classmethod
    def of_clients(cls, hide_backend: bool) -> Voice:
        return cls.STRANGER if hide_backend else cls.CLIENT


def message_of(settle: Settle, voice: Voice = Voice.OPERATOR) -> str:
    """Return why a request was not answered in full; "" of one that was."""
    return "" if settle.cause is None else told(settle.cause, settle.name or "base model", voice)


def told(cause: Cause, name: str = "", voice: Voice = Voice.OPERATOR) -> str:
    """Return a cause in words; `name` is the adapter's."""
    if voice is Voice.STRANGER:
        cause = _masked(Cause, cause)
    phrase = _PHRASES[type(cause)]
    if isinstance(phrase, tuple):
        phrase = "".join(phrase) if voice is Voice.OPERATOR else phrase[0]
    elif not isinstance(phrase, str):
        phrase = phrase(cause, voice)
    fields = msgspec.structs.asdict(cause)
    if not fields.get("text", " "):
        phrase = phrase.replace(": {text}", "")
    return phrase.format(name=name, **{field: _shown(field, value) for field, value in fields.items()})


def _masked(hint: Any, value: Any) -> Any:
    """Return a value without engines' ids and quotes, by the types of its fields."""
    if hint == EngineId:
        return AN_ENGINE
    if hint == Quote:
        return ""
    if isinstance(value, _QUOTED):
        return value
    if isinstance(value, tuple):
        hints = get_args(hint)
        if hints[0] == EngineId and Ellipsis in hints:
            return (AN_ENGINE,) if value else ()
        of = [hints[0]] * len(value) if Ellipsis in hints else hints
        return tuple(map(_masked, of, value))
    if isinstance(value, msgspec.Struct | Suspicion):
        kind: Any = type(value)
        return kind(*(_masked(of, getattr(value, name)) for name, of in _hints(kind).items()))
    return value


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def unknown(cause: causes.UnknownAdapter) -> Refused:
    """Return the error for whoever names an unknown adapter where no request is admitted."""
    return Refused(Reason.UNKNOWN_ADAPTER, told(cause), adapter=cause.asked[:80])


def quarantined(suspicion: Suspicion | None) -> str:
    """Return why a version is quarantined; "" if it is not."""
    if suspicion is None:
        return ""
    lost, text = " and ".join(suspicion.lost), suspicion.text
    if suspicion.has_ended:
        return f"it has ended {lost}" + (f" ({text})" if text else "")
    return f"its first loads coincided with the loss of {lost}" + (f" (last: {text})" if text else "")


class _Duration(int):
    """Nanoseconds that a phrase formats: `{x}` as people write it, `{x:.1f}` as seconds."""

    def __format__(self, spec: str) -> str:
        return format(self / 1e9, spec) if spec else readable(self)


def _shown(field: str, value: Any) -> Any:
    """Return a field as phrases show it."""
    if field.endswith("_ns"):
        return _Duration(value)
    return ", ".join(map(str, value)) if isinstance(value, tuple) else value


def _unknown_adapter(cause: causes.UnknownAdapter, voice: Voice) -> str:
    unknown_name = 'unknown adapter "{asked:.77}..."' if len(cause.asked) > 80 else 'unknown adapter "{asked}"'
    if cause.near:
        return f"{unknown_name}; did you mean {_literal(' or '.join(cause.near))}?"
    if cause.none and cause.tenant is None:
        return f'{unknown_name}: none is registered; operators do so with "sidecar adapters register"'
    if cause.none:
        whose = ' for tenant "{tenant}"' if cause.tenant else ""
        return f"{unknown_name}: none is registered{whose}; ask your operator for one"
    if cause.tenant is None:
        return f'{unknown_name}; "sidecar adapters list" shows those that are registered, and for whom'
    return f"{unknown_name}; GET /v1/models of the http listener lists those that you may use"


def _unknown_version(cause: causes.UnknownVersion, voice: Voice) -> str:
    has = ", ".join(f"v{ordinal} ({digest[:12]})" for ordinal, digest in cause.known) or "none that you may use"
    return 'adapter "{adapter}" has no version "{asked}"; it has ' + _literal(has)


def _not_allowed(cause: causes.NotAllowed, voice: Voice) -> str:
    decides = "its allow list, or the policy, decides" if cause.by_policy else "its allow list decides"
    return 'tenant "{tenant}" may not use adapter "{adapter}"; ' + decides


def _quarantined(cause: causes.Quarantined, voice: Voice) -> str:
    way_out = "name another model of /v1/models, or ask your operator to release it"
    if voice is Voice.OPERATOR:
        way_out = 'find out why the engine dies of it, then lift it with "sidecar adapters release {name}"'
    return "{name} is quarantined: " + _literal(quarantined(cause.suspicion)) + "; " + way_out


def _queue_full(cause: causes.QueueFull, voice: Voice) -> str:
    whose, prefix = ("", "") if cause.tenant is None else (' of tenant "{tenant}"', "tenant_")
    key = f"queue.{prefix}queued_{'' if cause.what == 'requests' else f'{cause.what}_'}max"
    way_out = f", or raise {key}" if voice is Voice.OPERATOR else ""
    return f"the queue is full: {{held}} {{what}}{whose} wait (limit {{limit}}); try again later{way_out}"


def _no_backend(cause: causes.NoBackend, voice: Voice) -> str:
    """Count the reasons: "0 of 7 backends can serve it: 5 max rank 32 < 64, 2 other base. b0: its rank is 64 …"."""
    is_client = voice is not Voice.OPERATOR
    if cause.unfit and voice is Voice.STRANGER:
        lasting = [each for _, each in cause.unfit if not isinstance(each, Draining | Drained)]
        if not lasting:
            return "{name}: all engines that could serve it are drained; " + f"try again later, or {ASK}"
        return "{name}: no engine can serve it: " + _literal(f"{'; '.join(dict.fromkeys(map(reason, lasting)))}; {ASK}")
    if cause.unfit:
        counts = Counter(label(unfit) for _, unfit in cause.unfit)
        reasons = ", ".join(f"{count} {short}" for short, count in counts.items())
        backend, first = cause.unfit[0]
        return "{name}: 0 of {backends} backends can serve it: " + _literal(f"{reasons}. {backend}: {sentence(first)}.")
    if cause.backends:
        way_out = f"{ASK} which take it" if is_client else '"sidecar backends list" shows them'
        return "{name}: no backend that the request may go to is configured; " + way_out
    if cause.pools:
        found_yet = "that could serve it has been found yet; try again later"
        return f"{{name}}: no engine {found_yet}" + ("" if is_client else ", or see what is discovered for {pools}")
    return "{name}: no engine is configured at the moment; " + (
        f"try again later, or {ASK}" if is_client else ADD_BACKEND
    )


def _deadline_passed(cause: causes.DeadlinePassed, voice: Voice) -> str:
    waited = "" if cause.answering else "the request waited {waited_ns} and "
    while_answering = " while it was being answered" if cause.answering else ""
    return (
        f"{{name}}: {waited}its own deadline of {{deadline_ns}} passed{while_answering}; send it with a longer one, or "
        "with none"
    )


def _lost(cause: causes.Lost, voice: Voice) -> str:
    lost = _literal(" and then ".join(cause.backends))
    visits = "a request visits at most {visits_max} backends, so send it again"
    return f"{{name}}: lost {lost} before the first token: {{text}}; {visits}"


def _cancelled(cause: causes.CancelledByOperator, voice: Voice) -> str:
    way_out = "" if voice is Voice.OPERATOR else f"; {ASK} before you send it again"
    return f"an operator cancelled the request{way_out}"


def _stopped(cause: causes.Stopped, voice: Voice) -> str:
    if cause.answering:
        return f"the sidecar is shutting down and has cut the answer off; {NEVER_REPEATED}"
    return "the sidecar is shutting down and has cut the request off; send it again"


def _not_loaded(cause: causes.NotLoaded, voice: Voice) -> str:
    """Leave a client with the engine's own text, which load calls answer with."""
    way_out = {Voice.OPERATOR: "; see the engine's log", Voice.CLIENT: "", Voice.STRANGER: f"; {ASK}"}[voice]
    return "{name}: {backend} refused to load it: {text}" + way_out


def _owner_changed(cause: causes.OwnerChanged, voice: Voice) -> str:
    return f"another replica has taken {{backend}} over ({_GIVEN_UP.get(cause.why, cause.why)}); send the request again"


def _unowned(cause: causes.Unowned, voice: Voice) -> str:
    last = _literal(told(cause.last, _NAME, voice)).replace(_NAME, "{name}")
    return f"{{backend}}: {last}; send the request again"


def _sidecar_failed(cause: causes.SidecarFailed, voice: Voice) -> str:
    return (
        f"the sidecar failed on this request{_id(cause.client_id)}, with {{error}}, and ends; do not send it again as "
        "it is: it may end the next one too. The sidecar's log and journal say more"
    )


def _crashed(cause: causes.Crashed, voice: Voice) -> str:
    if cause.answering:
        return f"the sidecar failed in the middle of the answer, on something else; {NEVER_REPEATED}"
    return "the sidecar failed before anything of the answer had come; send the request again"


def _poisonous(cause: causes.Poisonous, voice: Voice) -> str:
    return (
        f"this request{_id(cause.client_id)} was at each of the replicas {{replicas}} when it crashed, and may be the "
        "cause; no other replica gets it. Their logs give the cause"
    )


def _id(client_id: str) -> str:
    return f" ({_literal(client_id)})" if client_id else ""


_NAME = "\0"
"""Stands for the adapter's name in the words of a cause that another one quotes; no name has it."""
_GIVEN_UP = {
    "lease ended": "the lease ended and could not be renewed",
    "taken": "another member holds the lease",
    "moved": "another member is preferred",
    "draining": "this member drains",
    "gone": "it is gone",
}
"""Why a replica gives a backend up, by the label of `ownership.enums.Why`."""


def _literal(text: str) -> str:
    """Return a text that stays as it is in a phrase."""
    return text.replace("{", "{{").replace("}", "}}")


_QUOTED = (causes.Said, causes.Rejected, causes.NotFetched, causes.Broken)
"""Causes whose quote is about the request or its adapter, and goes to every client."""

_PHRASES: dict[type[Cause], str | tuple[str, str] | Callable[[Any, Voice], str]] = {
    causes.Said: "{text}",
    causes.NoAdapterNamed: (
        "the request names no adapter and this sidecar serves adapters only (base_requests: refuse); "
        'name one with the request parameter "lora_name"'
    ),
    causes.UnknownAdapter: _unknown_adapter,
    causes.UnknownVersion: _unknown_version,
    causes.NotAllowed: _not_allowed,
    causes.ShuttingDown: "the sidecar is shutting down; send the request to another replica",
    causes.Quarantined: _quarantined,
    causes.UnknownClass: 'unknown class "{asked}"; the configuration has {known}',
    causes.DeadlineBefore: "the request's deadline had passed when it arrived; send it with a longer one",
    causes.QueueFull: _queue_full,
    causes.WaitTooLong: (
        'the expected wait on {backend} is {wait_ns:.0f} s and class "{klass}" allows {limit_ns:.0f} s; retry later',
        ", or raise queue.classes.{klass}.queue_wait_s_max",
    ),
    causes.DeadlineTooSoon: (
        "the first token is expected from {backend} in {first_token_ns:.1f} s and the deadline is in {left_ns:.1f} s; "
        "allow more time, or retry later"
    ),
    causes.PromptTooLong: "the prompt has {tokens} tokens and the engine takes at most {longest}; shorten it",
    causes.TooManySequences: (
        "the request makes the engine run {sequences} sequences at once and it has seats for {seats}; ask for fewer "
        "answers in one request",
        ", or raise engine.seats if the engine has more",
    ),
    causes.NoBackend: _no_backend,
    causes.Gone: "{only}: no such backend is known here any more; send the request again",
    causes.NotOwned: "{backends}: another replica owns it; send the request there",
    causes.OwnerChanged: _owner_changed,
    causes.Moved: "another replica has taken the request over",
    causes.LeaseEnded: "{backend}: this replica's lease had ended before the request was sent; send it again",
    causes.NoOwner: "no replica owns it at the moment",
    causes.NoMember: "replica {replica} is no member any more",
    causes.BackendDown: "{backend} is down",
    causes.ReplicaAway: "replica {replica} went away: {text}",
    causes.Unowned: _unowned,
    causes.ReplicaLost: (
        "{name}: the replica {replica} that answered for {backend} was lost in the middle: {text}; " + NEVER_REPEATED
    ),
    causes.BrokeOff: ("{name}: the answer of {backend} broke off on its way to the client: {text}; " + NEVER_REPEATED),
    causes.Broken: "the sidecar failed: {text}; its log says more",
    causes.SidecarFailed: _sidecar_failed,
    causes.Crashed: _crashed,
    causes.Poisonous: _poisonous,
    causes.DeadlinePassed: _deadline_passed,
    causes.NoneUp: (
        "{name}: the request waited {waited_ns} and every engine that could serve it was down or drained; send it "
        "again later"
    ),
    causes.WaitedTooLong: (
        '{name}: the request waited {waited_ns} and class "{klass}" waits at most {limit_ns}; send it again later',
        ", or raise queue.classes.{klass}.queue_wait_s_max",
    ),
    causes.ReachedTooLate: (
        "{name}: after {waited_ns:.1f} s in the queue {left_ns:.3f} s of its deadline are left, and {backend} needs "
        "{reading_ns:.3f} s to read its prompt of {tokens} tokens; allow more time"
    ),
    causes.NotFetched: "{name}: {text}",
    causes.NotLoaded: _not_loaded,
    causes.CancelledByClient: "the client cancelled the request or went away",
    causes.Revoked: "the credential of the request was revoked or has expired; get a new one",
    causes.CancelledByOperator: _cancelled,
    causes.ReadTooSlowly: (
        "the client read too slowly: the buffer was full for more than client_stall_s; read the stream as it arrives"
    ),
    causes.Stopped: _stopped,
    causes.Rejected: "{text}",
    causes.GivenUp: (
        "{name}: given up after {tries} tries, the last on {backend} ({fault}); retry later",
        ", and see whether the engine's adapter cache is too small for its load",
    ),
    causes.FailedTwice: (
        "{name}: {backend} failed twice before the first token: {text}; retry later",
        ", and see the engine's log",
    ),
    causes.Failed: f"{{name}}: {{backend}} failed after {{tokens}} tokens had been sent: {{text}}; {NEVER_REPEATED}",
    causes.Lost: _lost,
    causes.LostMidway: f"{{name}}: {{backend}} was lost after the first token: {{text}}; {NEVER_REPEATED}",
    causes.Unobserved: (
        "Envoy delivered the answer, but its access log never reported how it ended; check Envoy's log"
    ),
}
"""The words of each cause, with its fields in braces. The second of two parts is for operators only."""
