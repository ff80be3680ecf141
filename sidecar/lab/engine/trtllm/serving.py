"""Generation over HTTP: from a body to sequences in the loop, and their tokens back.

A stream's status goes out before its adapter is read, so what the submit thread refuses breaks the stream: a completion
of main gets an event and the end mark, twice; all others lose their connection. A client that leaves is noticed at the
next of the looks that happen once a second; its sequences run until then.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from sidecar.lab.engine.http.json_text import DONE
from sidecar.lab.engine.http.leaving import LEFT, Streamed, unless_left
from sidecar.lab.engine.http.template import ASSISTANT, conversation
from sidecar.lab.engine.http.text import Stops
from sidecar.lab.engine.http.work import Token
from sidecar.lab.engine.kserve.generation import Generation, LoraTensors
from sidecar.lab.engine.kserve.work import Progress
from sidecar.lab.engine.trtllm.adapters import Adapters
from sidecar.lab.engine.trtllm.bodies import Bodies, ChatBodies, CompletionBodies, Form
from sidecar.lab.engine.trtllm.checkpoint import Adapter, LoadError
from sidecar.lab.engine.trtllm.driver import TorchDriver
from sidecar.lab.engine.trtllm.errors import RequestError, ServerFault, error_event, errors_of, flat, invalid
from sidecar.lab.engine.trtllm.fields import CHECK_PATH, ChatFields, CompletionFields, LoraRequest, Sampling
from sidecar.lab.engine.trtllm.options import TrtllmOptions
from sidecar.lab.engine.trtllm.request import Question, chat_of, check_submit, completion_of
from sidecar.lab.engine.trtllm.work import TorchWork

LOOK_S = 1.0
"""How often the server looks whether a client is still there."""

Fields = TypeVar("Fields", bound=Sampling)


class Invalid(Exception):
    """A body that is refused; the response says so."""

    def __init__(self, response: Response) -> None:
        super().__init__()
        self.response = response


class Serving:
    """Answers generation requests with one engine. `die` ends the server at once."""

    def __init__(
        self, driver: TorchDriver, adapters: Adapters, options: TrtllmOptions, die: Callable[[str], None]
    ) -> None:
        self._driver = driver
        self._adapters = adapters
        self._options = options
        self._die = die
        self._spec = driver.engine.spec
        self._numbers = itertools.count(1)
        self._submitting = asyncio.Lock()

    async def complete(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        try:
            fields = self._fields(CompletionFields, await request.body())
            asked = completion_of(fields, self._spec)
        except Invalid as error:
            return error.response
        except RequestError as error:
            return flat(str(error))
        bodies = CompletionBodies(self._form(fields, ASSISTANT, fields.detokenize))
        return await self._answer(request, fields, asked, bodies)

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        try:
            fields = self._fields(ChatFields, await request.body())
            asked = chat_of(fields, self._spec)
        except Invalid as error:
            return error.response
        except RequestError as error:
            return flat(str(error))
        role = ASSISTANT if fields.add_generation_prompt or not fields.messages else fields.messages[-1].role
        return await self._answer(request, fields, asked, ChatBodies(self._form(fields, role, True)))

    async def try_base(self) -> tuple[int, str]:
        """Return the status and the text of `/health_generate`, which generates one token."""
        form = self._form(ChatFields(model=self._options.model_name, messages=[]), ASSISTANT, True)
        prompt = conversation([("user", "hi")])
        asked = Question((prompt,), 1, 1, Stops(), {}, ("",))
        try:
            await self._whole(asked, None, ChatBodies(form), time.monotonic())
        except RequestError:
            return 500, "Generation health check failed"
        return 200, "Generation health check OK"

    def _fields(self, kind: type[Fields], body: bytes) -> Fields:
        """Return the fields of a body. Raises Invalid, and ServerFault for a body that is no object."""
        try:
            content = json.loads(body) if body else None
        except json.JSONDecodeError as error:
            shown = {"type": "json_invalid", "loc": ("body", error.pos), "msg": "JSON decode error", "input": {}}
            raise Invalid(invalid([shown | {"ctx": {"error": error.msg}}], self._options)) from error
        except (UnicodeDecodeError, RecursionError) as error:
            raise Invalid(flat("There was an error parsing the body")) from error
        if content is None:
            missing = {"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}
            raise Invalid(invalid([missing], self._options))
        if not isinstance(content, dict):
            raise ServerFault
        try:
            return kind.model_validate(content, context={CHECK_PATH: not self._options.late_path_check})
        except ValidationError as error:
            raise Invalid(invalid(errors_of(error), self._options)) from error

    def _form(self, fields: Sampling, role: str, detokenizes: bool) -> Form:
        usage = fields.stream_options
        shows_usage = bool(usage and usage.include_usage)
        # In the files of 2025 the counts come with each event unless they are declined.
        is_given = usage is not None and "continuous_usage_stats" in usage.model_fields_set
        is_continuous = usage is not None and (usage.continuous_usage_stats if is_given else not self._options.is_main)
        return Form(
            model=fields.model,
            server_model=self._options.model_name,
            role=role,
            n=fields.n,
            detokenizes=detokenizes,
            shows_usage=shows_usage,
            shows_usage_always=shows_usage and bool(is_continuous),
            numbers_ids=self._options.is_main,
        )

    async def _answer(self, request: Request, fields: Sampling, asked: Question, bodies: Bodies) -> Response:
        if self._driver.is_dead and self._options.dead_text is not None:
            return flat(self._options.dead_text)
        looked_s = time.monotonic()
        if fields.stream:
            stream = self._stream(asked, fields.lora_request, bodies, looked_s)
            return Streamed(stream, media_type="text/event-stream")
        try:
            whole = self._whole(asked, fields.lora_request, bodies, looked_s)
            return await unless_left(request.receive, whole) or LEFT
        except RequestError as error:
            return flat(str(error))

    async def _whole(self, asked: Question, lora: LoraRequest | None, bodies: Bodies, looked_s: float) -> Response:
        last: dict[int, Token] = {}
        works: list[TorchWork] = []
        async with aclosing(self._tokens(asked, lora, works, looked_s)) as tokens:
            async for token in tokens:
                last[token.place] = token
        return Response(bodies.whole(works, last, asked.echoes), media_type="application/json")

    async def _stream(
        self, asked: Question, lora: LoraRequest | None, bodies: Bodies, looked_s: float
    ) -> AsyncGenerator[bytes]:
        try:
            async with aclosing(self._events(asked, lora, bodies, looked_s)) as events:
                async for each in events:
                    yield each
        except RequestError as error:
            if not self._options.is_main or not isinstance(bodies, CompletionBodies):
                raise
            yield error_event(str(error))
            yield DONE
        yield DONE

    async def _events(
        self, asked: Question, lora: LoraRequest | None, bodies: Bodies, looked_s: float
    ) -> AsyncGenerator[bytes]:
        works: list[TorchWork] = []
        begun: set[int] = set()
        async with aclosing(self._tokens(asked, lora, works, looked_s)) as tokens:
            async for token in tokens:
                if not begun:
                    bodies.begin(works)
                row = token.work.batch_row
                token.sequence.sent += 1
                for each in bodies.events(token, row not in begun, asked.echoes[row]):
                    yield each
                begun.add(row)
                of_prompt = [work for work in works if work.batch_row == row]
                if bodies.form.shows_usage and all(work.ended and work.sent == len(work.tokens) for work in of_prompt):
                    yield bodies.usage_event(of_prompt)

    async def _tokens(
        self, asked: Question, lora: LoraRequest | None, works: list[TorchWork], looked_s: float
    ) -> AsyncGenerator[Token]:
        """Submit the sequences, which are added to `works`, and yield their tokens until all have ended.

        Raises RequestError. Closing this cancels the sequences at the next look.
        """
        progress: asyncio.Queue[Progress] = asyncio.Queue()
        try:
            for row, prompt in enumerate(asked.prompts):
                works += await self._submit(asked, row, prompt, lora, progress.put_nowait)
            left = len(works)
            while left:
                token = await progress.get()
                if token.error is not None:
                    raise RequestError(token.error)
                if isinstance(token, Token):
                    left -= token.final
                    yield token
                else:
                    left -= 1
        finally:
            self._leave([work.request_id for work in works if not work.ended], looked_s)

    def _leave(self, request_ids: Sequence[int], looked_s: float) -> None:
        """Cancel sequences when the server next looks whether their client is there."""
        if request_ids:
            wait_s = LOOK_S - (time.monotonic() - looked_s) % LOOK_S
            asyncio.get_running_loop().call_later(wait_s, self._driver.cancel, request_ids)

    async def _submit(
        self,
        asked: Question,
        row: int,
        prompt: list[int],
        lora: LoraRequest | None,
        sink: Callable[[Progress], None],
    ) -> list[TorchWork]:
        """Hand a prompt's sequences to the loop, as the submit thread does: one request after the other."""
        async with self._submitting:
            is_new = lora is not None and str(lora.lora_int_id) not in self._adapters.submitted
            adapter = await self._adapter(lora)
            limit = check_submit(prompt, asked.max_tokens, self._spec)
            works = [
                self._work(asked, row, place, prompt, limit, lora, adapter, sink)
                for place in range(row * asked.n, (row + 1) * asked.n)
            ]
            works[0].brings_weights = is_new and adapter is not None
        for work in works:
            await self._driver.submit(work)
        return works

    async def _adapter(self, lora: LoraRequest | None) -> Adapter | None:
        """Return the submit thread's copy of a request's adapter; None without one, and whenever LoRA is off."""
        if lora is None or not self._spec.lora_modules:
            return None
        try:
            return await self._adapters.submit(lora)
        except LoadError as error:
            if not self._options.is_main:
                await self._end(str(error))
            raise RequestError(f"Failed to load LoRA adapter: {error}") from error

    async def _end(self, text: str) -> NoReturn:
        """End the worker, and with it the server: before TL#13517 no load may fail."""
        self._die(text)
        await asyncio.Event().wait()
        raise AssertionError

    def _work(
        self,
        asked: Question,
        row: int,
        place: int,
        prompt: list[int],
        limit: int,
        lora: LoraRequest | None,
        adapter: Adapter | None,
        sink: Callable[[Progress], None],
    ) -> TorchWork:
        number = next(self._numbers)
        tensors = None if lora is None or adapter is None else LoraTensors(lora.lora_int_id, None, None)
        parameters: dict[str, Any] = {}
        if lora is not None:
            parameters = {"lora_name": lora.lora_name, "lora_path": lora.lora_path}
        return TorchWork(
            request_id=number,
            triton_id=str(number),
            model=self._options.model_name,
            generation=Generation(prompt, limit, asked.stops.end_id, tensors),
            parameters=parameters,
            sink=sink,
            batch_row=row,
            stops=asked.stops,
            bias=asked.bias,
            place=place,
            adapter=adapter,
            path="" if lora is None else lora.lora_path,
            sends=adapter is not None and not self._options.is_main and not self._is_cached(lora),
        )

    def _is_cached(self, lora: LoraRequest | None) -> bool:
        return lora is not None and self._driver.has_adapter(lora.lora_int_id)
