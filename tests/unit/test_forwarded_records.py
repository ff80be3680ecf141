"""What one replica sends another of a request arrives as it was."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import msgspec
import pytest

from sidecar.backends.api import HttpForm, HttpRejection, Payload, Prompt, Ticket, Whole
from sidecar.backends.buffers import AnswerBuffers
from sidecar.core.causes import Lost, NoBackend, ReplicaAway, Unowned
from sidecar.core.effects import Dispatch, Settle
from sidecar.core.enums import Cache, Outcome
from sidecar.core.misfits import RankTooLarge
from sidecar.errors import Reason
from sidecar.replicas import forms
from sidecar.shell.requests import COUNT_MAX, RequestFacts

FORM = HttpForm("/v1/completions", b'{"model":', b',"prompt":"\xff"}', "", True)
PAYLOADS = (
    Payload(
        "tensorrt_llm", b"\x00\xff" * 100, True, False, (("x-a", "é"),), None, "triton", {}, ("a", "b"), Whole(None)
    ),
    Payload("m", FORM, True, True, (), Prompt.TEXT, "vllm", {"triton": b"head", "trtllm": FORM}),
)
FACTS = (
    RequestFacts(
        "sql@v8", "acme", "batch", 7, 9, 0.0, "s", 10, ("gpu-1",), 3, (8, 9), False, True, "chat", waited_ns=5
    ),
    RequestFacts("", deadline_s=inf, output_tokens_max=COUNT_MAX + 1, versions=()),
)
SETTLES = (
    Settle(7, Outcome.OK, "sql", "acme", "batch", 1, 2, 3, backend="gpu-1", version="d", is_estimated=True),
    Settle(
        7, Outcome.REFUSED, "", "acme", "batch", 1, 2, reason=Reason.NO_BACKEND, retry_after_ns=5,
        cause=NoBackend(2, (("gpu-1", RankTooLarge(64, 32)),), ("blue",)),
    ),
    Settle(
        7, Outcome.FAILED, "sql", "acme", "batch", 1, 2, reason=Reason.BACKEND_FAILED,
        cause=Unowned("gpu-1", ReplicaAway("rep-2", "{x}")),
    ),
    Settle(7, Outcome.FAILED, "sql", "acme", "batch", 1, 2, reason=Reason.BACKEND_FAILED, cause=Lost(("a",), "", 2)),
)  # fmt: skip


@pytest.mark.parametrize("payload", PAYLOADS, ids=["its client's", "one of ours"])
@pytest.mark.parametrize("facts", FACTS, ids=["all", "least"])
def test_a_request_for_its_owner(facts: RequestFacts, payload: Payload) -> None:
    """It may go to that backend only, and its front began when the owner got it."""
    ticket = Ticket(1, payload, "my-id", AnswerBuffers())
    sent = forms.forwarded("rep-1", "gpu-7", facts, ticket, -1)
    sent = type(sent).FromString(sent.SerializeToString())
    got = forms.facts_of(sent)
    assert replace(got, trace=facts.trace) == replace(facts, only=("gpu-7",))
    assert got.trace.began_ns > 0
    assert forms.payload_of(sent) == payload
    assert (sent.member, sent.client_id, sent.is_carried) == ("rep-1", "my-id", False)


@pytest.mark.parametrize("settle", SETTLES, ids=lambda settle: settle.outcome.value)
def test_an_ending_for_the_client(settle: Settle) -> None:
    """The receiving replica knows what was asked for, and has its own number of the request."""
    facts = RequestFacts("sql", "acme", "batch", 2)
    sent = forms.ending(settle, HttpRejection(400, b"{}"), is_bystander=True)
    assert forms.settle_of(9, facts, "gpu-7", sent) == replace(settle, request=9, backend="gpu-7")
    assert forms.rejection_of(sent) == HttpRejection(400, b"{}")
    assert sent.is_bystander


def test_the_origin_of_an_answer() -> None:
    dispatch = Dispatch(7, 2, "gpu-1", "sql", "d", 8, 99, Cache.HOST, 1, 2, 3, "key", True, 4)
    assert forms.dispatch_of(9, forms.origin(dispatch)) == replace(dispatch, request=9, attempt=1)


@pytest.mark.parametrize("only", [(), ("gpu-1", "gpu-2")])
def test_a_request_for_no_one_backend_is_refused(only: tuple[str, ...]) -> None:
    """An owner would send it to any of its engines."""
    sent = forms.forwarded("rep-1", "gpu-1", FACTS[0], Ticket(1, PAYLOADS[0], "", AnswerBuffers()), -1)
    sent.facts = msgspec.msgpack.encode(replace(FACTS[0], only=only))
    with pytest.raises(ValueError, match=f"{len(only)} backends"):
        forms.facts_of(sent)


def test_what_is_none_is_refused() -> None:
    with pytest.raises(msgspec.MsgspecError):
        forms.dispatch_of(1, b"\xc1")
