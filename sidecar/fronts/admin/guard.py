"""Decide each call of the admin listener by the policy, and record each change, once.

The guard is the innermost interceptor, so that it sees messages that are parsed and checked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio

from sidecar.access.access import Caller
from sidecar.access.principal import Action, Resource, Sort
from sidecar.access.store import AccessStore
from sidecar.config.identities import clipped
from sidecar.errors import Reason, Refused
from sidecar.fronts.admin.verbs import VERBS, Sight, Verb, called
from sidecar.fronts.callers import CALLER, id_of_call
from sidecar.fronts.status import abort
from sidecar.shell.gateway import Gateway
from sidecar.shell.managing import CONFIRM
from sidecar.tasks import Tasks

DOING = {
    Action.REGISTER: "change",
    Action.EVICT: "move",
    Action.PAUSE: "pause",
    Action.DRAIN: "drain",
    Action.SHOW: "see",
    Action.SEE_QUEUE: "see",
    Action.MANAGE: "manage",
    "Adapters.Verify": "verify",  # which takes the right to promote
}


async def _refuse(messages: Any, context: Any) -> None:
    await abort(context, Refused(Reason.NOT_ALLOWED, "nothing says who may make this call, so nobody may"))


REFUSING: Any = grpc.stream_stream_rpc_method_handler(_refuse)


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Lets a call through if its caller may make it; one that is not in the table of verbs is refused."""

    def __init__(self, gateway: Gateway, store: AccessStore | None = None) -> None:
        self._gateway = gateway
        self._sight = Sight(gateway, store)
        self._handlers: dict[Any, Any] = {}
        self._recording = Tasks()

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None
        rule = VERBS.get(details.method)
        if rule is None:
            return REFUSING
        if rule.action is None:
            return handler
        guarded = self._handlers.get(details.method)
        if guarded is None:
            guarded = self._handlers[details.method] = self._guarded(handler, rule, details.method)
        return guarded

    def _guarded(self, handler: Any, rule: Verb, method: str) -> Any:
        verb = called(method)
        kinds = handler.request_deserializer, handler.response_serializer
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(self._pushing(handler.stream_unary, rule, verb), *kinds)
        inner = handler.unary_stream or handler.unary_unary
        make = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )

        async def handle(request: Any, context: Any) -> Any:
            async with self._allowed(rule, verb, request, context) as told:
                answer = await inner(request, context)
                told.append(answer)
                return answer

        return make(handle, *kinds)

    def _pushing(self, inner: Any, rule: Verb, verb: str) -> Any:
        """Return a handler that decides by the first message of a stream."""

        async def handle(requests: AsyncIterator[Any], context: Any) -> Any:
            first = await anext(requests, None)

            async def all_of() -> AsyncIterator[Any]:
                if first is not None:
                    yield first
                async for message in requests:
                    yield message

            if first is None or first.WhichOneof("part") != "start":
                return await inner(all_of(), context)  # it says what is wrong
            async with self._allowed(rule, verb, first, context) as told:
                answer = await inner(all_of(), context)
                told.append(answer)
                return answer

        return handle

    @asynccontextmanager
    async def _allowed(self, rule: Verb, verb: str, message: Any, context: Any) -> AsyncIterator[list[Any]]:
        """Enter a call that is allowed; leaving it records what has changed."""
        caller, sight, action = CALLER.get(), self._sight, rule.action
        assert action is not None
        resource, request_id = rule.resource(message, sight), id_of_call(context)
        try:
            self._check(caller, rule, action, verb, resource, request_id)
        except Refused as refused:
            await abort(context, refused)

        def confirm() -> None:
            """Ask again as the name and the caller's credential are now."""
            self._gateway.access.check(CALLER.get())
            self._check(CALLER.get(), rule, action, verb, rule.resource(message, sight), request_id)

        CONFIRM.set(confirm)
        told: list[Any] = []
        if not rule.changes(message):
            yield told
            return
        before = rule.facts(message, sight)
        why, is_told = "the call was cut off", False
        try:
            yield told
            why = ""
        except grpc.aio.AbortError:
            why, is_told = context.details() or "it was refused", True
            raise
        finally:
            after = {**rule.asked(message), **rule.facts(message, sight), **(rule.outcome(told[0]) if told else {})}
            # A call that is cut off has changed something, or will have: its line is written nevertheless.
            recording = self._recording.spawn(
                sight.gateway.access.changed(caller, verb, action, resource, before, after, request_id, why)
            )
            if not is_told:  # a refusal has gone out already; waiting would keep its call open on a slow disk
                await asyncio.shield(recording)

    def _check(
        self, caller: Caller, rule: Verb, action: Action, verb: str, resource: Resource, request_id: str
    ) -> None:
        """Raise Refused if the caller may not do it, with words that do not tell whether a name is there.

        In observe mode it is only recorded, once for the call.
        """
        access = self._gateway.access
        principal = access.judged(caller)
        if principal is None or rule.each:
            return
        if resource.sort is Sort.ADAPTER and not rule.creates and not access.decide(principal, Action.LIST).allowed:
            is_there = self._gateway.catalogue.registry.get(resource.name) is not None
            if not is_there and access.mode == "observe":
                return  # it is refused in each mode
            if not is_there or not access.decide(principal, Action.LIST, resource).allowed:
                why = "it is hidden" if is_there else ""
                if access.mode == "enforce":
                    access.refuse(caller, action, resource.name, why, request_id, verb)
                self._observe(caller, action, resource, why, request_id, verb)
                return
        decision = access.decide(principal, action, resource)
        if not decision.allowed and access.mode == "observe":
            self._observe(caller, action, resource, decision.by, request_id, verb)
        elif not decision.allowed:
            access.denied(caller, action, resource, decision.by, request_id, verb)
            # A tenant may be the one of a key, whose id must not tell whether it is known.
            is_told = resource.name and resource.sort is not Sort.TENANT
            what = f'"{clipped(resource.name)}"' if is_told else "this"
            raise Refused(
                Reason.NOT_ALLOWED,
                f"you may not {DOING.get(verb) or DOING.get(action, action.value)} {what} ({verb}); ask your operator "
                f'with id "{request_id}"',
            )

    def _observe(
        self, caller: Caller, action: Action, resource: Resource, why: str, request_id: str, verb: str
    ) -> None:
        """Record a denial that is let pass. What the handler asks then does not count again."""
        self._gateway.access.denied(caller, action, resource, why, request_id, verb)
        CALLER.set(replace(caller, is_recorded=True))
