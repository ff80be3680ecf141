"""The configuration file: YAML, with unknown keys refused and every key overridable from the environment.

`LORA_SIDECAR_STORE__MEMORY_BYTES=1073741824` sets `store.memory_bytes`; two underscores step into a section.
Command-line options override the environment, which overrides the file. All are merged as plain data (`sources`) and
validated once, so that a message names where the wrong value is written. Variables that Kubernetes sets for a Service
named lora-sidecar are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from sidecar.config.access import Access
from sidecar.config.adapters import Adapters, Origins, Store
from sidecar.config.identity import Identity
from sidecar.config.listeners import Listeners, is_local
from sidecar.config.openai import LOAD_WAIT_S_MAX, LOADS, OpenAi
from sidecar.config.otlp import Otlp
from sidecar.config.queue import Queue, RequestClass
from sidecar.config.section import Section, told
from sidecar.config.shared import Journal, Kubernetes, Replicas, State
from sidecar.config.sources import Setting, in_environment, in_file, merged, source_of
from sidecar.core.config import ClassLimit, CoreConfig
from sidecar.errors import Misused, Reason


class Config(Section):
    """The whole configuration; the defaults serve one engine on this machine."""

    listeners: Listeners = Listeners()
    identity: Identity = Identity()
    access: Access = Access()
    backends: tuple[dict[str, Any], ...] = ()
    """As written: `backends.registry.entries_of` validates each by its kind."""
    openai: OpenAi = OpenAi()
    adapters: Adapters = Adapters()
    origins: Origins = Origins()
    store: Store = Store()
    queue: Queue = Queue()
    journal: Journal = Journal()
    otlp: Otlp = Otlp()
    state: State = State()
    replicas: Replicas = Replicas()
    kubernetes: Kubernetes = Kubernetes()
    data_directory: str | None = None
    base_requests: Literal["allow", "refuse"] = "allow"
    weights_check: Literal["warn", "refuse", "off"] = "warn"
    tenant_from: Literal["metadata", "certificate", "none"] = "metadata"
    legacy_task_ids: dict[int, str] = {}
    allow_client_lora: bool = False
    hide_backend: bool = False
    client_stall_s: float = Field(60.0, gt=0)
    drain_timeout_s: float = Field(300.0, gt=0)
    adapter_labels_max: int = Field(200, ge=0)
    log_format: Literal["text", "json"] = "text"
    watch_config: bool = False
    raise_on: str = ""
    """A deliberate fault, to test or to see a crash; see `core.injected`."""

    @field_validator("tenant_from")
    @classmethod
    def _certificates_are_asked_for(cls, tenant_from: str, others: ValidationInfo) -> str:
        if tenant_from == "certificate" and "listeners" in others.data:
            tls = others.data["listeners"].data.tls
            if tls is None or tls.ca is None:
                raise ValueError("certificate needs listeners.data.tls with a client ca")
        return tenant_from

    @field_validator("openai")
    @classmethod
    def _loads_are_protected(cls, openai: OpenAi, others: ValidationInfo) -> OpenAi:
        if openai.load_calls and "listeners" in others.data and not cls._is_enforced(others):
            http = others.data["listeners"].http
            if not is_local(http.address) and (http.tls is None or http.tls.ca is None):
                raise ValueError(
                    f"load_calls lets whoever reaches listeners.http ({http.address}) replace adapters; let it listen "
                    "on 127.0.0.1, or set listeners.http.tls with a client ca, or identity.mode: enforce, which allows "
                    "it to publishers"
                )
        return openai

    @staticmethod
    def _is_enforced(others: ValidationInfo) -> bool:
        identity = others.data.get("identity")
        return identity is not None and identity.mode == "enforce"

    @model_validator(mode="after")
    def _loads_have_a_root(self) -> Self:
        allowed = (*self.adapters.roots, self.adapters.serve, *self.origins.allow)
        if self.openai.load_calls and not any(allowed):
            raise ValueError(
                "openai.load_calls needs adapters.roots: the folders from which adapters may be loaded; name the one "
                "in which the trainer writes its steps"
            )
        return self

    @field_validator("replicas")
    @classmethod
    def _replicas_share_their_state(cls, replicas: Replicas, others: ValidationInfo) -> Replicas:
        if replicas.address is not None and "state" in others.data and others.data["state"].url is None:
            raise ValueError("address without state.url: replicas know of each other by a Redis")
        if replicas.address is not None and cls._is_enforced(others) and (replicas.tls is None or not replicas.tls.ca):
            raise ValueError(
                "identity.mode: enforce needs replicas.tls with certificate, key and ca: who reaches the replicas' "
                "port could else send requests in anybody's name"
            )
        return replicas

    def core(self) -> CoreConfig:
        """Return the core's part: the keys of `store` and `queue` that it has under the same names, and some more."""
        names = {field.name for field in fields(CoreConfig)}
        own = {"classes", "tenant_weights", "disk_bytes"}
        shared = {
            name: getattr(section, name)
            for section in (self.store, self.queue)
            for name in names & type(section).model_fields.keys() - own
        }
        return CoreConfig(
            **shared,
            store_bytes=self.store.memory_bytes,
            disk_bytes=self.store.disk_bytes if self.data_directory is not None else 0,
            tenant_weights=dict(self.queue.tenant_weights),
            base_requests=self.base_requests == "allow",
            classes={
                name: ClassLimit(int(limit.queue_wait_s_max * 1e9), int(limit.patience_s * 1e9))
                for name, limit in sorted(self._classes().items())
            },
            joining_ns_max=int(self.queue.joining_s_max * 1e9),
            raise_on=self.raise_on,
        )

    def _classes(self) -> dict[str, RequestClass]:
        own = {LOADS: RequestClass(queue_wait_s_max=LOAD_WAIT_S_MAX, patience_s=0)} if self.openai.load_calls else {}
        return own | self.queue.classes


def parse(record: Any, source: str) -> Config:
    """Return the configuration of a record, which is written at `source`. Raises Misused."""
    return validated([Setting((), record, source)])


def written_in(path: Path | None, environment: Mapping[str, str]) -> list[Setting]:
    """Return what the file and the environment say. Raises Misused for what cannot be read as data."""
    file = Setting((), {}, "the environment") if path is None else in_file(path)
    return [file, *in_environment(environment)]


def validated(settings: Sequence[Setting]) -> Config:
    """Return the configuration of all settings, of which later ones override. Raises Misused with every problem."""
    try:
        return Config.model_validate(merged(settings))
    except ValidationError as error:
        found: dict[str, list[str]] = {}
        for problem in error.errors():
            source = source_of(settings, [str(part) for part in problem["loc"]])
            found.setdefault(source, []).append(told(problem, Config))
        message = "; ".join(f"{source}: {'; '.join(problems)}" for source, problems in found.items())
        raise Misused(Reason.CONFIG_INVALID, message) from error
