"""Clients' streams that outlive a drain or grow old: each is closed with a clear status, and no request is lost."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from sidecar.core.effects import Settle
from sidecar.core.enums import Outcome
from sidecar.fronts.status import PUSHBACK
from tests.kit.cases import first
from tests.kit.emulated import channel_to, core_request, is_final, running_engine, tokens_of
from tests.kit.forked import python
from tests.kit.kserve_clients import (
    CORE,
    DUMMY,
    GRPCS_OWN,
    OpenStream,
    aio_client,
    in_thread,
    inputs_of,
    stop_inputs,
    sync_stream,
)
from tests.kit.kserve_clients import tokens_of as tokens_in
from tests.kit.serving import PATIENCE_S, Serving, serving, until, write_adapters

END: Any = grpc.aio.EOF
SLOW = DUMMY | {"time_scale": 0.3}
"""Some milliseconds a token: a long answer is still running when the test goes on."""
LONG = 300


class Stream:
    """One raw stream: what came by request id, and the status that it ended with."""

    def __init__(self, stub: Any) -> None:
        self.call = stub.ModelStreamInfer()
        self.messages: dict[str, list[Any]] = {}
        self.errors: dict[str, str] = {}
        self.reading = asyncio.create_task(self._read())

    async def _read(self) -> grpc.aio.AioRpcError | None:
        try:
            while (message := await self.call.read()) is not END:
                request_id = message.infer_response.id
                if message.error_message:
                    self.errors[request_id] = message.error_message
                else:
                    self.messages.setdefault(request_id, []).append(message)
        except grpc.aio.AioRpcError as error:
            return error
        return None

    async def send(self, request_id: str, tokens: int = 4) -> bool:
        """Send a request for a00; False when the stream has ended."""
        try:
            await self.call.write(core_request(tokens=tokens, streaming=True, lora_name="a00", request_id=request_id))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return False
        return True

    def is_answered(self, request_id: str) -> bool:
        return request_id in self.messages and is_final(self.messages[request_id][-1])

    @property
    def ended(self) -> int:
        """How many requests have their answer or their error."""
        return sum(map(self.is_answered, self.messages)) + len(self.errors)

    def tokens(self, request_id: str) -> list[int]:
        return tokens_of(self.messages[request_id])

    async def answer(self, request_id: str) -> None:
        await until(lambda: self.is_answered(request_id) or request_id in self.errors)

    async def until_ended(self, count: int) -> None:
        """Wait until so many requests have ended, or the stream has."""
        await until(lambda: self.reading.done() or self.ended >= count)

    async def end(self) -> grpc.aio.AioRpcError | None:
        async with asyncio.timeout(PATIENCE_S):
            return await self.reading


def check_draining(error: grpc.aio.AioRpcError | None, words: str, retry_ms: int) -> None:
    """The status of a stream that was closed: UNAVAILABLE, ErrorInfo, RetryInfo and the pushback."""
    assert error is not None
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert words in error.details()
    assert "did not run" in error.details()
    status = rpc_status.from_call(error)
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(retry)
    assert (info.reason, info.domain) == ("DRAINING", "lora-sidecar")
    assert retry.retry_delay.ToMilliseconds() == retry_ms
    assert dict(error.trailing_metadata())[PUSHBACK] == str(retry_ms)


def aged(age_s: float) -> dict[str, Any]:
    """Return listeners whose streams may be that old."""
    free = {"address": "127.0.0.1:0"}
    return {"data": free | {"max_connection_age_s": age_s}, "admin": free, "http": free}


async def test_a_drain_closes_idle_streams(tmp_path: Path) -> None:
    """One that had an answer, one that never had a request, and one that opens while the sidecar drains."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**SLOW) as engine,
        serving([engine], tmp_path) as served,
        channel_to(served.sidecar.data_address) as stub,
    ):
        used, unused, busy = (Stream(stub) for _ in range(3))
        await used.send("1")
        await used.answer("1")
        await unused.call.wait_for_connection()
        await until(lambda: count_open(served) == 3)
        await busy.send("long", LONG)
        await until(lambda: "long" in busy.messages)
        draining = asyncio.create_task(served.sidecar.drain())
        for stream in (used, unused):
            check_draining(await stream.end(), "the sidecar is shutting down", 1000)
        late = Stream(stub)
        check_draining(await late.end(), "the sidecar is shutting down", 1000)
        assert not draining.done()
        await draining
        check_draining(await busy.end(), "the sidecar is shutting down", 1000)
        assert (busy.tokens("long"), count_open(served)) == (served.expected("a00", LONG), 0)


def count_open(served: Serving) -> int:
    streams = served.sidecar.listening.streams
    assert streams is not None
    return len(streams)


async def test_a_drain_lets_what_runs_on_a_stream_finish(tmp_path: Path) -> None:
    """What arrives meanwhile is refused under its own id; a stop still works; then the stream is closed."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**SLOW) as engine,
        serving([engine], tmp_path) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        stream = OpenStream(client)
        stream.send("a00", "long", LONG)
        stream.send("a00", "stopped", 3 * LONG)
        seen = {(await stream.take())[0].id}
        while len(seen) < 2:
            seen.add((await stream.take())[0].id)
        draining = asyncio.create_task(served.sidecar.drain())
        await until(lambda: served.state.draining)
        stream.send("a00", "late")
        stream.stop("stopped")
        responses, errors, error = await all_that_is_left(stream)
        finals = sum(response.parameters["triton_final_response"].bool_param for response in responses)
        check_draining(error, "the sidecar is shutting down: open a stream to another replica", 1000)
        assert errors == ["[DRAINING] the sidecar is shutting down; send the request to another replica"]
        assert finals == 3  # the long one, the stopped one, and the stop's own answer
        await draining
        outcomes = [settle.outcome for settle in served.recorder.of(Settle)]
        assert sorted(outcome.value for outcome in outcomes) == ["cancelled", "ok", "refused"]


async def all_that_is_left(stream: OpenStream) -> tuple[list[Any], list[str], grpc.aio.AioRpcError]:
    """Take answers and errors until the stream is closed, and return them with its status."""
    responses, errors = [], []
    try:
        while True:
            response, error = await stream.take()
            if error is not None:
                errors.append(error)
            else:
                responses.append(response)
    except grpc.aio.AioRpcError as ended:
        return responses, errors, ended


async def test_a_client_that_closed_its_side_ends_well_in_a_drain(tmp_path: Path) -> None:
    """All its requests are answered, and the trailing metadata tell the origin as ever."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**SLOW) as engine,
        serving([engine], tmp_path) as served,
        channel_to(served.sidecar.data_address) as stub,
    ):
        stream = Stream(stub)
        await stream.send("long", LONG)
        await stream.call.done_writing()
        await until(lambda: "long" in stream.messages)
        await served.sidecar.drain()
        assert await stream.end() is None
        assert stream.tokens("long") == served.expected("a00", LONG)
        assert dict(await stream.call.trailing_metadata())["lora-version"] == "a00@v1"


async def test_a_client_that_wants_grpc_errors_is_closed_alike(tmp_path: Path) -> None:
    """With `triton_grpc_error` an idle stream ends with the same status."""
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path) as served,
        channel_to(served.sidecar.data_address) as stub,
    ):
        call = stub.ModelStreamInfer(metadata=(("triton_grpc_error", "true"),))
        await call.wait_for_connection()
        await until(lambda: count_open(served) == 1)
        await served.sidecar.drain()
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await call.read()
        check_draining(ended.value, "the sidecar is shutting down", 1000)


async def test_the_threaded_client_is_told_by_its_callback(tmp_path: Path) -> None:
    """The callback of an unmodified program gets the status as its error; a new stream is the way out."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path, listeners=aged(0.2)) as served,
    ):

        def program() -> tuple[str, Any]:
            with sync_stream(served.sidecar.data_address) as (client, answers):
                _, told = answers.get(timeout=PATIENCE_S)
                error = told
                while error is not None:  # a new stream may be too old, too, before it is used
                    client.stop_stream()
                    client.start_stream(lambda result, error: answers.put((result, error)))
                    with suppress(InferenceServerException):
                        client.async_stream_infer(CORE, inputs_of(CORE), parameters={"lora_name": "a00"})
                    result, error = answers.get(timeout=PATIENCE_S)
                return str(told), result.get_response()

        error, first = await in_thread(program)
        assert error.startswith("[StatusCode.UNAVAILABLE] the stream is more than 0.")
        assert tokens_in(first) == served.expected("a00", 1)


@pytest.mark.parametrize("round_number", [0, *(pytest.param(more, marks=pytest.mark.slow) for more in (1, 2))])
async def test_requests_that_meet_a_drain_are_answered_or_told(tmp_path: Path, round_number: int) -> None:
    """Twenty streams send while the drain begins: what has no answer has an error, or its stream ended as draining."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path) as served,
        channel_to(served.sidecar.data_address) as stub,
    ):
        streams = [Stream(stub) for _ in range(20)]

        async def send_on(stream: Stream) -> list[str]:
            """Send until a request is refused, four at a time; return the ids that were sent."""
            sent = ["0"]
            while not stream.errors and await stream.send(sent[-1]):
                await stream.until_ended(len(sent) - 3)
                sent.append(str(len(sent)))
            return sent

        sending = [asyncio.create_task(send_on(stream)) for stream in streams]
        await until(lambda: sum(stream.ended for stream in streams) >= 40 * round_number)
        await served.sidecar.drain()
        answered = 0
        for stream, sent in zip(streams, await asyncio.gather(*sending), strict=True):
            error = await stream.end()
            if error is not None and error.details().startswith(GRPCS_OWN):
                continue  # it wrote in the very moment of the close
            check_draining(error, "the sidecar is shutting down", 1000)
            for request_id in sent:
                if request_id in stream.messages:
                    assert stream.tokens(request_id)[:4] == served.expected("a00", 4)
                    assert is_final(stream.messages[request_id][-1])
                    answered += 1
                if request_id in stream.errors:
                    assert stream.errors[request_id].startswith("[DRAINING] ")
        ran = [settle for settle in served.recorder.of(Settle) if settle.outcome is Outcome.OK]
        assert len(ran) >= answered >= 20 * round_number


async def test_an_idle_stream_is_closed_at_its_age(tmp_path: Path) -> None:
    """The status says to open a new one, now."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path, listeners=aged(0.1)) as served,
        channel_to(served.sidecar.data_address) as stub,
    ):
        check_draining(await Stream(stub).end(), "open a new one now", 0)


async def test_an_old_stream_ends_with_its_last_answer(tmp_path: Path) -> None:
    """An answer that takes many times the age comes whole; what is sent to the old stream meanwhile is answered, or
    told that it is too late."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**SLOW) as engine,
        serving([engine], tmp_path, listeners=aged(0.05)) as served,
        channel_to(served.sidecar.data_address) as stub,
    ):
        stream = Stream(stub)
        await stream.send("long", LONG)
        number = 0
        while not stream.errors:
            await stream.send(str(number))
            await stream.answer(str(number))
            number += 1
        check_draining(await stream.end(), "open a new one now", 0)
        assert stream.tokens("long") == served.expected("a00", LONG)
        assert stream.errors[str(number - 1)].startswith("[DRAINING] the stream is more than 0.")
        assert all(stream.tokens(str(each)) == served.expected("a00", 4) for each in range(number - 1))


class Persistent:
    """A client with so many requests to make: some at once on one stream, and what has no answer again on the next.

    One that is told of the close in grpc.aio's own words gets nothing of what it had still to read: `unread` are the
    requests whose answers the library so threw away.
    """

    def __init__(self, stub: Any, name: str, requests: int, at_once: int) -> None:
        self._stub = stub
        self._at_once = at_once
        self._left = {f"{name}-{number}" for number in range(requests)}
        self.answers: dict[str, list[list[int]]] = {}
        self.unread: list[str] = []
        self.streams = 0

    async def run(self) -> None:
        while self._left:
            self.streams += 1
            stream = Stream(self._stub)
            asked = await self._use(stream)
            error = await stream.end()
            if error is not None and error.details().startswith(GRPCS_OWN):
                self.unread += [request_id for request_id in asked if not stream.is_answered(request_id)]
            elif error is not None:
                check_draining(error, "open a new one now", 0)
                assert all(stream.is_answered(request_id) for request_id in stream.messages)
            for request_id in filter(stream.is_answered, asked):
                self._left.discard(request_id)
                self.answers.setdefault(request_id, []).append(stream.tokens(request_id))

    async def _use(self, stream: Stream) -> list[str]:
        """Ask on a stream until it takes no more, or nothing is left to ask; return what was asked."""
        asked: list[str] = []
        todo = sorted(self._left)
        while todo and not stream.errors and not stream.reading.done():
            sent, todo = todo[: self._at_once], todo[self._at_once :]
            asked += [request_id for request_id in sent if await stream.send(request_id)]
            await stream.until_ended(len(asked))
        if not stream.errors and not stream.reading.done():
            await stream.call.done_writing()
        return asked


@pytest.mark.parametrize("at_once", first(1, [4, 1]))
@pytest.mark.parametrize(("clients", "each"), [(10, 30), pytest.param(20, 60, marks=pytest.mark.slow)])
async def test_streams_that_grow_old_under_load_lose_and_double_nothing(
    tmp_path: Path, clients: int, each: int, at_once: int
) -> None:
    """Many clients ask many things each on streams that live a tenth of a second: each has one answer, in full,
    and the engine ran each once."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path, listeners=aged(0.1)) as served,
        channel_to(served.sidecar.data_address) as stub,
    ):
        asking = [Persistent(stub, str(number), each, at_once) for number in range(clients)]
        await asyncio.gather(*(client.run() for client in asking))
        for client in asking:
            assert len(client.answers) == each
            assert all(answers == [served.expected("a00", 4)] for answers in client.answers.values())
        assert max(client.streams for client in asking) > 1
        ran = [settle for settle in served.recorder.of(Settle) if settle.outcome is Outcome.OK]
        assert clients * each <= len(ran) <= clients * each + sum(len(client.unread) for client in asking)


async def test_a_client_that_ignores_refusals_does_not_hold_a_drain_up(tmp_path: Path) -> None:
    """It sends on and on; its stream is closed after a while, and the drain ends."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path) as served,
        channel_to(served.sidecar.data_address) as stub,
    ):
        stream = Stream(stub)

        async def send_on() -> None:
            number = 0
            while await stream.send(str(number)):
                await stream.until_ended(number - 3)
                number += 1

        sending = asyncio.create_task(send_on())
        await until(lambda: stream.ended > 0)
        await served.sidecar.drain()
        assert count_open(served) == 0
        await sending
        assert await stream.end() is not None
        assert all(error.startswith("[DRAINING]") for error in stream.errors.values())


async def test_idle_connections_are_told_to_go(tmp_path: Path) -> None:
    """gRPC's own GOAWAY: a channel without a call falls idle by itself, and its next call finds a new connection."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path, listeners=aged(0.3)) as served,
        grpc.aio.insecure_channel(served.sidecar.data_address) as channel,
    ):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        stream = Stream(stub)
        await stream.send("1")
        await stream.answer("1")
        await stream.end()
        await state_of(channel, lambda state: state is grpc.ChannelConnectivity.IDLE)
        again = Stream(stub)
        await again.send("2")
        await again.answer("2")
        assert again.tokens("2") == served.expected("a00", 4)


async def state_of(channel: grpc.aio.Channel, holds: Callable[[Any], bool]) -> None:
    """Wait until a channel is in some state, without waking it."""
    async with asyncio.timeout(PATIENCE_S):
        while not holds(state := channel.get_state()):
            await channel.wait_for_state_change(state)


async def test_an_answer_longer_than_the_age_is_never_cut(tmp_path: Path) -> None:
    """GOAWAY leaves what runs alone: Generate and a unary stop, too."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**SLOW) as engine,
        serving([engine], tmp_path, listeners=aged(0.05)) as served,
    ):
        calls: list[Awaitable[Any]] = [served.ask("a00", LONG) for _ in range(4)]
        for answer in await asyncio.gather(*calls):
            assert answer.tokens == served.expected("a00", LONG)


async def test_a_stop_reaches_a_stream_past_its_age(tmp_path: Path) -> None:
    """A stream that refuses new requests still takes the stop of one that runs."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**SLOW) as engine,
        serving([engine], tmp_path, listeners=aged(0.05)) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        stream = OpenStream(client)
        stream.send("a00", "long", 100 * LONG // 8)
        error = None
        while error is None:
            stream.send("a00", "late", inputs=stop_inputs()[:3])
            while True:
                response, error = await stream.take()
                if error is not None or (response.id == "late" and response.parameters["triton_final_response"]):
                    break
        assert error.startswith("[DRAINING] the stream is more than")
        stream.stop("long")
        _, _, ending = await all_that_is_left(stream)
        check_draining(ending, "open a new one now", 0)
        assert "cancelled" in [settle.outcome.value for settle in served.recorder.of(Settle)]


async def test_sigterm_tells_idle_streams(tmp_path: Path) -> None:
    """The status leaves the process before it ends."""
    async with running_engine(**DUMMY) as engine:
        free = [f"{option}=127.0.0.1:0" for option in ("--listen", "--admin", "--http")]
        process = await python(
            "-m", "sidecar", "serve", "--json", *free, "--backend", f"triton://{engine.grpc_address}",
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            ready = json.loads(await process.stdout.readline())
            async with channel_to(ready["data"]) as stub:
                streams = [Stream(stub) for _ in range(20)]
                assert (await stub.ServerLive(service_pb2.ServerLiveRequest())).live
                await asyncio.gather(*(stream.call.wait_for_connection() for stream in streams))
                process.send_signal(signal.SIGTERM)
                for stream in streams:
                    check_draining(await stream.end(), "the sidecar is shutting down", 1000)
            assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            process.close()
