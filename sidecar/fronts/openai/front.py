"""The application below `/v1`: completions, chats, models.

`model` names an adapter, with or without a version, or the base model. Headers say who asks (`x-lora-tenant`,
`x-lora-class`, `x-lora-deadline-ms`, `x-lora-session`, or else the body's `user` for the session). Without identity the
API key that these clients send is ignored.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from starlette.datastructures import QueryParams
from starlette.types import Receive, Scope, Send

from sidecar.access import access
from sidecar.access.budgets.charges import Demand
from sidecar.access.principal import Action, Head, Presented, Purpose, Resource, Sort
from sidecar.access.resources import adapter_resource
from sidecar.backends.api import Carrier, Ticket
from sidecar.backends.kind import Native
from sidecar.backends.openai.paths import ROWS
from sidecar.backends.registry import model_kind
from sidecar.config import Config
from sidecar.config.queue import Queue
from sidecar.core.admission import unknown_adapter
from sidecar.errors import Reason, Refused, SidecarError
from sidecar.fronts.callers import AUTHORIZATION, FORWARDED, peer_at
from sidecar.fronts.eligible import empty_pools
from sidecar.fronts.hiding import Hiding
from sidecar.fronts.http.connection import CARRIER, CROWDED, PEER, SUBSET
from sidecar.fronts.http.content_type import why_not_json
from sidecar.fronts.intake import Intake
from sidecar.fronts.lengths import text_tokens_max
from sidecar.fronts.openai import load_calls
from sidecar.fronts.openai.answering import Answering, ClientLeft, TooLong, body_of, declared_size, send_failure
from sidecar.fronts.openai.body import read_body
from sidecar.fronts.openai.candidates import Destination, Destinations
from sidecar.fronts.openai.chat_templates import ChatTemplate
from sidecar.fronts.openai.errors import Failure, closing, failure, failure_of_error, in_form_of, wrong_method
from sidecar.fronts.openai.headers import check_request_id, read_headers, request_id_of
from sidecar.fronts.openai.large import LARGE_BYTES, LargeBodies, Refusal
from sidecar.fronts.openai.load_calls import LoadCalls
from sidecar.fronts.openai.models import Models
from sidecar.fronts.openai.rate_limits import headers_of
from sidecar.fronts.openai.request import (
    N,
    NotServed,
    OpenAiRequest,
    Unfit,
    choices_of,
    parts_of,
    read_request,
)
from sidecar.fronts.openai.text_forms import TextRequest
from sidecar.model.reference import Reference
from sidecar.shell.gateway import Gateway
from sidecar.shell.request_log import log_refused
from sidecar.shell.requests import RequestFacts
from sidecar.telling.endings import unknown

MODELS = "/v1/models"
API_KEY = b"x-api-key"
ANTHROPIC = b"anthropic-version"
"""Where clients of Anthropic's API send their key, and what they always send."""
Place = Callable[[OpenAiRequest, Sequence[TextRequest | Refusal] | None], Destination]
METHODS = dict.fromkeys(ROWS, ("POST",)) | {MODELS: ("GET", "HEAD")}


class OpenAiFront:
    """An ASGI application over the process's gateway. `templates` are chat templates by backend."""

    def __init__(
        self,
        gateway: Gateway,
        config: Config,
        templates: Mapping[str, ChatTemplate],
        intake: Intake,
        loads: LoadCalls | None = None,
    ) -> None:
        self._loads = loads
        self._methods = METHODS if loads is None else METHODS | dict.fromkeys(load_calls.PATHS, ("POST",))
        self._gateway = gateway
        self._intake = intake
        self._hide_backend = config.hide_backend
        self._hiding = Hiding(gateway, config.hide_backend)
        self._body_bytes_max = config.listeners.http.body_bytes_max
        self._prompts_max = config.listeners.http.prompts_max
        self.configure(config.queue, templates)
        self._models = Models(gateway)
        self.large_bodies = LargeBodies()

    def configure(self, queue: Queue, templates: Mapping[str, ChatTemplate]) -> None:
        """Take another configuration. A body that is being read keeps the templates with which that began."""
        self._queue = queue
        self._destinations = Destinations(self._gateway.state, templates, self._may_stream)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].rstrip("/")
        request_id, send = request_id_of(scope["headers"]), self._hiding.send(in_form_of(path, send))
        known = MODELS if path.startswith(f"{MODELS}/") else path
        try:
            sender = await self._gateway.access.identify(_presented(scope), Purpose(request_id, *_purpose_of(known)))
        except SidecarError as error:
            self._refuse(path, request_id, error)
            await send_failure(send, closing(_failure_of(error)), request_id)
            return
        if known not in self._methods:
            there_is = load_calls.OFF if path in load_calls.PATHS else f"there are {', '.join(self._methods)}"
            message = f"{scope['method']} {path[:80]} is not served; {there_is}"
            await send_failure(send, failure(404, message, "not_found"), request_id)
        elif scope["method"] not in self._methods[known]:
            await send_failure(send, wrong_method(known, self._methods[known]), request_id)
        elif known == MODELS:
            await self._show_models(scope, sender, path, send, request_id)
        elif scope["state"].get(CROWDED):
            message = "the http listener has as many connections as it takes; try again, or raise connections_max"
            full = failure(503, message, "too_many_connections", retry_ms=1000, retry=True)
            self._refuse(path, request_id, Refused(Reason.QUEUE_FULL, message), sender)
            await send_failure(send, closing(full), request_id)
        elif why := why_not_json(scope["headers"]):
            self._refuse(path, request_id, Refused(Reason.INVALID_REQUEST, why), sender)
            await send_failure(send, closing(failure(415, why, "unsupported_media_type")), request_id)
        elif self._loads is not None and path in load_calls.PATHS:
            await self._carry_out(self._loads, scope, sender, path, receive, send, request_id)
        else:
            await self._answer(scope, sender, path, receive, send, request_id)

    def _refuse(self, path: str, request_id: str, error: SidecarError, sender: access.Caller | None = None) -> None:
        """Note what is refused before it is read: as a request if it is one, else in the log."""
        if path in ROWS:
            self._gateway.turned_away(request_id, error, sender)
        else:
            log_refused(request_id, error)

    async def _carry_out(
        self,
        loads: LoadCalls,
        scope: Scope,
        sender: access.Caller,
        path: str,
        receive: Receive,
        send: Send,
        request_id: str,
    ) -> None:
        """Carry out a load call."""
        try:
            declared_bytes = declared_size(scope["headers"], load_calls.BODY_BYTES_MAX)
            async with self._intake.body(declared_bytes) as arrival:
                pieces, _ = await body_of(receive, load_calls.BODY_BYTES_MAX, arrival)
        except ClientLeft:
            return
        except TooLong as error:
            text = f"a load call has at most {load_calls.BODY_BYTES_MAX} bytes"
            await send_failure(send, _failure_of(TooLong(error.reason, text)), request_id)
            return
        except SidecarError as error:
            await send_failure(send, _failure_of(error), request_id)
            return
        await send_failure(send, await loads.answer(path, b"".join(pieces), sender, request_id), request_id)

    async def _answer(
        self, scope: Scope, sender: access.Caller, path: str, receive: Receive, send: Send, request_id: str
    ) -> None:
        tickets: list[Ticket] = []
        try:
            try:
                check_request_id(scope["headers"])
                head = read_headers(scope["headers"])
                head.tenant = tenant = self._gateway.access.tenant_of(sender, _claims(head), request_id)
                head.klass = self._gateway.access.class_of(sender, head.klass)
                declared_bytes = declared_size(scope["headers"], self._body_bytes_max)
                async with self._intake.body(declared_bytes) as arrival:
                    pieces, size_bytes = await body_of(receive, self._body_bytes_max, arrival)
                    place = self._placing(tenant, head.klass)
                    permit, requests = await self._read(path, pieces, size_bytes, place, sender, tenant, request_id)
                if (subset := scope["state"].get(SUBSET)) is not None:
                    requests = [(asked, self._within(destination, subset)) for asked, destination in requests]
                carrier: Carrier | None = scope["state"].get(CARRIER)
                if carrier is not None and not self._gateway.takes_requests:
                    # A gateway's endpoint picker must say so at once; in path a request waits for an engine.
                    raise Refused(Reason.NO_BACKEND, "no engine is ready; try again later", retry_after_s=1.0)
                if carrier is not None and not self._may_carry(carrier, requests, tenant, head.klass):
                    if await carrier.redirect(b"".join(pieces)):
                        return
                    carrier = None
                if len(requests) > 1:
                    head.session = head.session or requests[0][0].session or secrets.token_hex(8)  # one version for all
                facts = [self._facts(head, asked, destination) for asked, destination in requests]
                self._check_together(facts, sender, request_id)
                for (asked, destination), each in zip(requests, facts, strict=True):
                    text = _text(asked, destination)
                    tickets.append(self._gateway.submit(each, destination.payload, request_id, sender, text, permit))
            except ClientLeft:
                return
            except SidecarError as error:
                self._gateway.turned_away(request_id, error, sender)
                failed = _failure_of(error)
                if error.reason is Reason.RATE_LIMITED:
                    failed = replace(failed, headers=(*failed.headers, *self._limits(head, requests[0][0])))
                await send_failure(send, failed, request_id)
                return
            limits = self._limits(head, requests[0][0])
            answering = Answering(self._gateway, requests, tickets, self._hide_backend, limits)
            if carrier is not None:
                # Before the loop runs again: its run may have been started, and sends nothing before that.
                carrier.head, tickets[0].carrier = answering.head, carrier
            await answering.serve(receive, send)
        finally:
            for ticket in reversed(tickets):  # queued ones first, as in `Answering`
                self._gateway.close(ticket)

    async def _read(
        self,
        path: str,
        pieces: list[bytes],
        size_bytes: int,
        place: Place,
        sender: access.Caller,
        tenant: str,
        request_id: str,
    ) -> tuple[access.Permit, list[tuple[OpenAiRequest, Destination]]]:
        """Return the requests of a body, one for each prompt of a list, where each goes, and the permit of them all."""
        bounds = self._prompts_max, self._body_bytes_max
        if size_bytes <= LARGE_BYTES:
            parts = parts_of(read_request(path, read_body(b"".join(pieces))), *bounds)
            permit = self._permit(sender, parts[0].model, tenant, request_id)
            return permit, [each for asked in parts for each in self._placed(asked, place, len(parts))]
        found = await self.large_bodies.read(pieces, self._destinations.order(path, size_bytes, *bounds))
        permit = self._permit(sender, found[0].asked.model, tenant, request_id)
        return permit, [(each.asked, place(each.asked, each.texts)) for each in found]

    def _placed(self, asked: OpenAiRequest, place: Place, prompts: int) -> list[tuple[OpenAiRequest, Destination]]:
        """Return a request and where it goes; several if its engines give one answer to a request and it wants more."""
        try:
            return [(asked, place(asked, None))]
        except Unfit as unfit:
            if unfit.param != N:
                raise
        choices = choices_of(asked, prompts, self._prompts_max, self._body_bytes_max)
        return [(each, place(each, None)) for each in choices]

    def _permit(self, sender: access.Caller, model: str, tenant: str, request_id: str) -> access.Permit:
        return self._gateway.permit(sender, model, request_id, self._destinations.is_base(model), tenant)

    def _check_together(self, facts: Sequence[RequestFacts], sender: access.Caller, request_id: str) -> None:
        """Refuse a list that limits never let in: each of its requests alone would be told to come again."""
        first = facts[0]
        if len(facts) > 1:
            length = sum(each.output_tokens_max for each in facts) if first.has_length else None
            tokens, sequences = sum(each.input_tokens for each in facts), sum(each.sequences for each in facts)
            asked = Demand(tokens, length, first.is_estimated, sequences)
            self._gateway.access.check_together(
                sender, first.tenant, first.klass, first.adapter, asked, len(facts), request_id
            )

    def _facts(self, head: RequestFacts, asked: OpenAiRequest, destination: Destination) -> RequestFacts:
        """Return what the headers said of a request with what its body says, and where it goes."""
        state = self._gateway.state
        text_tokens = text_tokens_max(state, asked.prompt_bytes) if asked.prompt_bytes else 0
        each = destination.length_max if destination.is_long else asked.max_tokens
        if destination.length is not None:
            each = destination.length
        if each is None:
            each = state.config.output_tokens_assumed
        return replace(
            head,
            adapter=destination.adapter,
            input_tokens=asked.prompt_tokens + text_tokens,
            output_tokens_max=each * asked.answers if asked.row.generates else 1,
            session=head.session or asked.session,
            size_bytes=asked.size_bytes,
            only=destination.only,
            sequences=self._sequences(asked, destination),
            has_length=asked.has_length or destination.length is not None,
            is_estimated=text_tokens > 0,
            operation=asked.row.operation,
        )

    def _sequences(self, asked: OpenAiRequest, destination: Destination) -> int:
        """Return how many seats a request takes. Inputs that are pooled are taken in turn: at most all that there are.

        Answers are generated side by side, so more of them than seats are refused.
        """
        if asked.row.generates or asked.answers == 1:
            return asked.answers
        state, only = self._gateway.state, destination.only
        able = [each for each in state.backends.values() if not only or each.id in only or each.group in only]
        return min((asked.answers, *(max(1, each.seats_at_best(state.config)) for each in able)))

    def _within(self, destination: Destination, subset: Collection[str]) -> Destination:
        """Return a destination without the engines whose addresses a gateway has left out. Raises Refused for none."""
        backends, only = self._gateway.state.backends, destination.only
        near = [each.id for each in self._gateway.backends.values() if each.address in subset]
        left = tuple(each for each in near if not only or each in only or backends[each].group in only)
        if not left:
            shown = ", ".join(subset)[:200] or "nothing"
            message = f"the gateway lets the request go to {shown}, and no engine there can serve it"
            raise Refused(Reason.NO_BACKEND, message)
        return replace(destination, only=left)

    def _may_carry(
        self, carrier: Carrier, requests: Sequence[tuple[OpenAiRequest, Destination]], tenant: str, klass: str
    ) -> bool:
        """Return True if something else may carry a request: it is one for any engine, and need not be read."""
        if len(requests) > 1 or requests[0][1].text is not None or not requests[0][0].row.as_text:
            return False
        if any(backend.is_encrypted for backend in self._gateway.backends.values()):
            return False
        return carrier.estimates or self._gateway.access.standing(tenant, klass, requests[0][0].model).tokens is None

    def _limits(self, head: RequestFacts, asked: OpenAiRequest) -> tuple[tuple[bytes, bytes], ...]:
        """Return the headers that say what remains of the tenant's budgets."""
        return headers_of(self._gateway.access.standing(head.tenant, head.klass, asked.model))

    def _placing(self, tenant: str, klass: str) -> Place:
        """Return what places the requests of a tenant and class. `_read` begins at once, by the same destinations."""
        destinations = self._destinations

        def place(asked: OpenAiRequest, texts: Sequence[TextRequest | Refusal] | None) -> Destination:
            adapter = "" if destinations.is_base(asked.model) else asked.model
            limited = self._gateway.access.default_max_tokens(tenant, klass, adapter)
            salt = self._gateway.salt(tenant, asked.salt)
            return destinations.place(asked, tenant, self._length_max(tenant, klass, limited), texts, limited, salt)

        return place

    def _length_max(self, tenant: str, klass: str, limited: int | None) -> int | None:
        """Return how many tokens a request without a length gets where the engine has no bound of its own."""
        of_class = self._queue.classes.get(klass)
        bounds = (
            self._queue.tenant_max_tokens.get(tenant),
            None if of_class is None else of_class.max_tokens,
            limited,
        )
        return min((bound for bound in bounds if bound is not None), default=None)

    def _may_stream(self, kind: str) -> bool:
        """Return True if a kind streams. Then every answer is streamed, since only so can its tokens be counted."""
        known = [backend.streams for backend in self._gateway.fleet.of_kind(kind)]
        to_come = (model_kind(facts.kind) for _, facts in empty_pools(self._gateway.state))
        if known or all(model.native is Native.OPENAI for model in to_come):
            return any(known)
        return self._gateway.fleet.streamed(kind)

    async def _show_models(self, scope: Scope, sender: access.Caller, path: str, send: Send, request_id: str) -> None:
        try:
            tenant = self._gateway.access.tenant_of(sender, _claims(read_headers(scope["headers"])), request_id)
        except Refused as refused:
            await send_failure(send, failure_of_error(refused), request_id)
            return
        if path == MODELS:
            versions = QueryParams(scope["query_string"]).get("versions", "") in ("true", "1")
            await send_failure(send, Failure(200, await self._models.listed(sender, tenant, versions)), request_id)
            return
        model = path.removeprefix(f"{MODELS}/")
        found = self._models.one(model, sender, tenant)
        self._record_hidden(sender, model, found is not None, request_id)
        if found is None:
            error = self._missing(model, tenant)
            await send_failure(send, failure_of_error(error), request_id)
            return
        await send_failure(send, Failure(200, json.dumps(found).encode()), request_id)

    def _missing(self, model: str, tenant: str) -> Refused:
        """Return the error for a model that is not there, or not shown: the same, as for a request to it."""
        state, name = self._gateway.state, Reference.of(model).name
        known = state.names.get(name)
        if self._gateway.access.mode == "enforce" or (known is not None and known.is_for(tenant)):
            return Refused(Reason.UNKNOWN_ADAPTER, f'the model "{model[:80]}" does not exist')
        return unknown(unknown_adapter(state, name, tenant))

    def _record_hidden(self, sender: access.Caller, model: str, is_shown: bool, request_id: str) -> None:
        """Record that a model is not shown, or in observe mode that it would not be."""
        policy, record = self._gateway.access, self._gateway.catalogue.registry.get(Reference.of(model).name)
        principal = policy.judged(sender)
        if principal is None or (record is None and (is_shown or policy.mode == "observe")):
            return
        why = "there is no such name"
        if record is not None:
            decision = policy.decide(principal, Action.LIST, adapter_resource(record))
            why = "" if decision.allowed else decision.by
        if why:
            about = Resource(Sort.ADAPTER, model[: access.REFERENCE_MAX])
            policy.denied(sender, Action.LIST, about, why, request_id)


def _presented(scope: Scope) -> Presented:
    """Return what a request presents to prove who sends it."""
    found: dict[bytes, list[str]] = {AUTHORIZATION.encode(): [], FORWARDED.encode(): [], API_KEY: []}
    for name, value in scope["headers"]:
        if name in found:
            found[name].append(value.decode("latin-1"))
    peer = peer_at(*scope["client"]) if scope.get("client") else ""
    authorization, forwarded, keys = found.values()
    is_anthropics = any(name == ANTHROPIC for name, _ in scope["headers"])
    if is_anthropics and not authorization:
        authorization = [f"Bearer {key}" for key in keys]
    return Presented(tuple(authorization), scope["state"].get(PEER, ()), tuple(forwarded), peer, head=_head_of(scope))


def _head_of(scope: Scope) -> Head:
    headers, query = scope["headers"], scope["query_string"]
    path = scope.get("raw_path", b"") + (b"?" + query if query else b"")
    host = next((value for name, value in headers if name == b"host"), b"")
    protocol = f"HTTP/{scope['http_version']}"
    return Head(scope["method"], path.decode("latin-1"), protocol, host.decode("latin-1"), headers)


def _purpose_of(path: str) -> tuple[Action, str]:
    """Return the action of a path, and its name in the audit."""
    if path in ROWS:
        return Action.INFER, ""
    if path in load_calls.PATHS:
        return Action.REGISTER, load_calls.VERB
    return Action.LIST if path == MODELS else Action.SHOW, ""


def _claims(head: RequestFacts) -> tuple[str, ...]:
    return (head.tenant,) if head.tenant else ()


def _text(asked: OpenAiRequest, destination: Destination) -> str | None:
    """Return the prompt as its engine gets it, if it is a text. Engines write chats themselves, and count them."""
    if destination.text is not None:
        return destination.text.prompt
    return asked.text


def _failure_of(error: SidecarError) -> Failure:
    failed = failure_of_error(error, error.param if isinstance(error, Unfit) else None)
    if isinstance(error, NotServed):
        return failure(501, error.message, "path_not_served")
    if isinstance(error, TooLong):
        return closing(failure(413, error.message, error.reason.value.lower()))
    return failed
