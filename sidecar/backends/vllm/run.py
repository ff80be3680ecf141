"""Run a request on a vLLM engine, which knows the adapter as a model by a name of its own."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

from sidecar.backends.api import HttpForm, HttpRejection, Ticket
from sidecar.backends.openai.run import OpenAiRun
from sidecar.backends.quoting import wrote_in
from sidecar.backends.unseen import Follower
from sidecar.backends.vllm.api import fault_of
from sidecar.core.effects import Dispatch
from sidecar.core.enums import Fault
from sidecar.core.events import Event


class VllmRun(OpenAiRun):
    """A run. `name` is the engine's name for the model; the client sees its own."""

    def __init__(
        self,
        effect: Dispatch,
        ticket: Ticket,
        form: HttpForm,
        name: str,
        post: Callable[[Event], None],
        heard: Callable[[int, int], None],
        broken: Callable[[str, bool], Awaitable[bool]],
        follower: Follower,
    ) -> None:
        super().__init__(effect, ticket, form, post, heard, broken, follower)
        self._name = name
        self._model_fields = _named(name), _named(form.model)

    def _body(self) -> tuple[bytes, ...]:
        return self._form.before, json.dumps(self._name).encode(), self._form.after

    def _shown(self, answer: bytes) -> bytes:
        return answer.replace(*self._model_fields, 1)

    def _rejection(self, status: int, body: bytes) -> HttpRejection:
        return HttpRejection(status, body.replace(self._name.encode(), self._form.model.encode()))

    def _fault(self, status: int, text: str) -> Fault:
        return fault_of(status, text, wrote_in(self._form))


def _named(model: str) -> bytes:
    """Return the field with the answering model's name, as vLLM writes it."""
    return b'"model":' + json.dumps(model, ensure_ascii=False).encode()
