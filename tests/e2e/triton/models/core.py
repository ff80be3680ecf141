"""The model `tensorrt_llm`: Triton's requests go to the emulated engine, its answers come back by response senders.

Triton calls `execute` from one thread and its answers are never waited for there: the engine runs in an event loop of
its own, so any number of requests is in it at a time, decoupled or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sidecar.lab.engine.kserve.models import CORE, Model, models_of
from tests.e2e.triton.models.engine import EngineThread
from tests.e2e.triton.models.gauges import Gauges
from tests.e2e.triton.models.outbox import Outbox
from tests.e2e.triton.models.requests import UnreadableInput, query_of
from tests.e2e.triton.models.settings import Settings


class TritonPythonModel:
    """One instance of the model: an engine with caches of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Build the engine and start its threads."""
        options = Settings.read(args).engine_options()
        name = args["model_name"]
        self._model = served_as(models_of(options)[CORE], name)
        self._outbox = Outbox(self._model)
        number = int(args["model_instance_name"].rsplit("_", 1)[1])
        self._engine = EngineThread(options, number, self._outbox, Gauges(name, args["model_version"]))

    def execute(self, requests: Sequence[Any]) -> None:
        """Hand the requests to the engine."""
        for request in requests:
            reply = self._outbox.open(request)
            try:
                query = query_of(request, self._model)
            except UnreadableInput as unreadable:
                reply.fail(str(unreadable))
            else:
                self._engine.answer(query, reply)

    def finalize(self) -> None:
        """End the threads; what still runs is cancelled."""
        self._engine.stop()
        self._outbox.stop()


def served_as(model: Model, name: str) -> Model:
    """Return the model under the name that the repository gives it."""
    return replace(model, name=name)
