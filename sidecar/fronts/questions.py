"""Ask an engine a question of our own, like a client's request: it queues, causes a load and is healed.

It takes the budgets of whoever has it asked, and is booked to its tenant.
"""

from __future__ import annotations

from typing import Any

from sidecar.access.access import Caller, Permit
from sidecar.backends.api import Payload, Ticket
from sidecar.backends.api import Reply as EngineReply
from sidecar.backends.kind import Ask, Reader
from sidecar.backends.openai.asking import POOLED
from sidecar.backends.openai.paths import generates
from sidecar.core.causes import NotLoaded
from sidecar.errors import SidecarError
from sidecar.fronts import relay
from sidecar.fronts.generate.forms import payload_of
from sidecar.fronts.lengths import text_tokens_max
from sidecar.proto import gateway_pb2
from sidecar.shell.asking import Question
from sidecar.shell.evidence import Reply
from sidecar.shell.gateway import Gateway
from sidecar.shell.requests import RequestFacts
from sidecar.telling.endings import Voice, message_of


async def ask(
    gateway: Gateway,
    question: Question,
    client_id: str,
    caller: Caller,
    tenant: str,
    voice: Voice = Voice.CLIENT,
    permit: Permit | None = None,
) -> Reply:
    """Return the answer to one request, or the reason for none. Without a permit the caller is asked for one.

    Its version is named: where no policy decides, no allow list keeps operators from it.
    """
    request = _generate_request(question)
    payload, input_tokens = payload_of(request, lambda kind: False)
    engine, reader = gateway.state.backends.get(question.backend), None
    if engine is not None and not generates(engine.facts.paths):  # an adapter is verified by what it is there for
        asked = Ask(request.text or None, tuple(request.tokens.ids), model=request.adapter)
        payload = Payload("", POOLED.write(asked, False), raw=True, unary=False, kind=engine.facts.kind)
        reader = POOLED.reader(bool(request.text))
    if question.prompt.text:
        input_tokens = text_tokens_max(gateway.state, input_tokens)
    facts = RequestFacts(
        adapter=request.adapter,
        tenant=tenant,
        klass=question.klass,
        input_tokens=input_tokens,
        output_tokens_max=question.tokens_max,
        deadline_s=question.timeout_s,
        size_bytes=request.ByteSize(),
        only=(question.backend,),
        versions=None if question.version is None else question.version[1:],
        is_estimated=bool(request.text),
    )
    try:
        ticket = gateway.submit(facts, payload, client_id, caller, request.text or None, permit)
    except SidecarError as error:
        return Reply(error=error.message, reason=error.reason)
    try:
        return await _answer(gateway, ticket, bool(question.prompt.text), voice, reader)
    finally:
        gateway.close(ticket)


def _generate_request(question: Question) -> Any:
    """Return the question as a GenerateRequest. It does not stream: only a whole answer is cut in no character."""
    prompt = question.prompt
    asked = {"text": prompt.text} if prompt.text else {"tokens": gateway_pb2.TokenIds(ids=prompt.token_ids)}
    adapter = "" if question.version is None else "{}@v{}".format(*question.version)
    # top_k 1 is the form of "greedy" that every engine takes; some refuse a temperature of 0.
    return gateway_pb2.GenerateRequest(adapter=adapter, max_tokens=question.tokens_max, stream=False, top_k=1, **asked)


async def _answer(gateway: Gateway, ticket: Ticket, is_text: bool, voice: Voice, reader: Reader | None) -> Reply:
    texts: list[str] = []
    token_ids: list[int] = []

    async def take(reply: EngineReply) -> None:
        nonlocal reader
        reader = reader or relay.reader_of(gateway, ticket, is_text)
        piece = reader.read(reply)
        texts.append(piece.text)
        token_ids.extend(piece.token_ids)

    ending = await relay.relay(ticket, take)
    if ending is not None and ending.reason is not None:
        if isinstance(ending.cause, NotLoaded):  # whoever loads an adapter hears what an engine says of it
            voice = Voice.CLIENT
        return Reply(error=f"{message_of(ending, voice)} [{ending.reason.value}]", reason=ending.reason)
    return Reply("".join(texts), tuple(token_ids))
