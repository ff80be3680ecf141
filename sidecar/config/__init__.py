"""The one configuration file: YAML, unknown keys refused, each key overridable from the environment.

`LORA_SIDECAR_STORE__MEMORY_BYTES=1073741824` sets `store.memory_bytes`; two underscores step into a section.
Command-line options win over the environment, which wins over the file. What Kubernetes tells of a Service that is
called lora-sidecar sets nothing.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sidecar.adapters.origins.allowing import AllowList
from sidecar.adapters.staging import AdaptersDir
from sidecar.config.discover import Discover, EndpointSlices, label_of
from sidecar.config.environment import set_in
from sidecar.config.identities import CLASS, TENANT, check_words
from sidecar.config.kinds import VLLM, out_of_place
from sidecar.config.redis_address import KEY_PREFIX, Place, parse_address, without_users
from sidecar.core.config import ClassLimit, CoreConfig
from sidecar.core.facts import EngineFacts
from sidecar.errors import Misused, Reason

ANSWER_BYTES_MAX, ANSWERS_BYTES_MAX = 4 << 20, 256 << 20
HOST = "{host}"
"""What stands in `metrics` for the host of an engine that was found."""
VLLMS = "vllms"
"""The scheme of a vLLM's URL that is reached by TLS, this machine's CAs trusted unless others are named."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _changed(section: Section) -> set[str]:
    """Return the keys that are not at their defaults, whether these are written out or not."""
    return {name for name, field in type(section).model_fields.items() if getattr(section, name) != field.default}


class Tls(Section):
    """PEM files. A listener needs certificate and key; `ca` makes it ask its clients for theirs."""

    certificate: str | None = None
    key: str | None = None
    ca: str | None = None


class Listener(Section):
    address: str
    tls: Tls | None = None


def is_local(address: str) -> bool:
    """Whether only this machine reaches a HOST:PORT."""
    return address.rpartition(":")[0].strip("[]") in ("127.0.0.1", "localhost", "::1")


class GrpcListener(Listener):
    """How much of it one client can take. A connection that asks for nothing is closed after `idle_s`, one that does
    not come to HTTP/2 after `handshake_s`; past `connections_max` new ones are closed at once.
    """

    connections_max: int = Field(4096, ge=1)
    calls_per_connection_max: int = Field(1024, ge=1)
    handshake_s: float = Field(10.0, gt=0, le=2_000_000)
    idle_s: float = Field(60.0, gt=0, le=2_000_000)


class AdminListener(GrpcListener):
    """Loopback, unless it has TLS and a token file, or TLS that asks its clients for certificates. `allow_cleartext`
    lets tokens come without TLS, for a network that encrypts by itself. `message_bytes_max` bounds one message; an
    adapter is pushed in messages of at most 1 MiB.
    """

    address: str = "127.0.0.1:9001"
    message_bytes_max: int = Field(4 << 20, ge=2 << 20, lt=1 << 31)
    token_file: str | None = None
    allow_cleartext: bool = False

    @model_validator(mode="after")
    def _is_protected(self) -> AdminListener:
        mutual = self.tls is not None and self.tls.ca is not None
        local = is_local(self.address) or self.address.startswith("unix:")
        if not (local or mutual or self.token_file):
            raise ValueError(
                f"{self.address} is reachable from other machines and unprotected; listen on 127.0.0.1, set "
                "token_file and tls, or set tls with a client ca"
            )
        if not (local or self.tls is not None or self.allow_cleartext):
            raise ValueError(
                f"{self.address} is reachable from other machines, and tokens would come in clear text; listen on "
                "127.0.0.1, set tls, or allow_cleartext: true where the network encrypts, as a mesh does"
            )
        return self


class DataListener(GrpcListener):
    """`max_connection_age_s`, give or take a tenth: from then on a connection takes no new calls, and a stream is
    closed when nothing is in flight on it. So clients come back to a load balancer, and find replicas that are new.
    `message_bytes_max` bounds one message, of which weights that clients send themselves are a part.
    """

    address: str = "0.0.0.0:9000"
    message_bytes_max: int = Field(64 << 20, ge=4096, lt=1 << 31)
    max_connection_age_s: float | None = Field(None, gt=0, le=2_000_000)


class HttpListener(Listener):
    """The OpenAI API. `body_bytes_max` bounds one request of it, `prompts_max` how many prompts a completion may ask
    for at once. With `probes` health and metrics are here as well, which is so for one more release.
    """

    address: str = "0.0.0.0:9002"
    connections_max: int = Field(4096, ge=1)
    body_bytes_max: int = Field(16 << 20, ge=1024)
    prompts_max: int = Field(1024, ge=1)
    probes: bool = True


class ProbesListener(Section):
    """Liveness, readiness and metrics, which name adapters and tenants: where clients are not. Off without an address.

    It takes few connections, each for one answer.
    """

    address: str | None = None
    tls: Tls | None = None
    connections_max: int = Field(32, ge=1)


class DrainListener(Section):
    """`POST /drain`, answered when nothing runs any more: for who stops the engine beside this process. Off without
    an address, and on loopback only.
    """

    address: str | None = None

    @field_validator("address")
    @classmethod
    def _is_local(cls, address: str | None) -> str | None:
        if address is not None and not is_local(address):
            raise ValueError(f"{address} is reachable from other machines, and who drains it stops all service")
        return address


class Listeners(Section):
    """`arriving_bytes_max` bounds what is on its way in over all of them: messages and bodies that have not come in
    full. One that has not after `arrival_s` is given up.
    """

    arriving_bytes_max: int = Field(256 << 20, ge=1 << 20)
    arrival_s: float = Field(30.0, gt=0)
    data: DataListener = DataListener()
    admin: AdminListener = AdminListener()
    http: HttpListener = HttpListener()
    probes: ProbesListener = ProbesListener()
    drain: DrainListener = DrainListener()


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
    """`url` is `triton://HOST:PORT`, `vllm://HOST:PORT` or, by TLS, `vllms://HOST:PORT`; `kind` follows from it, or
    names a plug-in's. Keys that mean something to another kind of engine only are refused.

    An engine that reads adapters from files needs `adapters_dir`, a folder that it shares with this process: one path
    where it is the same on both sides, else `ours` and `engine`. One that takes weights reads them from shared memory
    where it can (`weights_transport: auto`), and `backends list` says whether it does.

    `model` is the engine's core model, `text_model` the one before it that takes text, `models` others that clients ask
    for by name. Where a pool has several core models, a request goes to those backends that have the model it names.

    `discover` in place of a url says where engines of this `kind` are found that come and go: all else here is of each
    of them, `{host}` in `metrics` is its host, and its id begins with this one's.
    """

    url: str = ""
    discover: Discover | None = None
    id: str | None = None
    kind: str | None = None
    base_model: BaseModelNames | None = None
    model: str = "tensorrt_llm"
    text_model: str = "ensemble"
    models: tuple[str, ...] = ()
    metrics: str | None = None
    engine: Engine = Engine()
    tls: Tls | None = None
    adapters_dir: SharedFolder | None = None
    weights_transport: Literal["auto", "grpc", "shared_memory"] = "auto"
    api_key_file: str | None = None
    old_versions: bool = False
    progress_timeout_s: float = Field(30.0, gt=0)
    load_timeout_s: float = Field(120.0, gt=0)

    @property
    def address(self) -> str:
        return self.url.partition("://")[2]

    @property
    def identity(self) -> str:
        """The id that it is known by: given, or its address; of a pool the name that is looked for."""
        return self.id or (self.address if self.discover is None else label_of(self.discover.name))

    def at(self, name: str, address: str) -> Backend:
        """Return the entry of one engine of this pool. Equal names give equal ids, whichever replica found it."""
        scheme = VLLMS if self.scheme == VLLM and self.tls is not None else self.scheme
        host = address.rpartition(":")[0]
        return self.model_copy(
            update={
                "url": f"{scheme}://{address}",
                "discover": None,
                "id": f"{self.identity}-{label_of(name)}",
                "metrics": None if self.metrics is None else self.metrics.replace(HOST, host),
            }
        )

    @property
    def scheme(self) -> str:
        """The backend kind: given, or the URL's scheme, of which `vllms` is `vllm` with TLS."""
        scheme = self.url.partition("://")[0]
        return self.kind or (VLLM if scheme == VLLMS else scheme)

    @model_validator(mode="before")
    @classmethod
    def _has_tls_by_its_url(cls, record: Any) -> Any:
        if isinstance(record, dict) and str(record.get("url")).startswith(f"{VLLMS}://") and not record.get("tls"):
            return record | {"tls": {}}
        return record

    @model_validator(mode="after")
    def _has_keys_of_its_kind(self) -> Backend:
        given = {*_changed(self), *(f"engine.{key}" for key in _changed(self.engine))}
        problems = list(out_of_place(self.scheme, given))
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @model_validator(mode="after")
    def _is_somewhere(self) -> Backend:
        if bool(self.url) == (self.discover is not None):
            raise ValueError("it needs one of url and discover")
        if self.discover is not None and self.kind is None:
            raise ValueError("discover needs a kind: triton or vllm")
        if self.discover is not None and self.metrics is not None and HOST not in self.metrics:
            raise ValueError(f"metrics: with discover it needs {HOST}, as in http://{HOST}:8002/metrics")
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
            raise ValueError("it must be of the form triton://HOST:PORT or vllm://HOST:PORT")
        return url


class Adapters(Section):
    """`roots` are the folders that may be registered from; each PEFT subfolder of `serve` is a name at start."""

    roots: tuple[str, ...] = ()
    serve: str | None = None
    allow: dict[str, tuple[str, ...]] = {}


class Origins(Section):
    """Where adapters may be fetched from: `allow` lists prefixes of URLs (and folders); `adapters.roots` always count.

    `https://` alone allows every public host; a host that has a private address must be named. Credentials are found by
    the stores' own libraries and are no part of this.
    """

    allow: tuple[str, ...] = ()
    size_bytes_max: int = Field(4 << 30, ge=1)
    attempts_max: int = Field(5, ge=1)
    timeout_s: float = Field(30.0, gt=0)
    duration_s_max: float = Field(1800.0, gt=0)
    downloads_max: int = Field(4, ge=1)

    @field_validator("allow")
    @classmethod
    def _are_prefixes(cls, allow: tuple[str, ...]) -> tuple[str, ...]:
        try:
            AllowList.of(allow)
        except Misused as error:
            raise ValueError(error.message.removeprefix("origins.allow: ")) from error
        return allow


class Store(Section):
    """Two tiers of packed adapters. The disk tier is there when there is a data directory."""

    memory_bytes: int = Field(4 << 30, ge=1)
    disk_bytes: int = Field(32 << 30, ge=0)
    eviction: str = "rate_per_byte"
    disk_eviction: str = "lru"
    prefetch: str = "planned"
    prefetch_bytes_per_s: int = Field(128 << 20, ge=0)
    fetches_max: int = Field(4, ge=1)


class RequestClass(Section):
    """How long a request may wait, and how long it does before others are held back for it."""

    queue_wait_s_max: float = Field(600.0, gt=0)
    patience_s: float = Field(20.0, ge=0)


class Queue(Section):
    """`joining_s_max`: how long an engine that has just come up is spared, at most, until it has the adapters that are
    planned for it; 0 sends it its share at once. `answer_bytes_max` of an answer, and `answers_bytes_max` of all of
    them, may wait for clients that are slower than their engine; what does not fit keeps its seat at the engine.
    """

    ordering: str = "soft_gated"
    routing: str = "partitioned"
    output_tokens_assumed: int = Field(1024, ge=1)
    sequence_tokens_assumed: int = Field(131_072, ge=1)
    queued_max: int = Field(50_000, ge=1)
    queued_tokens_max: int = Field(1 << 31, ge=1)
    queued_bytes_max: int = Field(1 << 30, ge=1)
    tenant_queued_max: int = Field(50_000, ge=1)
    tenant_queued_tokens_max: int = Field(1 << 31, ge=1)
    tenant_queued_bytes_max: int = Field(1 << 30, ge=1)
    tenant_weights: dict[str, Annotated[float, Field(gt=0)]] = {}
    inbox_max: int = Field(10_000, ge=1)
    answer_bytes_max: int = Field(ANSWER_BYTES_MAX, ge=1)
    answers_bytes_max: int = Field(ANSWERS_BYTES_MAX, ge=1)
    joining_s_max: float = Field(30.0, ge=0)
    classes: dict[str, RequestClass] = {"default": RequestClass()}

    @field_validator("tenant_weights")
    @classmethod
    def _are_tenants(cls, weights: dict[str, float]) -> dict[str, float]:
        check_words(TENANT, weights)
        return weights

    @field_validator("classes")
    @classmethod
    def _are_classes(cls, classes: dict[str, RequestClass]) -> dict[str, RequestClass]:
        check_words(CLASS, classes)
        return classes

    @field_validator("classes")
    @classmethod
    def _has_default(cls, classes: dict[str, RequestClass]) -> dict[str, RequestClass]:
        return {"default": RequestClass(), **classes}


class Journal(Section):
    """Off without a data directory. Ids, names, lengths and times; never prompts, tokens, weights or secrets."""

    enabled: bool = True
    segment_bytes: int = Field(16 << 20, ge=4096)
    segments_max: int = Field(8, ge=1)


class State(Section):
    """Where names are kept: without `url` in the data directory, for one replica; with it in a Redis for several.

    It is redis://HOST:PORT/DB, redis+sentinel://HOST:PORT,HOST:PORT/MASTER/DB or redis+cluster://HOST:PORT,HOST:PORT,
    with a USER@ if need be, and rediss for TLS. Installations that share a Redis have different key prefixes.

    A replica that says nothing for `member_ttl_s` is not waited for any more when a name changes.
    """

    url: str | None = None
    password_file: str | None = None
    key_prefix: str = Field(KEY_PREFIX, pattern=r"^[\w.:-]{1,64}$")
    tls: Tls | None = None
    member_ttl_s: float = Field(10.0, ge=1.0)

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str | None) -> str | None:
        if url is not None:
            parse_address(url)
        return url

    @model_validator(mode="after")
    def _is_reached_as_its_url_says(self) -> State:
        changed = sorted(_changed(self) - {"url"})
        if self.url is None and changed:
            raise ValueError(f"{', '.join(changed)} without a url: names are kept in the data directory")
        if self.tls is not None and not parse_address(self.url or "").tls:
            raise ValueError("tls is set and the url's scheme is without TLS; let it begin with rediss")
        if self.tls is not None and (self.tls.certificate is None) != (self.tls.key is None):
            raise ValueError("tls needs certificate and key together")
        return self

    @property
    def place(self) -> Place:
        """Where the Redis is; there must be one."""
        assert self.url is not None
        tls = self.tls or Tls()
        files = (self.password_file, tls.ca, tls.certificate, tls.key)
        paths = [None if file is None else Path(file).expanduser() for file in files]
        return Place(parse_address(self.url), self.key_prefix, *paths)


class Replicas(Section):
    """Several replicas in front of one pool, each backend's queue in one of them. Off without an address.

    They listen to each other at `address` and are reached at `advertise`, by default that, with this machine's name if
    it stands for all of the machine's addresses.
    `name` is whose life this is when it is started again, by default this machine's. What a replica owns falls to
    another `lease_s` after it was lost.
    """

    address: str | None = None
    advertise: str | None = None
    name: str | None = None
    tls: Tls | None = None
    weight: float = Field(1.0, gt=0)
    lease_s: float = Field(10.0, ge=1.0, le=60.0)

    @property
    def listener(self) -> Listener:
        """Where the others are listened to; there must be an address."""
        assert self.address is not None
        return Listener(address=self.address, tls=self.tls)


class ClusterAdapters(Section):
    """What declares adapters: ConfigMaps that have `label`, of the form key=value,key=value, and LoraAdapters."""

    config_maps: bool = False
    custom_resources: bool = False
    label: str = Field("lora-sidecar.io/adapters=true", pattern=r"^([\w./-]+=[\w.-]*)(,[\w./-]+=[\w.-]*)*$")


class Kubernetes(Section):
    """The cluster that this process belongs to, as a pod or by KUBECONFIG. `namespace` is its own if none is named."""

    namespace: str = Field("", pattern=r"^([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)?$")
    adapters: ClusterAdapters = ClusterAdapters()


class Config(Section):
    """The whole configuration; the defaults serve one engine on this machine."""

    listeners: Listeners = Listeners()
    backends: tuple[Backend, ...] = ()
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
    """A fault on purpose, for tests and for who wants to see a crash; see `core.injected`."""

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

    @model_validator(mode="after")
    def _ids_are_unique(self) -> Config:
        ids = [backend.identity for backend in self.backends]
        for identity in ids:
            if ids.count(identity) > 1:
                raise ValueError(f"two backends have the id {identity}; give one another with id")
        for pool in (backend.identity for backend in self.backends if backend.discover is not None):
            for identity in ids:
                if identity.startswith(f"{pool}-"):
                    raise ValueError(f"{identity} could be an engine of the pool {pool}; give one another id")
        return self

    def core(self) -> CoreConfig:
        """Return the part that the core works with."""
        return CoreConfig(
            store_bytes=self.store.memory_bytes,
            disk_bytes=self.store.disk_bytes if self.data_directory is not None else 0,
            fetches_max=self.store.fetches_max,
            output_tokens_assumed=self.queue.output_tokens_assumed,
            sequence_tokens_assumed=self.queue.sequence_tokens_assumed,
            queued_max=self.queue.queued_max,
            queued_tokens_max=self.queue.queued_tokens_max,
            queued_bytes_max=self.queue.queued_bytes_max,
            tenant_queued_max=self.queue.tenant_queued_max,
            tenant_queued_tokens_max=self.queue.tenant_queued_tokens_max,
            tenant_queued_bytes_max=self.queue.tenant_queued_bytes_max,
            tenant_weights=dict(self.queue.tenant_weights),
            base_requests=self.base_requests == "allow",
            classes={
                name: ClassLimit(int(limit.queue_wait_s_max * 1e9), int(limit.patience_s * 1e9))
                for name, limit in sorted(self.queue.classes.items())
            },
            eviction=self.store.eviction,
            disk_eviction=self.store.disk_eviction,
            ordering=self.queue.ordering,
            routing=self.queue.routing,
            joining_ns_max=int(self.queue.joining_s_max * 1e9),
            prefetch=self.store.prefetch,
            prefetch_bytes_per_s=self.store.prefetch_bytes_per_s,
            raise_on=self.raise_on,
        )


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
        raise Misused(Reason.CONFIG_INVALID, f"{source}: {_problems(error)}") from error


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


def _problems(error: ValidationError) -> str:
    """Say each problem as "key: what is wrong", with the nearest known key for one that is unknown."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(problem["loc"][-1]), _all_keys(), n=1)
            lines.append(f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else ""))
        else:
            given = without_users(repr(problem["input"]))
            lines.append(f"{key}: {problem['msg'].removeprefix('Value error, ')} (it is {given:.80})")
    return "; ".join(lines)


def _all_keys() -> list[str]:
    sections: tuple[type[BaseModel], ...] = (
        Config, Listeners, Listener, GrpcListener, AdminListener, DataListener, HttpListener, ProbesListener,
        Tls, Backend, Discover, EndpointSlices, BaseModelNames, SharedFolder, Engine, Adapters, Origins, Store, Queue,
        RequestClass, Journal, State, Replicas, Kubernetes, ClusterAdapters,
    )  # fmt: skip
    return sorted({name for section in sections for name in section.model_fields})
