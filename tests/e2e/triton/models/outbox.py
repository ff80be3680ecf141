"""The thread that speaks to Triton: responses, questions whether a client has left, gauges.

Each of these waits for the server's process, a tenth of a millisecond or more, which must not hold up the engine. One
thread does them all, because a request may not be asked about once its last response has gone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from sidecar.lab.engine.kserve.datatypes import DATATYPES
from sidecar.lab.engine.kserve.inference import Answer
from sidecar.lab.engine.kserve.models import Model
from sidecar.lab.engine.kserve.outputs import Values

STOP_S = 5.0


class Reply:
    """The way back of one request. `cancelled` is called, once, when its client no longer wants an answer."""

    def __init__(self, sender: Any, outbox: Outbox) -> None:
        self._outbox = outbox
        self.sender = sender
        self.cancelled: Callable[[], object] | None = None

    async def emit(self, answer: Answer) -> None:
        """Send one response, soon."""
        self._outbox.post(partial(self._outbox.send, self, answer))

    def fail(self, text: str) -> None:
        """Send an error as the only response."""
        self._outbox.post(partial(self._outbox.send, self, Answer(None, text, final=True)))


class Outbox:
    """Does in its own thread, one after the other, what is posted."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._posted: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._open: dict[Reply, None] = {}
        self._thread = Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def open(self, request: Any) -> Reply:
        """Return the way back of a request."""
        reply = Reply(request.get_response_sender(), self)
        self.post(partial(self._open.setdefault, reply))
        return reply

    def post(self, act: Callable[[], Any]) -> None:
        """Have something done in the thread."""
        self._posted.put(act)

    def stop(self) -> None:
        """Do what was posted, then end; a server that is gone never answers, and is not waited for."""
        self._posted.put(None)
        self._thread.join(STOP_S)

    def send(self, reply: Reply, answer: Answer) -> None:
        """Send a response; after the final one the reply is closed."""
        final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if answer.final else 0
        if answer.final:
            self._open.pop(reply, None)
        if answer.error is not None:
            error = pb_utils.TritonError(answer.error, pb_utils.TritonError.INTERNAL)
            reply.sender.send(pb_utils.InferenceResponse(output_tensors=[], error=error), flags=final)
        elif answer.values is None:
            reply.sender.send(flags=final)
        else:
            tensors = [self._tensor(values) for values in answer.values]
            reply.sender.send(pb_utils.InferenceResponse(output_tensors=tensors), flags=final)

    def look_for_cancelled(self) -> None:
        """Tell the requests whose clients have left."""
        for reply in list(self._open):
            if reply.cancelled is not None and reply.sender.is_cancelled():
                reply.cancelled()
                reply.cancelled = None

    def _tensor(self, values: Values) -> Any:
        dtype = DATATYPES[self._model.outputs[values.name].datatype].numpy
        array = np.array(values.elements, np.object_ if dtype is None else dtype).reshape(values.shape)
        return pb_utils.Tensor(values.name, array)

    def _run(self) -> None:
        while (act := self._posted.get()) is not None:
            try:
                act()
            except Exception as error:  # noqa: BLE001 - one client's broken answer must not end those of the others
                pb_utils.Logger.log_error(f"a response of {self._model.name} could not be sent: {error}")
