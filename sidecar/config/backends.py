"""One backend: the keys that every kind of backend has. A kind's own section adds its own (`backends.registry`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from sidecar.adapters.staging import AdaptersDir
from sidecar.config.discover import Discover, label_of
from sidecar.config.section import Section, Tls
from sidecar.core.facts import EngineFacts

HOST = "{host}"
"""What stands in `metrics` for the host of an engine that was found."""


class Engine(Section):
    """What an engine is, inline; `config` names its TensorRT-LLM config.json. What is not said is asked or unknown.

    `cost` is a cost file or `model/gpu/engine` for one of ours, and `cost_scale` multiplies all its times. In vLLM a
    page is an adapter: `device_pages` is its max_loras, `host_pages` its max_cpu_loras, `seats` its max_num_seqs.
    `base_apart` keeps the base model and adapters out of one batch, for engines that then answer wrongly.
    """

    config: str | None = None
    cost: str | None = None
    cost_scale: float = Field(1.0, gt=0)
    dtype: Literal["float16", "bfloat16"] | None = None
    rank_max: int | None = Field(None, ge=1)
    rank_multiple: int = Field(1, ge=1)
    tp: int | None = Field(None, ge=1)
    layers: int | None = Field(None, ge=1)
    heads: int | None = Field(None, ge=1)
    kv_heads: int | None = Field(None, ge=1)
    head_size: int | None = Field(None, ge=1)
    modules: dict[str, tuple[int, int]] | None = None
    host_pages: int | None = Field(None, ge=1)
    device_pages: int | None = Field(None, ge=1)
    seats: int | None = Field(None, ge=1)
    kv_tokens: int | None = Field(None, ge=1)
    input_tokens_max: int | None = Field(None, ge=1)
    sequence_tokens_max: int | None = Field(None, ge=1)
    base_apart: bool = False


class BaseModelNames(Section):
    """The model that an engine serves: the name that adapters were trained on, its other names, and its files.

    `config` is its `config.json` or folder: every adapter's dimensions are checked against it. `chat_template` is a
    Jinja2 file, a `tokenizer_config.json` or the folder of one: with it an engine that takes text only answers chats.
    """

    name: str
    aliases: tuple[str, ...] = ()
    config: str | None = None
    chat_template: str | None = None


class SharedFolder(Section):
    """A folder for adapters' files: where this process writes them, and what the engine calls the same place."""

    ours: str
    engine: str

    @field_validator("ours", "engine")
    @classmethod
    def _is_absolute(cls, path: str) -> str:
        if not path.startswith("/"):
            raise ValueError("it must be an absolute path")
        return path

    @property
    def places(self) -> AdaptersDir:
        return AdaptersDir(Path(self.ours), self.engine)


class Backend(Section):
    """`url` is `SCHEME://HOST:PORT`; its scheme names the `kind`, which a plug-in's may be named by in its place. Keys
    that mean something to another kind of engine only are refused.

    An engine that reads adapters from files needs `adapters_dir`, a folder that it shares with this process: one path
    where it is the same on both sides, else `ours` and `engine`.

    `discover` in place of a url says where engines of this `kind` are found that come and go: all else here is of each
    of them, and its id begins with this one's.
    """

    SCHEMES: ClassVar[Mapping[str, bool]] = {}
    """The schemes of its URLs, and whether each means TLS. The first one is the kind's name."""
    ELSEWHERE: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    """Keys that other kinds have, by a URL of those, with the reason why this kind has them not: `engine.tp`."""
    shared_memory: ClassVar[Literal["never", "auto", "must"]] = "never"

    url: str = ""
    discover: Discover | None = None
    id: str | None = None
    kind: str | None = None
    base_model: BaseModelNames | None = None
    engine: Engine = Engine()
    tls: Tls | None = None
    adapters_dir: SharedFolder | None = None
    progress_timeout_s: float = Field(30.0, gt=0)
    load_timeout_s: float = Field(120.0, gt=0)

    @property
    def address(self) -> str:
        return self.url.partition("://")[2]

    @property
    def identity(self) -> str:
        """The id that it is known by: given, or its address; of a pool the name that is looked for."""
        return self.id or (self.address if self.discover is None else label_of(self.discover.name))

    @property
    def kind_name(self) -> str:
        """The kind: given, or the one that the URL's scheme is of."""
        return self.kind or next(iter(self.SCHEMES), "")

    @property
    def places(self) -> AdaptersDir | None:
        """The folder that it shares with its engine."""
        return None if self.adapters_dir is None else self.adapters_dir.places

    @property
    def tls_files(self) -> dict[str, str] | None:
        """PEM files by name; empty for TLS with this machine's CAs, None for no TLS."""
        return None if self.tls is None else self.tls.model_dump(exclude_none=True)

    def files(self) -> dict[str, str | None]:
        """Return the files that it names and that must be there, by their keys."""
        return {"engine.config": self.engine.config}

    def at(self, name: str, address: str) -> Self:
        """Return the entry of one engine of this pool. Equal names give equal ids, whichever replica found it."""
        secure = self.tls is not None
        schemes = list(self.SCHEMES) or [self.kind_name]
        scheme = next((scheme for scheme in schemes if self.SCHEMES.get(scheme) == secure), schemes[0])
        found = {"url": f"{scheme}://{address}", "discover": None, "id": f"{self.identity}-{label_of(name)}"}
        return self.model_copy(update=found | self._at_host(address.rpartition(":")[0]))

    def _at_host(self, host: str) -> dict[str, Any]:
        """Return what else of an entry names the host of an engine that was found."""
        return {}

    @model_validator(mode="before")
    @classmethod
    def _has_tls_by_its_url(cls, record: Any) -> Any:
        if isinstance(record, dict):
            scheme, separator, _ = str(record.get("url")).partition("://")
            if separator and cls.SCHEMES.get(scheme) and not record.get("tls"):
                return record | {"tls": {}}
        return record

    @model_validator(mode="before")
    @classmethod
    def _has_keys_of_its_kind(cls, record: Any) -> Any:
        """Refuse another kind's keys with the reason, before they are found to be unknown: all of them at once."""
        given = set(record) - set(cls.model_fields) if isinstance(record, dict) else set()
        engine = record.get("engine") if isinstance(record, dict) else None
        if isinstance(engine, dict):
            defaults = {key: field.default for key, field in Engine.model_fields.items()}
            given |= {
                f"engine.{key}" for key, value in engine.items() if value is not None and value != defaults.get(key)
            }
        wrong = [
            f"{key} is for {owner} backends only: {reason}; take it out"
            for owner, keys in cls.ELSEWHERE.items()
            for key, reason in keys.items()
            if key in given
        ]
        if wrong:
            raise ValueError("; ".join(wrong))
        return record

    @model_validator(mode="after")
    def _is_somewhere(self) -> Self:
        if bool(self.url) == (self.discover is not None):
            raise ValueError("it needs one of url and discover")
        return self

    @field_validator("base_model", mode="before")
    @classmethod
    def _is_a_name_at_least(cls, base_model: Any) -> Any:
        return {"name": base_model} if isinstance(base_model, str) else base_model

    @field_validator("adapters_dir", mode="before")
    @classmethod
    def _is_a_path_at_least(cls, adapters_dir: Any) -> Any:
        return {"ours": adapters_dir, "engine": adapters_dir} if isinstance(adapters_dir, str) else adapters_dir

    @field_validator("url")
    @classmethod
    def _is_a_url(cls, url: str) -> str:
        if not url:
            return url  # as it is printed where engines are found
        scheme, separator, address = url.partition("://")
        host, _, port = address.rpartition(":")
        if not (scheme and separator and host and port.isdigit()):
            raise ValueError(f"it must be of the form {scheme if separator else 'triton'}://HOST:PORT")
        return url


def declared_facts(backend: Backend, from_engine_config: EngineFacts | None) -> EngineFacts:
    """Return what is declared of an engine: its config.json's facts, those given inline on top."""
    facts = from_engine_config or EngineFacts()
    base = backend.base_model
    names = (base.name, *base.aliases) if base is not None else ()
    given = {
        name: value
        for name, value in backend.engine.model_dump(exclude={"config", "cost", "cost_scale"}).items()
        if name in backend.engine.model_fields_set and value is not None
    }
    return replace(facts, base_models=names, **given)
