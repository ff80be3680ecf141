"""How a request names its adapter to an engine, and how a client, who knows its own name alone, sees the answer."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from typing import Any, Protocol

from sidecar.backends.api import HttpForm, HttpRejection


class Naming(Protocol):
    """Writes the adapter into one request, and takes what was written out of its answer."""

    form: HttpForm
    run_id: str
    """By which the engine can be told to end the request; "" if it cannot."""

    def body(self) -> tuple[bytes, ...]:
        """Return the parts of the body to send."""

    def shown(self, answer: bytes) -> bytes:
        """Return an event or a whole answer as the client gets it."""

    def rejection(self, status: int, body: bytes) -> HttpRejection:
        """Return an error of the engine's as the client gets it."""


class AsModel:
    """The engine knows the adapter, or its base model, as a model by this name. Errors are shown without `hidden`.

    With an `id_member` the request has an id of its own there.
    """

    def __init__(self, form: HttpForm, name: str, hidden: re.Pattern[bytes] | None = None, id_member: str = "") -> None:
        self.form = form
        self.run_id = uuid.uuid4().hex if id_member else ""
        self._id_member = id_member
        self._hidden = hidden
        self._name = name
        self._fields = _named(name), _named(form.model)
        self._spaced = _named(name, b" "), _named(form.model, b" ")

    def body(self) -> tuple[bytes, ...]:
        before = _with_member(self.form.before, self._id_member, self.run_id) if self.run_id else self.form.before
        return before, json.dumps(self._name).encode(), self.form.after

    def shown(self, answer: bytes) -> bytes:
        shown = answer.replace(*self._fields, 1)
        return answer.replace(*self._spaced, 1) if shown is answer else shown

    def rejection(self, status: int, body: bytes) -> HttpRejection:
        told = body if self._hidden is None else self._hidden.sub(b"", body)
        return HttpRejection(status, told.replace(self._name.encode(), self.form.model.encode()))


def _named(model: str, space: bytes = b"") -> bytes:
    """Return the field with the answering model's name, as servers write it; some with a space in between."""
    return b'"model":' + space + json.dumps(model, ensure_ascii=False).encode()


def _with_member(body: bytes, member: str, value: Any) -> bytes:
    """Return a body with one more member, the first: that a client sends none of its own was checked before."""
    brace = body.index(b"{") + 1
    return body[:brace] + b'"%b":%b,' % (member.encode(), json.dumps(value).encode()) + body[brace:]


@dataclass(frozen=True)
class Lora:
    """An adapter as a request carries it: the id by which the engine knows it for ever, and its folder there."""

    name: str
    task_id: int
    path: str

    @property
    def record(self) -> dict[str, Any]:
        return {"lora_name": self.name, "lora_int_id": self.task_id, "lora_path": self.path}


class InBody:
    """The request carries the adapter in a member of its own; the server repeats the client's name for the model.

    Without an adapter the request is for the base model.
    """

    def __init__(self, form: HttpForm, member: str, lora: Lora | None) -> None:
        self.form = form
        self.run_id = ""
        self._member = member
        self._lora = lora

    def body(self) -> tuple[bytes, ...]:
        before, model = self.form.before, json.dumps(self.form.model).encode()
        if self._lora is None:
            return before, model, self.form.after
        return _with_member(before, self._member, self._lora.record), model, self.form.after

    def shown(self, answer: bytes) -> bytes:
        return answer

    def rejection(self, status: int, body: bytes) -> HttpRejection:
        """Return the error without what was added to the request: a failed validation quotes all of it."""
        if self._lora is None:
            return HttpRejection(status, body)
        added = json.dumps(f"'{self._member}': {self._lora.record!r}, ", ensure_ascii=False)[1:-1].encode()
        body = body.replace(added, b"")
        tells = (str(self._lora.task_id).encode(), self._lora.path.encode(), f'"{self._member}"'.encode())
        if any(told in body for told in tells):
            text = "the engine refuses the request, and quotes it with what the sidecar added; see the sidecar's log"
            body = json.dumps({"object": "error", "message": text, "type": "BadRequestError", "code": status}).encode()
        return HttpRejection(status, body)
