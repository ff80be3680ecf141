"""A server that speaks vLLM's API and calls adapters otherwise."""

from dataclasses import replace
from typing import ClassVar

from sidecar.backends.openai.vllm import MODEL, Vllm, VllmEntry


class AcmeEntry(VllmEntry):
    SCHEMES: ClassVar = {"acme": False, "acmes": True}


class Acme(Vllm):
    model = replace(MODEL, name="acme", title="Acme")
    section = AcmeEntry
    start = "acme serve …"
    load_path, unload_path = "/adapters/load", "/adapters/unload"


DIALECT = Acme()
