"""gRPC's messages in a body that comes in any pieces, and a status in its trailers."""

from __future__ import annotations

import itertools
from urllib.parse import unquote

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.backends.triton.framing import Compressed, Frames, framed, status_in
from sidecar.fronts.extproc.heads import escaped

MESSAGES = st.lists(st.binary(max_size=40), max_size=8)
CUTS = st.lists(st.integers(0, 400), max_size=12)


@given(MESSAGES, CUTS)
def test_messages_come_out_as_they_went_in_however_they_are_cut(messages: list[bytes], cuts: list[int]) -> None:
    body = b"".join(map(framed, messages))
    places = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    frames, found = Frames(), []
    for begin, end in itertools.pairwise(places):
        found += frames.take(body[begin:end])
    assert found == messages
    assert frames.size_bytes == 0


def test_a_message_that_is_compressed_is_refused() -> None:
    with pytest.raises(Compressed):
        Frames().take(b"\x01\x00\x00\x00\x01x")


@given(st.text(max_size=60))
def test_a_text_comes_back_from_trailers(text: str) -> None:
    """Only printable ASCII is in them, as gRPC's protocol has it, and no percent sign but before two digits."""
    told = escaped(text)
    assert all(0x20 <= byte <= 0x7E for byte in told)
    assert unquote(told.decode()) == text
    headers = {"grpc-status": "5", "grpc-message": told.decode()}
    assert status_in(headers) == (grpc.StatusCode.NOT_FOUND, text)


def test_a_status_that_nobody_knows_is_unknown_and_none_is_none() -> None:
    assert status_in({"grpc-status": "77"}) == (grpc.StatusCode.UNKNOWN, "")
    assert status_in({"grpc-status": "x"}) == (None, "")
    assert status_in({}) == (None, "")
