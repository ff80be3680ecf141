"""Run a request on trtllm-serve: the body goes as the client sent it, with the adapter beside it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

from sidecar.backends.api import HttpForm, HttpRejection, Ticket
from sidecar.backends.openai.run import OpenAiRun
from sidecar.backends.quoting import wrote_in
from sidecar.backends.trtllm.api import Lora, fault_of
from sidecar.backends.trtllm.asking import LORA
from sidecar.backends.unseen import Follower
from sidecar.core.effects import Dispatch
from sidecar.core.enums import Fault
from sidecar.core.events import Event


class TrtllmRun(OpenAiRun):
    """A run. `lora` is the adapter, None for the base model. The server repeats the client's own name for the model."""

    def __init__(
        self,
        effect: Dispatch,
        ticket: Ticket,
        form: HttpForm,
        lora: Lora | None,
        post: Callable[[Event], None],
        heard: Callable[[int, int], None],
        broken: Callable[[str, bool], Awaitable[bool]],
        follower: Follower,
        failed: Callable[[Fault], None],
    ) -> None:
        super().__init__(effect, ticket, form, post, heard, broken, follower)
        self._lora = lora
        self._told = failed

    def _body(self) -> tuple[bytes, ...]:
        form = self._form
        before, model = form.before, json.dumps(form.model).encode()
        if self._lora is None:
            return before, model, form.after
        # First in the body: that a client sends none of its own was checked when the request came in.
        brace = before.index(b"{") + 1
        lora = b'"%b":%b,' % (LORA.encode(), json.dumps(self._lora.record).encode())
        return before[:brace] + lora + before[brace:], model, form.after

    def _rejection(self, status: int, body: bytes) -> HttpRejection:
        """Return the error without what was added to the request: a failed validation quotes all of it."""
        if self._lora is None:
            return HttpRejection(status, body)
        added = json.dumps(f"'{LORA}': {self._lora.record!r}, ", ensure_ascii=False)[1:-1].encode()
        body = body.replace(added, b"")
        tells = (str(self._lora.task_id).encode(), self._lora.path.encode(), f'"{LORA}"'.encode())
        if any(told in body for told in tells):
            text = "the engine refuses the request, and quotes it with what the sidecar added; see the sidecar's log"
            body = json.dumps({"object": "error", "message": text, "type": "BadRequestError", "code": status}).encode()
        return HttpRejection(status, body)

    def _fault(self, status: int, text: str) -> Fault:
        fault = fault_of(status, text, wrote_in(self._form))
        self._told(fault)
        return fault
