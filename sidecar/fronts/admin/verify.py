"""`Adapters.Verify`: make a verification's requests like a client's, and turn its findings into messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from sidecar.access.access import ANY_VERSION
from sidecar.backends.api import Prompt as PromptKind
from sidecar.backends.registry import model_kind
from sidecar.config.identities import clipped
from sidecar.errors import Misused, Reason, Refused
from sidecar.fronts import callers
from sidecar.fronts.questions import ask
from sidecar.proto import admin_pb2
from sidecar.proto.filling import filled
from sidecar.shell import asking
from sidecar.shell.asking import Order, Question
from sidecar.shell.evidence import Answers, Prompt, Reply
from sidecar.shell.gateway import Gateway
from sidecar.shell.verdicts import Check
from sidecar.shell.verifying import Finding, Plan, Verification

TOKENS_ONLY = "its server has no text model (ensemble); give prompts as token ids with --prompt-tokens"
TEXT_ONLY = "its model takes text only; give prompts with --prompt"
CLIENT_ID = "verify"
VERIFICATIONS_MAX = 4
"""Verifications of one tenant at a time: each asks every backend, over and over."""


class Verifier:
    """Verify adapters over the process's gateway, as whoever calls."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._under_way: Counter[str] = Counter()

    async def verify(self, request: Any, context: Any) -> None:
        """Write a message for each finding. Raises SidecarError if nothing can be asked, or too much is under way."""
        access, claims = self._gateway.access, callers.claimed_tenants(callers.metadata_of(context), "")
        caller = callers.CALLER.get()
        permit = ANY_VERSION if access.mode == "observe" else None  # it is one call, and recorded once
        tenant = access.tenant_of(caller, claims, callers.id_of_call(context)) or asking.TENANT

        unknown = next((each for each in request.backends if each not in self._gateway.state.backends), "")
        if unknown and not access.is_operator(caller):  # to whom all names are told
            raise Misused(Reason.UNKNOWN_BACKEND, f'no backend is called "{clipped(unknown)}"; leave it out to ask all')

        async def report(finding: Finding) -> None:
            await context.write(message_of(finding))

        async def ask_as_caller(question: Question) -> Reply:
            return await ask(self._gateway, question, CLIENT_ID, caller, tenant, permit=permit)

        if self._under_way[tenant] >= VERIFICATIONS_MAX:
            raise Refused(
                Reason.QUEUE_FULL,
                f'{VERIFICATIONS_MAX} verifications of tenant "{tenant}" are under way; wait until one has ended',
            )
        self._under_way[tenant] += 1
        try:
            await Verification(self._gateway, order_of(request), ask_as_caller, self._fitting).run(report)
        finally:
            self._under_way[tenant] -= 1
            if not self._under_way[tenant]:
                del self._under_way[tenant]

    async def _fitting(self, backend: str, prompts: Sequence[Prompt]) -> tuple[tuple[Prompt, ...], str]:
        """Return the prompts that a backend's model takes, and if there may be none, why."""
        model = model_kind(self._gateway.state.backends[backend].facts.kind)
        if model.asking is not None and PromptKind.TOKENS not in model.asking.prompts:
            return tuple(prompt for prompt in prompts if prompt.text), TEXT_ONLY
        if not model.text_model or await self._is_ready(backend, model.text_model):
            return tuple(prompts), ""
        return tuple(prompt for prompt in prompts if prompt.token_ids), TOKENS_ONLY

    async def _is_ready(self, backend: str, model: str) -> bool:
        """Return True if a server has a model, or cannot say: then the requests will show it."""
        request = service_pb2.ModelReadyRequest(name=model)
        try:
            return bool((await self._gateway.backends[backend].call("ModelReady", request)).ready)
        except grpc.RpcError:
            return True


def order_of(request: Any) -> Order:
    """Return the order of a VerifyRequest."""
    return Order(
        reference=request.name,
        backends=tuple(dict.fromkeys(request.backends)),
        prompts=tuple(Prompt(prompt.text, tuple(prompt.token_ids)) for prompt in request.prompts),
        tokens_max=request.max_tokens or asking.TOKENS_DEFAULT,
        timeout_s=request.timeout_s or asking.TIMEOUT_S_DEFAULT,
    )


def message_of(finding: Finding) -> Any:
    """Return a finding as the API shows it."""
    match finding:
        case Plan():
            return admin_pb2.VerifyResponse(plan=_plan_message(finding))
        case Answers():
            return admin_pb2.VerifyResponse(answer=_answer_message(finding))
        case Check():
            return admin_pb2.VerifyResponse(check=filled(admin_pb2.VerifyCheck, finding))


def _plan_message(plan: Plan) -> Any:
    return filled(
        admin_pb2.VerifyPlan,
        plan,
        skipped=[admin_pb2.SkippedBackend(backend=backend, why=why) for backend, why in plan.skipped],
        prompts=len(plan.prompts),
        expected=sum(bool(prompt.expect) for prompt in plan.prompts),
    )


def _answer_message(asked: Answers) -> Any:
    return filled(
        admin_pb2.VerifyAnswer,
        asked,
        prompt=filled(admin_pb2.VerifyPrompt, asked.prompt),
        base=filled(admin_pb2.VerifyReply, asked.base),
        adapter=filled(admin_pb2.VerifyReply, asked.adapter),
        expect=asked.prompt.expect,
        again=[filled(admin_pb2.VerifyReply, reply) for reply in asked.again],
    )
