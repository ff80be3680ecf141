"""The configuration file: YAML, with unknown keys refused and every key overridable from the environment.

`LORA_SIDECAR_STORE__MEMORY_BYTES=1073741824` sets `store.memory_bytes`; two underscores step into a section.
Command-line options override the environment, which overrides the file. Variables that Kubernetes sets for a Service
named lora-sidecar are ignored.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from sidecar.config.adapters import Adapters, Origins, Store
from sidecar.config.environment import set_in
from sidecar.config.listeners import Listeners
from sidecar.config.queue import Queue
from sidecar.config.section import Section, problems
from sidecar.config.shared import Journal, Kubernetes, Replicas, State
from sidecar.core.config import ClassLimit, CoreConfig
from sidecar.errors import Misused, Reason


class Config(Section):
    """The whole configuration; the defaults serve one engine on this machine."""

    listeners: Listeners = Listeners()
    backends: tuple[dict[str, Any], ...] = ()
    """As written: `backends.registry.entries_of` validates each by its kind."""
    adapters: Adapters = Adapters()
    origins: Origins = Origins()
    store: Store = Store()
    queue: Queue = Queue()
    journal: Journal = Journal()
    state: State = State()
    replicas: Replicas = Replicas()
    kubernetes: Kubernetes = Kubernetes()
    data_directory: str | None = None
    base_requests: Literal["allow", "refuse"] = "allow"
    tenant_from: Literal["metadata", "certificate", "none"] = "metadata"
    legacy_task_ids: dict[int, str] = {}
    allow_client_lora: bool = False
    hide_backend: bool = False
    client_stall_s: float = Field(60.0, gt=0)
    drain_timeout_s: float = Field(300.0, gt=0)
    adapter_labels_max: int = Field(200, ge=0)
    log_format: Literal["text", "json"] = "text"
    raise_on: str = ""
    """A deliberate fault, to test or to see a crash; see `core.injected`."""

    @model_validator(mode="after")
    def _certificates_are_asked_for(self) -> Config:
        tls = self.listeners.data.tls
        if self.tenant_from == "certificate" and (tls is None or tls.ca is None):
            raise ValueError("tenant_from: certificate needs listeners.data.tls with a client ca")
        return self

    @model_validator(mode="after")
    def _replicas_share_their_state(self) -> Config:
        if self.replicas.address is not None and self.state.url is None:
            raise ValueError("replicas.address without state.url: replicas know of each other by a Redis")
        return self

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
                for name, limit in sorted(self.queue.classes.items())
            },
            joining_ns_max=int(self.queue.joining_s_max * 1e9),
            raise_on=self.raise_on,
        )


def load(path: Path | None, environment: Mapping[str, str] | None = None) -> Config:
    """Read the file and the environment. Raises Misused naming the key, the value and what is expected."""
    record = _read(path) if path is not None else {}
    for key, value in set_in(os.environ if environment is None else environment):
        _set(record, key, value)
    return parse(record, str(path or "the environment"))


def parse(record: Any, source: str) -> Config:
    try:
        return Config.model_validate(record)
    except ValidationError as error:
        raise Misused(Reason.CONFIG_INVALID, f"{source}: {'; '.join(problems(error, Config))}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        record = yaml.safe_load(path.read_text())
    except OSError as error:
        raise Misused(Reason.CONFIG_INVALID, f"configuration {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise Misused(Reason.CONFIG_INVALID, f"configuration {path} is not YAML: {error}") from error
    if record is None:
        return {}
    if not isinstance(record, dict):
        raise Misused(Reason.CONFIG_INVALID, f"configuration {path}: the top level must be keys, as in store: …")
    return record


def _set(record: dict[str, Any], path: list[str], value: Any) -> None:
    *sections, key = path
    for section in sections:
        record = record.setdefault(section, {})
    record[key] = value
