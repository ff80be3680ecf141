"""One backend: the keys of every kind of backend. Each kind's own section adds its keys (`backends.registry`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from sidecar.adapters.staging import AdaptersDir
from sidecar.config.discover import Discover, label_of
from sidecar.config.restart import Restart
from sidecar.config.section import Section, Tls, is_address
from sidecar.core.facts import EngineFacts

HOST = "{host}"
"""Placeholder in `metrics` for the host of a discovered engine."""


class Engine(Section):
    """The engine's facts; `config` names its TensorRT-LLM config.json. Those not given are asked, or unknown.

    `cost` is a cost file, or `model/gpu/engine` for a built-in one, and `cost_scale` multiplies all its times. In vLLM
    a page is an adapter: `device_pages` is its max_loras, `host_pages` its max_cpu_loras, `seats` its max_num_seqs.
    `base_apart` keeps the base model and adapters out of one batch, for engines that answer wrongly otherwise.
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
    Jinja2 file, a `tokenizer_config.json` or the folder of one; with it a text-only engine can answer chats.
    `tokenizer` is its `tokenizer.json` or the folder of it; with it prompts in text are counted, not estimated.
    """

    name: str
    aliases: tuple[str, ...] = ()
    config: str | None = None
    chat_template: str | None = None
    tokenizer: str | None = None


class SharedFolder(Section):
    """A folder for adapters' files: its path in this process, and its path in the engine."""

    ours: str
    engine: str

    @field_validator("ours", "engine")
    @classmethod
    def _is_absolute(cls, path: str) -> str:
        if not path.startswith("/"):
            raise ValueError("it must be an absolute path")
        return path

    @property
    def shared_dir(self) -> AdaptersDir:
        return AdaptersDir(Path(self.ours), self.engine)


class Backend(Section):
    """`url` is `SCHEME://HOST:PORT`. Its scheme names the kind of engine; another package's dialect of the OpenAI
    family is named by `kind`. Keys of other kinds are refused.

    An engine that reads adapters from files needs `adapters_dir`, a folder that it shares with this process: one path
    if that is the same on both sides, else `ours` and `engine`.

    `discover` in place of a url says where to find engines of this `kind` that come and go. All other keys apply to
    each of them, and their ids begin with this one's.
    """

    SCHEMES: ClassVar[Mapping[str, bool]] = {}
    """The schemes of its URLs; True if one means TLS. The first is the kind's name."""
    ELSEWHERE: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    """Keys of other kinds (such as `engine.tp`), by a URL of theirs, with the reason why this kind lacks them."""
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
    def place(self) -> tuple[str, ...]:
        """What no two backends have in common: its address first, then what tells engines at one address apart."""
        return (self.address,)

    @property
    def identity(self) -> str:
        """Its id: as given, or its address; for a pool the name that is looked up."""
        return self.id or (self.address if self.discover is None else label_of(self.discover.name))

    @property
    def kind_name(self) -> str:
        """Its kind: as given, or by the URL's scheme."""
        return self.kind or next(iter(self.SCHEMES), "")

    @property
    def shared_dir(self) -> AdaptersDir | None:
        """The folder that it shares with its engine."""
        return None if self.adapters_dir is None else self.adapters_dir.shared_dir

    @property
    def tls_files(self) -> dict[str, str] | None:
        """PEM files by name; empty for TLS with this machine's CAs, None for no TLS."""
        return None if self.tls is None else self.tls.model_dump(exclude_none=True)

    @property
    def restart_when_out(self) -> Restart | None:
        """How to restart an engine that keeps as many adapter versions as it may; None to only say so."""
        return None

    def files(self) -> dict[str, str | None]:
        """Return the files that it names and that must exist, by their keys."""
        return {"engine.config": self.engine.config}

    def at(self, name: str, address: str) -> Self:
        """Return the entry of one engine of this pool. Equal names give equal ids, on every replica."""
        secure = self.tls is not None
        schemes = list(self.SCHEMES) or [self.kind_name]
        scheme = next((scheme for scheme in schemes if self.SCHEMES.get(scheme) == secure), schemes[0])
        found = {"url": f"{scheme}://{address}", "discover": None, "id": f"{self.identity}-{label_of(name)}"}
        return self.model_copy(update=found | self._at_host(address.rpartition(":")[0]))

    def _at_host(self, host: str) -> dict[str, Any]:
        """Return the other keys of an entry that contain the host of a discovered engine."""
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
        """Refuse all keys of other kinds, each with the reason, before they are reported as unknown."""
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
        if not isinstance(adapters_dir, str):
            return adapters_dir
        if not adapters_dir.startswith("/"):
            raise ValueError("it must be an absolute path")
        return {"ours": adapters_dir, "engine": adapters_dir}

    @field_validator("url")
    @classmethod
    def _is_a_url(cls, url: str) -> str:
        if not url:
            return url  # a full record of a pool has an empty one
        scheme, _, address = url.partition("://")
        if "@" in address:
            raise ValueError("it has a user, and engines take none: what an engine asks for is a key of its kind")
        if scheme not in cls.SCHEMES or not is_address(address):
            raise ValueError(f"it must be of the form {' or '.join(f'{each}://HOST:PORT' for each in cls.SCHEMES)}")
        return url

    @field_validator("id")
    @classmethod
    def _is_printable(cls, identity: str | None) -> str | None:
        if identity is not None and not (identity.isprintable() and 0 < len(identity.strip()) == len(identity) < 254):
            raise ValueError("it must have 1 to 253 characters that can be printed, and no space around them")
        return identity


def declared_facts(backend: Backend, from_engine_config: EngineFacts | None) -> EngineFacts:
    """Return the declared facts of an engine: those of its config.json, overridden by those given inline."""
    facts = from_engine_config or EngineFacts()
    base = backend.base_model
    names = (base.name, *base.aliases) if base is not None else ()
    given = {
        name: value
        for name, value in backend.engine.model_dump(exclude={"config", "cost", "cost_scale"}).items()
        if name in backend.engine.model_fields_set and value is not None
    }
    return replace(facts, base_models=names, **given)
