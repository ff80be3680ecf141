from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SourceRequest(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    def __init__(self, digest: _Optional[str] = ...) -> None: ...

class SourceChunk(_message.Message):
    __slots__ = ("name", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    data: bytes
    def __init__(self, name: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class KeepRequest(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    def __init__(self, digest: _Optional[str] = ...) -> None: ...

class KeepReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ForwardRequests(_message.Message):
    __slots__ = ("requests", "ended", "paused", "resumed", "moved", "carried")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    CARRIED_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[ForwardRequest]
    ended: _containers.RepeatedScalarFieldContainer[int]
    paused: _containers.RepeatedScalarFieldContainer[int]
    resumed: _containers.RepeatedScalarFieldContainer[int]
    moved: _containers.RepeatedScalarFieldContainer[int]
    carried: _containers.RepeatedCompositeFieldContainer[Carried]
    def __init__(self, requests: _Optional[_Iterable[_Union[ForwardRequest, _Mapping]]] = ..., ended: _Optional[_Iterable[int]] = ..., paused: _Optional[_Iterable[int]] = ..., resumed: _Optional[_Iterable[int]] = ..., moved: _Optional[_Iterable[int]] = ..., carried: _Optional[_Iterable[_Union[Carried, _Mapping]]] = ...) -> None: ...

class Carried(_message.Message):
    __slots__ = ("number", "head", "chunk", "end", "sighting", "failed", "declined")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    SIGHTING_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    DECLINED_FIELD_NUMBER: _ClassVar[int]
    number: int
    head: CarriedHead
    chunk: bytes
    end: CarriedEnd
    sighting: Sighting
    failed: str
    declined: bool
    def __init__(self, number: _Optional[int] = ..., head: _Optional[_Union[CarriedHead, _Mapping]] = ..., chunk: _Optional[bytes] = ..., end: _Optional[_Union[CarriedEnd, _Mapping]] = ..., sighting: _Optional[_Union[Sighting, _Mapping]] = ..., failed: _Optional[str] = ..., declined: _Optional[bool] = ...) -> None: ...

class CarriedHead(_message.Message):
    __slots__ = ("status", "headers", "is_unread")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    IS_UNREAD_FIELD_NUMBER: _ClassVar[int]
    status: int
    headers: _containers.RepeatedCompositeFieldContainer[ForwardedMetadata]
    is_unread: bool
    def __init__(self, status: _Optional[int] = ..., headers: _Optional[_Iterable[_Union[ForwardedMetadata, _Mapping]]] = ..., is_unread: _Optional[bool] = ...) -> None: ...

class CarriedEnd(_message.Message):
    __slots__ = ("goes_on", "trailers")
    GOES_ON_FIELD_NUMBER: _ClassVar[int]
    TRAILERS_FIELD_NUMBER: _ClassVar[int]
    goes_on: bool
    trailers: _containers.RepeatedCompositeFieldContainer[ForwardedMetadata]
    def __init__(self, goes_on: _Optional[bool] = ..., trailers: _Optional[_Iterable[_Union[ForwardedMetadata, _Mapping]]] = ...) -> None: ...

class Sighting(_message.Message):
    __slots__ = ("exchange", "body_bytes", "ending", "cause")
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    BODY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENDING_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    exchange: str
    body_bytes: int
    ending: str
    cause: str
    def __init__(self, exchange: _Optional[str] = ..., body_bytes: _Optional[int] = ..., ending: _Optional[str] = ..., cause: _Optional[str] = ...) -> None: ...

class TellRequest(_message.Message):
    __slots__ = ("sightings",)
    SIGHTINGS_FIELD_NUMBER: _ClassVar[int]
    sightings: _containers.RepeatedCompositeFieldContainer[Sighting]
    def __init__(self, sightings: _Optional[_Iterable[_Union[Sighting, _Mapping]]] = ...) -> None: ...

class TellReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Carriage(_message.Message):
    __slots__ = ("url", "headers", "body")
    URL_FIELD_NUMBER: _ClassVar[int]
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    url: str
    headers: _containers.RepeatedCompositeFieldContainer[ForwardedMetadata]
    body: bytes
    def __init__(self, url: _Optional[str] = ..., headers: _Optional[_Iterable[_Union[ForwardedMetadata, _Mapping]]] = ..., body: _Optional[bytes] = ...) -> None: ...

class ForwardReplies(_message.Message):
    __slots__ = ("replies", "dispatched")
    REPLIES_FIELD_NUMBER: _ClassVar[int]
    DISPATCHED_FIELD_NUMBER: _ClassVar[int]
    replies: _containers.RepeatedCompositeFieldContainer[ForwardReply]
    dispatched: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, replies: _Optional[_Iterable[_Union[ForwardReply, _Mapping]]] = ..., dispatched: _Optional[_Iterable[int]] = ...) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("number", "member", "facts", "payload", "client_id", "peer", "is_carried", "answer_id")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    IS_CARRIED_FIELD_NUMBER: _ClassVar[int]
    ANSWER_ID_FIELD_NUMBER: _ClassVar[int]
    number: int
    member: str
    facts: bytes
    payload: bytes
    client_id: str
    peer: str
    is_carried: bool
    answer_id: str
    def __init__(self, number: _Optional[int] = ..., member: _Optional[str] = ..., facts: _Optional[bytes] = ..., payload: _Optional[bytes] = ..., client_id: _Optional[str] = ..., peer: _Optional[str] = ..., is_carried: _Optional[bool] = ..., answer_id: _Optional[str] = ...) -> None: ...

class ForwardedMetadata(_message.Message):
    __slots__ = ("key", "value")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: str
    def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...

class ForwardReply(_message.Message):
    __slots__ = ("origin", "part", "last", "ending", "carriage", "number", "tokens")
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    ENDING_FIELD_NUMBER: _ClassVar[int]
    CARRIAGE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    origin: bytes
    part: bytes
    last: bytes
    ending: ForwardedEnding
    carriage: Carriage
    number: int
    tokens: int
    def __init__(self, origin: _Optional[bytes] = ..., part: _Optional[bytes] = ..., last: _Optional[bytes] = ..., ending: _Optional[_Union[ForwardedEnding, _Mapping]] = ..., carriage: _Optional[_Union[Carriage, _Mapping]] = ..., number: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class ForwardedEnding(_message.Message):
    __slots__ = ("settle", "grpc_code", "http_status", "http_body", "is_bystander")
    SETTLE_FIELD_NUMBER: _ClassVar[int]
    GRPC_CODE_FIELD_NUMBER: _ClassVar[int]
    HTTP_STATUS_FIELD_NUMBER: _ClassVar[int]
    HTTP_BODY_FIELD_NUMBER: _ClassVar[int]
    IS_BYSTANDER_FIELD_NUMBER: _ClassVar[int]
    settle: bytes
    grpc_code: int
    http_status: int
    http_body: bytes
    is_bystander: bool
    def __init__(self, settle: _Optional[bytes] = ..., grpc_code: _Optional[int] = ..., http_status: _Optional[int] = ..., http_body: _Optional[bytes] = ..., is_bystander: _Optional[bool] = ...) -> None: ...

class AskRequest(_message.Message):
    __slots__ = ("member", "backend", "purpose", "epoch")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    member: str
    backend: str
    purpose: str
    epoch: int
    def __init__(self, member: _Optional[str] = ..., backend: _Optional[str] = ..., purpose: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class AskReply(_message.Message):
    __slots__ = ("agreed", "holds", "reaches_redis", "epoch")
    AGREED_FIELD_NUMBER: _ClassVar[int]
    HOLDS_FIELD_NUMBER: _ClassVar[int]
    REACHES_REDIS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    agreed: bool
    holds: bool
    reaches_redis: bool
    epoch: int
    def __init__(self, agreed: _Optional[bool] = ..., holds: _Optional[bool] = ..., reaches_redis: _Optional[bool] = ..., epoch: _Optional[int] = ...) -> None: ...

class PeersWatchRequest(_message.Message):
    __slots__ = ("member",)
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    member: str
    def __init__(self, member: _Optional[str] = ...) -> None: ...

class Board(_message.Message):
    __slots__ = ("member", "backends", "plan", "restarting")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    RESTARTING_FIELD_NUMBER: _ClassVar[int]
    member: str
    backends: _containers.RepeatedCompositeFieldContainer[BoardBackend]
    plan: BoardPlan
    restarting: str
    def __init__(self, member: _Optional[str] = ..., backends: _Optional[_Iterable[_Union[BoardBackend, _Mapping]]] = ..., plan: _Optional[_Union[BoardPlan, _Mapping]] = ..., restarting: _Optional[str] = ...) -> None: ...

class BoardBackend(_message.Message):
    __slots__ = ("backend", "epoch", "state", "running", "queued", "backlog_s", "resident", "arrived", "seats", "pages", "work_tokens", "tokens_per_s", "versions_kept")
    class ArrivedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    BACKLOG_S_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    ARRIVED_FIELD_NUMBER: _ClassVar[int]
    SEATS_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    WORK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_KEPT_FIELD_NUMBER: _ClassVar[int]
    backend: str
    epoch: int
    state: str
    running: int
    queued: int
    backlog_s: float
    resident: _containers.RepeatedScalarFieldContainer[str]
    arrived: _containers.ScalarMap[str, int]
    seats: int
    pages: int
    work_tokens: int
    tokens_per_s: float
    versions_kept: int
    def __init__(self, backend: _Optional[str] = ..., epoch: _Optional[int] = ..., state: _Optional[str] = ..., running: _Optional[int] = ..., queued: _Optional[int] = ..., backlog_s: _Optional[float] = ..., resident: _Optional[_Iterable[str]] = ..., arrived: _Optional[_Mapping[str, int]] = ..., seats: _Optional[int] = ..., pages: _Optional[int] = ..., work_tokens: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., versions_kept: _Optional[int] = ...) -> None: ...

class BoardPlan(_message.Message):
    __slots__ = ("epoch", "number", "hosts")
    class HostsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: BoardHosts
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[BoardHosts, _Mapping]] = ...) -> None: ...
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    number: int
    hosts: _containers.MessageMap[str, BoardHosts]
    def __init__(self, epoch: _Optional[int] = ..., number: _Optional[int] = ..., hosts: _Optional[_Mapping[str, BoardHosts]] = ...) -> None: ...

class BoardHosts(_message.Message):
    __slots__ = ("backends",)
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    backends: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, backends: _Optional[_Iterable[str]] = ...) -> None: ...
