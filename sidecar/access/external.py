"""Ask a server of external authorization about a call, by gRPC as Envoy's `ext_authz` does.

Every doubt ends in a denial: a call goes on if the server says OK, and not if it denies, fails, hangs, is away, or
answers what means nothing. No answer is kept: it may depend on the path, on the time and on what was revoked a moment
ago, and nothing in the protocol says for how long it holds.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from time import monotonic, perf_counter_ns, time
from typing import Any, Literal

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from sidecar.access.principal import Presented, Principal, Proof, Purpose
from sidecar.backends.credentials import channel_credentials
from sidecar.config.identities import TENANT, clipped, problem_of
from sidecar.config.identity import External
from sidecar.errors import Misused, Reason, Refused, SidecarError, error_for
from sidecar.proto import envoy_pb2 as envoy
from sidecar.tasks import Tasks

logger = logging.getLogger(__name__)

Result = Literal["ok", "denied", "failed"]
RESULTS: tuple[Result, ...] = ("ok", "denied", "failed")
CHECK = "/envoy.service.auth.v3.Authorization/Check"
FORWARDED, TENANT_KEY = "x-forwarded-client-cert", "x-lora-tenant"
ANSWER_BYTES_MAX = 256 << 10
TOLD_CHARACTERS_MAX = 500
"""How much of the body of a denial a client is told."""
RETRY_S = 1.0
RETRY_S_MAX = 86_400.0
WARN_AGAIN_S = 30.0
STATUSES = range(400, 600)
"""The HTTP statuses that a denial may have; another one becomes 403."""
OPTIONS = (
    ("grpc.max_receive_message_length", ANSWER_BYTES_MAX),
    # A server that vanished without a word is noticed by what it leaves unacknowledged.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),  # credentials go to the server that is named, and by no detour
)


class _Unclear(Exception):
    """There is no answer, or none that means anything. `cause` is for the log alone."""

    def __init__(self, why: str, cause: str = "") -> None:
        super().__init__(why)
        self.cause = cause


class ExternalCheck:
    """The client of one server. Calls share its channel.

    `believes_forwarded` says that a mesh's proxy writes `x-forwarded-client-cert`; else any client could have, and the
    server is not sent it. `on_checked` is told each result, with the nanoseconds that it took.
    """

    def __init__(self, settings: External, believes_forwarded: bool = False) -> None:
        self._settings = settings
        self._sent = frozenset(settings.headers) - (frozenset() if believes_forwarded else {FORWARDED})
        self._channel: grpc.aio.Channel | None = None
        self._check: Any = None
        self._in_flight = 0
        self._beside = Tasks()
        self._warned_at = float("-inf")
        self._has_warned = False
        self.on_checked: Callable[[Result, int], None] = lambda result, took_ns: None

    @property
    def proves(self) -> bool:
        """True if its answers say whose calls are."""
        return self._settings.proves

    def start(self) -> None:
        """Open the channel; it connects with the first check. Raises Misused for a TLS file that cannot be read."""
        address, tls = self._settings.address, self._settings.tls
        if tls is None:
            self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        else:
            credentials = channel_credentials(tls.model_dump(exclude_none=True))
            self._channel = grpc.aio.secure_channel(address, credentials, options=OPTIONS)
        self._check = self._channel.unary_unary(CHECK, None, None)

    async def stop(self) -> None:
        await self._beside.stop()
        if self._channel is not None:
            await self._channel.close(None)

    async def check(self, presented: Presented, purpose: Purpose, proven: Principal | None = None) -> None:
        """Return if the server lets a call pass, which is `proven` to be somebody's.

        Raises Misused(UNAUTHENTICATED) or Refused(NOT_ALLOWED) as the server says, Refused(STATE_UNAVAILABLE) without a
        clear answer in time, and Refused(QUEUE_FULL) with too many checks under way.
        """
        await self._ask(presented, purpose, proven)

    async def prove(self, presented: Presented, purpose: Purpose) -> Principal:
        """Return whom the server says that a call is of. Raises as `check` does."""
        tenant = await self._ask(presented, purpose, None)
        return Principal(tenant, Proof.EXTERNAL)

    def check_beside(
        self, presented: Presented, purpose: Purpose, proven: Principal, tell: Callable[[SidecarError], None]
    ) -> None:
        """Begin a check for which nobody waits, and tell its error if it has one."""

        async def ask() -> None:
            try:
                await self.check(presented, purpose, proven)
            except SidecarError as error:
                tell(error)

        self._beside.spawn(ask())

    async def _ask(self, presented: Presented, purpose: Purpose, proven: Principal | None) -> str:
        """Return the tenant in the answer of a server that lets the call pass; "" unless it proves."""
        if len(presented.authorization) > 1:  # the server may look at the other one
            text = 'the header "authorization" is given twice; send one'
            raise Misused(Reason.UNAUTHENTICATED, text)
        if self._in_flight >= self._settings.in_flight_max:
            self.on_checked("failed", 0)
            raise Refused(
                Reason.QUEUE_FULL,
                f"{self._settings.in_flight_max} calls wait for the external check; send it again, or raise "
                "identity.external.in_flight_max",
                retry_after_s=RETRY_S,
            )
        question = self._question(presented, purpose, proven)
        began_ns = perf_counter_ns()
        self._in_flight += 1
        try:
            answer = await self._answer(question.SerializeToString())
            denied = _denial(answer, purpose.request_id)
            tenant = _tenant_in(answer) if self.proves and denied is None else ""
        except _Unclear as unclear:
            self.on_checked("failed", perf_counter_ns() - began_ns)
            self._log_failure(unclear)
            raise _refusal(str(unclear)) from None
        finally:  # the client may have left meanwhile
            self._in_flight -= 1
        self.on_checked("ok" if denied is None else "denied", perf_counter_ns() - began_ns)
        self._log_success()
        if denied is not None:
            raise denied
        return tenant

    async def _answer(self, question: bytes) -> envoy.CheckResponse:
        """Return the server's answer. Raises _Unclear without one."""
        try:
            raw = await self._check(question, timeout=self._settings.timeout_s)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise _Unclear(f"did not answer within {self._settings.timeout_s:g} s") from None
            raise _Unclear(f"failed ({error.code().name})", error.details() or "") from None
        try:
            return envoy.CheckResponse.FromString(raw)
        except DecodeError:
            raise _Unclear("gave an answer that is no CheckResponse") from None

    def _question(self, presented: Presented, purpose: Purpose, proven: Principal | None) -> envoy.CheckRequest:
        head, question = presented.head, envoy.CheckRequest()
        host, _, port = presented.peer.rpartition(":")
        source, http = question.attributes.source, question.attributes.request.http
        if port.isdigit():
            source.address.socket_address.address = host.strip("[]")
            source.address.socket_address.port_value = int(port)
        source.principal = _sent(_certificate_of(presented, proven))
        http.id, http.method, http.path = purpose.request_id, head.method, _sent(head.path)
        http.host, http.protocol = _sent(head.host), head.protocol
        for raw_name, raw_value in head.headers:
            name = raw_name if isinstance(raw_name, str) else raw_name.decode("latin-1")
            if name in self._sent:
                value = _sent(raw_value if isinstance(raw_value, str) else raw_value.decode("latin-1"))
                http.headers[name] = f"{http.headers[name]},{value}" if name in http.headers else value
        known = {"action": purpose.action.value, "verb": purpose.verb}
        if proven is not None:
            groups = json.dumps(proven.groups) if proven.groups else ""
            known |= {"tenant": proven.tenant, "subject": proven.subject, "proof": proven.proof.value, "groups": groups}
        for name, value in (self._settings.context_extensions | known).items():
            if value:
                question.attributes.context_extensions[name] = _sent(value)
        return question

    def _log_failure(self, unclear: _Unclear) -> None:
        """Warn that calls are refused, once in a while."""
        if monotonic() - self._warned_at < WARN_AGAIN_S:
            return
        self._warned_at, self._has_warned = monotonic(), True
        logger.warning(
            "the external check at %s %s%s; calls are refused while that is so: look whether the server runs, speaks "
            "envoy.service.auth.v3 there, and answers within identity.external.timeout_s",
            self._settings.address,
            unclear,
            f": {clipped(unclear.cause)}" if unclear.cause else "",
        )

    def _log_success(self) -> None:
        if self._has_warned:
            self._has_warned = False
            logger.info("the external check at %s answers again", self._settings.address)


def _refusal(why: str) -> Refused:
    return Refused(
        Reason.STATE_UNAVAILABLE,
        f"the external check {why}, and without it no call is let in; send it again, or ask your operator, who finds "
        "the cause in the log and looks whether the server of identity.external runs",
        retry_after_s=RETRY_S,
    )


def why_denied(error: SidecarError) -> str:
    """Return the reason of a refusal for the audit, which says whose words they are."""
    return error.message if error.http is None else f"the external check answers {error.http[0]}: {error.message}"


def _certificate_of(presented: Presented, proven: Principal | None) -> str:
    """Return the name in the certificate of the caller's connection, verified by us or by a mesh's proxy."""
    if presented.certificate:
        return presented.certificate[0]
    return proven.subject if proven is not None and proven.proof is Proof.FORWARDED else ""


def _sent(text: str) -> str:
    """Return a text as protobuf takes it: a client's bytes need not be any."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def _denial(answer: envoy.CheckResponse, request_id: str) -> SidecarError | None:
    """Return the error of a call that an answer denies, None for one that it lets pass. Raises _Unclear.

    Envoy reads the status alone, and takes an empty answer as a yes. Here a denial counts under any status, and an
    answer that has neither a status nor a response says nothing.
    """
    kind = answer.WhichOneof("http_response")
    if kind == "error_response":
        raise _Unclear("says that it failed itself")
    if kind == "denied_response" or answer.status.code != grpc.StatusCode.OK.value[0]:
        return _denied(answer.denied_response, request_id)
    if kind is None and not answer.HasField("status"):
        raise _Unclear("gave an empty answer")
    return None


def _denied(response: envoy.DeniedHttpResponse, request_id: str) -> SidecarError:
    status = response.status.code if response.status.code in STATUSES else 403
    headers = {option.header.key.lower(): _value(option.header) for option in response.headers}
    challenge = headers.get("www-authenticate", "")
    reason = Reason.UNAUTHENTICATED if status == 401 else Reason.NOT_ALLOWED
    text = _told(response.body) or f'the external check refuses the call; ask your operator with id "{request_id}"'
    error = error_for(reason, text, retry_after_s=_seconds(headers.get("retry-after", "")))
    is_header = challenge.isprintable() and challenge.isascii() and len(challenge) <= TOLD_CHARACTERS_MAX
    error.http = status, ((("www-authenticate", challenge),) if challenge and is_header else ())
    return error


def _told(body: str) -> str:
    """Return the body of a denial as one printable line of bounded length."""
    text = " ".join(body[: 4 * TOLD_CHARACTERS_MAX].split())
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= TOLD_CHARACTERS_MAX else f"{text[:TOLD_CHARACTERS_MAX]}…"


def _seconds(retry_after: str) -> float | None:
    """Return the seconds in a header Retry-After, which has a number or a date; None without one that is sane."""
    try:
        seconds = (
            float(retry_after) if retry_after.isdecimal() else parsedate_to_datetime(retry_after).timestamp() - time()
        )
    except (ValueError, OverflowError):
        return None
    return max(0.0, seconds) if seconds <= RETRY_S_MAX else None


def _value(header: envoy.HeaderValue) -> str:
    return header.value or header.raw_value.decode("latin-1")


def _tenant_in(answer: envoy.CheckResponse) -> str:
    """Return the tenant in an answer's header, or in its dynamic metadata. Raises _Unclear without one, or with two."""
    found = {_value(each.header) for each in answer.ok_response.headers if each.header.key.lower() == TENANT_KEY}
    if TENANT_KEY in answer.dynamic_metadata.fields:
        found.add(answer.dynamic_metadata.fields[TENANT_KEY].string_value)
    if len(found) != 1:
        raise _Unclear(f"names {'two tenants' if found else 'no tenant'} in {TENANT_KEY}")
    (tenant,) = found
    if not tenant or problem_of(TENANT, tenant):
        raise _Unclear(f"names a tenant in {TENANT_KEY} that no call can have")
    return tenant
