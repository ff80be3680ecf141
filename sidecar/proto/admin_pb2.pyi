from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RegisterRequest(_message.Message):
    __slots__ = ("name", "path", "allow", "pin", "labels", "stage", "hold_s", "base")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    ALLOW_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    HOLD_S_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    allow: _containers.RepeatedScalarFieldContainer[str]
    pin: bool
    labels: _containers.ScalarMap[str, str]
    stage: bool
    hold_s: int
    base: str
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., allow: _Optional[_Iterable[str]] = ..., pin: _Optional[bool] = ..., labels: _Optional[_Mapping[str, str]] = ..., stage: _Optional[bool] = ..., hold_s: _Optional[int] = ..., base: _Optional[str] = ...) -> None: ...

class RegisterResponse(_message.Message):
    __slots__ = ("adapter", "unchanged", "version", "warnings")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    UNCHANGED_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    unchanged: bool
    version: str
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ..., unchanged: _Optional[bool] = ..., version: _Optional[str] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class PushRequest(_message.Message):
    __slots__ = ("start", "chunk")
    START_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    start: PushStart
    chunk: PushChunk
    def __init__(self, start: _Optional[_Union[PushStart, _Mapping]] = ..., chunk: _Optional[_Union[PushChunk, _Mapping]] = ...) -> None: ...

class PushStart(_message.Message):
    __slots__ = ("name", "allow", "pin", "labels", "stage", "hold_s", "files", "base")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALLOW_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    HOLD_S_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    name: str
    allow: _containers.RepeatedScalarFieldContainer[str]
    pin: bool
    labels: _containers.ScalarMap[str, str]
    stage: bool
    hold_s: int
    files: _containers.RepeatedCompositeFieldContainer[PushFile]
    base: str
    def __init__(self, name: _Optional[str] = ..., allow: _Optional[_Iterable[str]] = ..., pin: _Optional[bool] = ..., labels: _Optional[_Mapping[str, str]] = ..., stage: _Optional[bool] = ..., hold_s: _Optional[int] = ..., files: _Optional[_Iterable[_Union[PushFile, _Mapping]]] = ..., base: _Optional[str] = ...) -> None: ...

class PushFile(_message.Message):
    __slots__ = ("name", "size_bytes", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    sha256: str
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class PushChunk(_message.Message):
    __slots__ = ("file", "offset", "data")
    FILE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    file: int
    offset: int
    data: bytes
    def __init__(self, file: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class AdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class PromoteRequest(_message.Message):
    __slots__ = ("name", "version", "weight", "hold_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    HOLD_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    weight: int
    hold_s: int
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., weight: _Optional[int] = ..., hold_s: _Optional[int] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("name", "hold_s", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HOLD_S_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    hold_s: int
    version: str
    def __init__(self, name: _Optional[str] = ..., hold_s: _Optional[int] = ..., version: _Optional[str] = ...) -> None: ...

class RefreshRequest(_message.Message):
    __slots__ = ("name", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class UnregisterRequest(_message.Message):
    __slots__ = ("name", "hold_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HOLD_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    hold_s: int
    def __init__(self, name: _Optional[str] = ..., hold_s: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("token",)
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    token: str
    def __init__(self, token: _Optional[str] = ...) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("token", "name", "adapter")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    token: str
    name: str
    adapter: Adapter
    def __init__(self, token: _Optional[str] = ..., name: _Optional[str] = ..., adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("name", "backends", "prompts", "max_tokens", "timeout_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    backends: _containers.RepeatedScalarFieldContainer[str]
    prompts: _containers.RepeatedCompositeFieldContainer[VerifyPrompt]
    max_tokens: int
    timeout_s: int
    def __init__(self, name: _Optional[str] = ..., backends: _Optional[_Iterable[str]] = ..., prompts: _Optional[_Iterable[_Union[VerifyPrompt, _Mapping]]] = ..., max_tokens: _Optional[int] = ..., timeout_s: _Optional[int] = ...) -> None: ...

class VerifyPrompt(_message.Message):
    __slots__ = ("text", "token_ids")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class VerifyResponse(_message.Message):
    __slots__ = ("plan", "answer", "check")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    CHECK_FIELD_NUMBER: _ClassVar[int]
    plan: VerifyPlan
    answer: VerifyAnswer
    check: VerifyCheck
    def __init__(self, plan: _Optional[_Union[VerifyPlan, _Mapping]] = ..., answer: _Optional[_Union[VerifyAnswer, _Mapping]] = ..., check: _Optional[_Union[VerifyCheck, _Mapping]] = ...) -> None: ...

class VerifyPlan(_message.Message):
    __slots__ = ("version", "digest", "backends", "skipped", "prompts", "expected", "probes")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    PROBES_FIELD_NUMBER: _ClassVar[int]
    version: str
    digest: str
    backends: _containers.RepeatedScalarFieldContainer[str]
    skipped: _containers.RepeatedCompositeFieldContainer[SkippedBackend]
    prompts: int
    expected: int
    probes: str
    def __init__(self, version: _Optional[str] = ..., digest: _Optional[str] = ..., backends: _Optional[_Iterable[str]] = ..., skipped: _Optional[_Iterable[_Union[SkippedBackend, _Mapping]]] = ..., prompts: _Optional[int] = ..., expected: _Optional[int] = ..., probes: _Optional[str] = ...) -> None: ...

class SkippedBackend(_message.Message):
    __slots__ = ("backend", "why")
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    backend: str
    why: str
    def __init__(self, backend: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class VerifyAnswer(_message.Message):
    __slots__ = ("backend", "prompt", "base", "adapter", "expect", "changed", "matches", "again")
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    EXPECT_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    MATCHES_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    backend: str
    prompt: VerifyPrompt
    base: VerifyReply
    adapter: VerifyReply
    expect: str
    changed: bool
    matches: bool
    again: _containers.RepeatedCompositeFieldContainer[VerifyReply]
    def __init__(self, backend: _Optional[str] = ..., prompt: _Optional[_Union[VerifyPrompt, _Mapping]] = ..., base: _Optional[_Union[VerifyReply, _Mapping]] = ..., adapter: _Optional[_Union[VerifyReply, _Mapping]] = ..., expect: _Optional[str] = ..., changed: _Optional[bool] = ..., matches: _Optional[bool] = ..., again: _Optional[_Iterable[_Union[VerifyReply, _Mapping]]] = ...) -> None: ...

class VerifyReply(_message.Message):
    __slots__ = ("text", "token_ids", "error")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    error: str
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., error: _Optional[str] = ...) -> None: ...

class VerifyCheck(_message.Message):
    __slots__ = ("check", "result", "sentence", "advice", "backends")
    CHECK_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    SENTENCE_FIELD_NUMBER: _ClassVar[int]
    ADVICE_FIELD_NUMBER: _ClassVar[int]
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    check: str
    result: str
    sentence: str
    advice: str
    backends: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, check: _Optional[str] = ..., result: _Optional[str] = ..., sentence: _Optional[str] = ..., advice: _Optional[str] = ..., backends: _Optional[_Iterable[str]] = ...) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("name", "backends")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    backends: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., backends: _Optional[_Iterable[str]] = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "tenant", "state", "unused_s")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    UNUSED_S_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    tenant: str
    state: str
    unused_s: float
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., tenant: _Optional[str] = ..., state: _Optional[str] = ..., unused_s: _Optional[float] = ...) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters", "next_page_token")
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    next_page_token: str
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class UnregisterResponse(_message.Message):
    __slots__ = ("places",)
    PLACES_FIELD_NUMBER: _ClassVar[int]
    places: _containers.RepeatedCompositeFieldContainer[Place]
    def __init__(self, places: _Optional[_Iterable[_Union[Place, _Mapping]]] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "version", "digest", "base_model", "path", "rank", "modules", "dtype", "pinned", "allow", "quarantined", "requests", "store", "backends", "versions", "canary_weight", "canary_version", "managed_by", "held_s", "paused_s", "unused_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    ALLOW_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    CANARY_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    CANARY_VERSION_FIELD_NUMBER: _ClassVar[int]
    MANAGED_BY_FIELD_NUMBER: _ClassVar[int]
    HELD_S_FIELD_NUMBER: _ClassVar[int]
    PAUSED_S_FIELD_NUMBER: _ClassVar[int]
    UNUSED_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    digest: str
    base_model: str
    path: str
    rank: int
    modules: _containers.RepeatedScalarFieldContainer[str]
    dtype: str
    pinned: bool
    allow: _containers.RepeatedScalarFieldContainer[str]
    quarantined: str
    requests: int
    store: _containers.RepeatedCompositeFieldContainer[StoreCopy]
    backends: _containers.RepeatedCompositeFieldContainer[Residency]
    versions: _containers.RepeatedCompositeFieldContainer[Version]
    canary_weight: int
    canary_version: str
    managed_by: str
    held_s: float
    paused_s: float
    unused_s: float
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., digest: _Optional[str] = ..., base_model: _Optional[str] = ..., path: _Optional[str] = ..., rank: _Optional[int] = ..., modules: _Optional[_Iterable[str]] = ..., dtype: _Optional[str] = ..., pinned: _Optional[bool] = ..., allow: _Optional[_Iterable[str]] = ..., quarantined: _Optional[str] = ..., requests: _Optional[int] = ..., store: _Optional[_Iterable[_Union[StoreCopy, _Mapping]]] = ..., backends: _Optional[_Iterable[_Union[Residency, _Mapping]]] = ..., versions: _Optional[_Iterable[_Union[Version, _Mapping]]] = ..., canary_weight: _Optional[int] = ..., canary_version: _Optional[str] = ..., managed_by: _Optional[str] = ..., held_s: _Optional[float] = ..., paused_s: _Optional[float] = ..., unused_s: _Optional[float] = ...) -> None: ...

class PauseRequest(_message.Message):
    __slots__ = ("name", "for_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FOR_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    for_s: float
    def __init__(self, name: _Optional[str] = ..., for_s: _Optional[float] = ...) -> None: ...

class ListRequestsRequest(_message.Message):
    __slots__ = ("adapter", "backend", "tenant", "limit")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    backend: str
    tenant: str
    limit: int
    def __init__(self, adapter: _Optional[str] = ..., backend: _Optional[str] = ..., tenant: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class ListRequestsResponse(_message.Message):
    __slots__ = ("requests", "total")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[OpenRequest]
    total: int
    def __init__(self, requests: _Optional[_Iterable[_Union[OpenRequest, _Mapping]]] = ..., total: _Optional[int] = ...) -> None: ...

class ShowRequestRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: str
    def __init__(self, request: _Optional[str] = ...) -> None: ...

class ShowRequestResponse(_message.Message):
    __slots__ = ("lines", "record")
    LINES_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    lines: _containers.RepeatedScalarFieldContainer[str]
    record: str
    def __init__(self, lines: _Optional[_Iterable[str]] = ..., record: _Optional[str] = ...) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("request", "request_id", "adapter", "version", "tenant", "backend", "state", "age_s", "input_tokens", "output_tokens_max")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CLASS_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    request: int
    request_id: str
    adapter: str
    version: str
    tenant: str
    backend: str
    state: str
    age_s: float
    input_tokens: int
    output_tokens_max: int
    def __init__(self, request: _Optional[int] = ..., request_id: _Optional[str] = ..., adapter: _Optional[str] = ..., version: _Optional[str] = ..., tenant: _Optional[str] = ..., backend: _Optional[str] = ..., state: _Optional[str] = ..., age_s: _Optional[float] = ..., input_tokens: _Optional[int] = ..., output_tokens_max: _Optional[int] = ..., **kwargs) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("request_id", "adapter", "tenant", "only")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    ONLY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    adapter: str
    tenant: str
    only: RequestNames
    def __init__(self, request_id: _Optional[str] = ..., adapter: _Optional[str] = ..., tenant: _Optional[str] = ..., only: _Optional[_Union[RequestNames, _Mapping]] = ...) -> None: ...

class RequestNames(_message.Message):
    __slots__ = ("adapter", "tenant", "backend")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    tenant: str
    backend: str
    def __init__(self, adapter: _Optional[str] = ..., tenant: _Optional[str] = ..., backend: _Optional[str] = ...) -> None: ...

class CancelResponse(_message.Message):
    __slots__ = ("cancelled",)
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    cancelled: int
    def __init__(self, cancelled: _Optional[int] = ...) -> None: ...

class CreateKeyRequest(_message.Message):
    __slots__ = ("tenant", "expires_s", "roles", "groups", "note")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_S_FIELD_NUMBER: _ClassVar[int]
    ROLES_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    CLASS_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    expires_s: float
    roles: _containers.RepeatedScalarFieldContainer[str]
    groups: _containers.RepeatedScalarFieldContainer[str]
    note: str
    def __init__(self, tenant: _Optional[str] = ..., expires_s: _Optional[float] = ..., roles: _Optional[_Iterable[str]] = ..., groups: _Optional[_Iterable[str]] = ..., note: _Optional[str] = ..., **kwargs) -> None: ...

class CreateKeyResponse(_message.Message):
    __slots__ = ("secret", "key")
    SECRET_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    secret: str
    key: Key
    def __init__(self, secret: _Optional[str] = ..., key: _Optional[_Union[Key, _Mapping]] = ...) -> None: ...

class Key(_message.Message):
    __slots__ = ("id", "tenant", "roles", "groups", "note", "created_by", "created_at", "expires_at", "revoked_at", "used_at", "state")
    ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    ROLES_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    CLASS_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    CREATED_BY_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    REVOKED_AT_FIELD_NUMBER: _ClassVar[int]
    USED_AT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    id: str
    tenant: str
    roles: _containers.RepeatedScalarFieldContainer[str]
    groups: _containers.RepeatedScalarFieldContainer[str]
    note: str
    created_by: str
    created_at: float
    expires_at: float
    revoked_at: float
    used_at: float
    state: str
    def __init__(self, id: _Optional[str] = ..., tenant: _Optional[str] = ..., roles: _Optional[_Iterable[str]] = ..., groups: _Optional[_Iterable[str]] = ..., note: _Optional[str] = ..., created_by: _Optional[str] = ..., created_at: _Optional[float] = ..., expires_at: _Optional[float] = ..., revoked_at: _Optional[float] = ..., used_at: _Optional[float] = ..., state: _Optional[str] = ..., **kwargs) -> None: ...

class ListKeysRequest(_message.Message):
    __slots__ = ("tenant",)
    TENANT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    def __init__(self, tenant: _Optional[str] = ...) -> None: ...

class ListKeysResponse(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[Key]
    def __init__(self, keys: _Optional[_Iterable[_Union[Key, _Mapping]]] = ...) -> None: ...

class RevokeKeyRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class Limit(_message.Message):
    __slots__ = ("tenant", "adapter", "tokens", "requests_per_minute", "requests_per_hour", "requests_per_day", "tokens_per_minute", "tokens_per_hour", "tokens_per_day", "concurrent", "queued_tokens", "max_tokens", "default_max_tokens", "source", "taken")
    class TakenEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CLASS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_PER_MINUTE_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_PER_HOUR_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_PER_DAY_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_MINUTE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_HOUR_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_DAY_FIELD_NUMBER: _ClassVar[int]
    CONCURRENT_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    adapter: str
    tokens: str
    requests_per_minute: int
    requests_per_hour: int
    requests_per_day: int
    tokens_per_minute: int
    tokens_per_hour: int
    tokens_per_day: int
    concurrent: int
    queued_tokens: int
    max_tokens: int
    default_max_tokens: int
    source: str
    taken: _containers.ScalarMap[str, int]
    def __init__(self, tenant: _Optional[str] = ..., adapter: _Optional[str] = ..., tokens: _Optional[str] = ..., requests_per_minute: _Optional[int] = ..., requests_per_hour: _Optional[int] = ..., requests_per_day: _Optional[int] = ..., tokens_per_minute: _Optional[int] = ..., tokens_per_hour: _Optional[int] = ..., tokens_per_day: _Optional[int] = ..., concurrent: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., default_max_tokens: _Optional[int] = ..., source: _Optional[str] = ..., taken: _Optional[_Mapping[str, int]] = ..., **kwargs) -> None: ...

class ListLimitsRequest(_message.Message):
    __slots__ = ("tenant",)
    TENANT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    def __init__(self, tenant: _Optional[str] = ...) -> None: ...

class ListLimitsResponse(_message.Message):
    __slots__ = ("limits",)
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    limits: _containers.RepeatedCompositeFieldContainer[Limit]
    def __init__(self, limits: _Optional[_Iterable[_Union[Limit, _Mapping]]] = ...) -> None: ...

class RemoveLimitRequest(_message.Message):
    __slots__ = ("tenant", "adapter", "tokens")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CLASS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    adapter: str
    tokens: str
    def __init__(self, tenant: _Optional[str] = ..., adapter: _Optional[str] = ..., tokens: _Optional[str] = ..., **kwargs) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ("tenant", "groups", "roles", "action", "resource")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    ROLES_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    RESOURCE_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    groups: _containers.RepeatedScalarFieldContainer[str]
    roles: _containers.RepeatedScalarFieldContainer[str]
    action: str
    resource: str
    def __init__(self, tenant: _Optional[str] = ..., groups: _Optional[_Iterable[str]] = ..., roles: _Optional[_Iterable[str]] = ..., action: _Optional[str] = ..., resource: _Optional[str] = ...) -> None: ...

class CheckResponse(_message.Message):
    __slots__ = ("allowed", "by", "source", "fault", "version", "name_state")
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NAME_STATE_FIELD_NUMBER: _ClassVar[int]
    allowed: bool
    by: str
    source: str
    fault: str
    version: str
    name_state: str
    def __init__(self, allowed: _Optional[bool] = ..., by: _Optional[str] = ..., source: _Optional[str] = ..., fault: _Optional[str] = ..., version: _Optional[str] = ..., name_state: _Optional[str] = ...) -> None: ...

class WhoAmIRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WhoAmIResponse(_message.Message):
    __slots__ = ("tenant", "proof", "subject", "groups", "roles", "expires_at")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    ROLES_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    proof: str
    subject: str
    groups: _containers.RepeatedScalarFieldContainer[str]
    roles: _containers.RepeatedScalarFieldContainer[str]
    expires_at: float
    def __init__(self, tenant: _Optional[str] = ..., proof: _Optional[str] = ..., subject: _Optional[str] = ..., groups: _Optional[_Iterable[str]] = ..., roles: _Optional[_Iterable[str]] = ..., expires_at: _Optional[float] = ...) -> None: ...

class UsageRequest(_message.Message):
    __slots__ = ("since", "until", "by", "tenant", "adapter")
    SINCE_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    since: float
    until: float
    by: _containers.RepeatedScalarFieldContainer[str]
    tenant: str
    adapter: str
    def __init__(self, since: _Optional[float] = ..., until: _Optional[float] = ..., by: _Optional[_Iterable[str]] = ..., tenant: _Optional[str] = ..., adapter: _Optional[str] = ...) -> None: ...

class UsageResponse(_message.Message):
    __slots__ = ("rows", "incomplete", "note")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    INCOMPLETE_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[UsageRow]
    incomplete: _containers.RepeatedScalarFieldContainer[float]
    note: str
    def __init__(self, rows: _Optional[_Iterable[_Union[UsageRow, _Mapping]]] = ..., incomplete: _Optional[_Iterable[float]] = ..., note: _Optional[str] = ...) -> None: ...

class UsageRow(_message.Message):
    __slots__ = ("tenant", "adapter", "version", "requests", "input_tokens", "output_tokens", "input_tokens_estimated", "seat_seconds", "slot_seconds", "cold_loads", "cold_load_bytes", "stored_byte_seconds", "backend", "engine_seconds", "output_tokens_estimated")
    class RequestsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    TENANT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FROM_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    INPUT_TOKENS_ESTIMATED_FIELD_NUMBER: _ClassVar[int]
    SEAT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SLOT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COLD_LOADS_FIELD_NUMBER: _ClassVar[int]
    COLD_LOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    ENGINE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_ESTIMATED_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    adapter: str
    version: str
    requests: _containers.ScalarMap[str, int]
    input_tokens: int
    output_tokens: int
    input_tokens_estimated: int
    seat_seconds: float
    slot_seconds: float
    cold_loads: int
    cold_load_bytes: int
    stored_byte_seconds: float
    backend: str
    engine_seconds: float
    output_tokens_estimated: int
    def __init__(self, tenant: _Optional[str] = ..., adapter: _Optional[str] = ..., version: _Optional[str] = ..., requests: _Optional[_Mapping[str, int]] = ..., input_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., input_tokens_estimated: _Optional[int] = ..., seat_seconds: _Optional[float] = ..., slot_seconds: _Optional[float] = ..., cold_loads: _Optional[int] = ..., cold_load_bytes: _Optional[int] = ..., stored_byte_seconds: _Optional[float] = ..., backend: _Optional[str] = ..., engine_seconds: _Optional[float] = ..., output_tokens_estimated: _Optional[int] = ..., **kwargs) -> None: ...

class AuditRequest(_message.Message):
    __slots__ = ("since", "adapter", "tenant", "kind")
    SINCE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    since: float
    adapter: str
    tenant: str
    kind: str
    def __init__(self, since: _Optional[float] = ..., adapter: _Optional[str] = ..., tenant: _Optional[str] = ..., kind: _Optional[str] = ...) -> None: ...

class AuditLine(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class Version(_message.Message):
    __slots__ = ("version", "digest", "origin", "labels", "role", "generation", "registered_at")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    REGISTERED_AT_FIELD_NUMBER: _ClassVar[int]
    version: str
    digest: str
    origin: str
    labels: _containers.ScalarMap[str, str]
    role: str
    generation: int
    registered_at: float
    def __init__(self, version: _Optional[str] = ..., digest: _Optional[str] = ..., origin: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., role: _Optional[str] = ..., generation: _Optional[int] = ..., registered_at: _Optional[float] = ...) -> None: ...

class StoreCopy(_message.Message):
    __slots__ = ("dtype", "state", "size_bytes", "pins", "task_id", "tier")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    state: str
    size_bytes: int
    pins: int
    task_id: str
    tier: str
    def __init__(self, dtype: _Optional[str] = ..., state: _Optional[str] = ..., size_bytes: _Optional[int] = ..., pins: _Optional[int] = ..., task_id: _Optional[str] = ..., tier: _Optional[str] = ...) -> None: ...

class Residency(_message.Message):
    __slots__ = ("backend", "tier", "age_s", "source", "unfit")
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    UNFIT_FIELD_NUMBER: _ClassVar[int]
    backend: str
    tier: str
    age_s: float
    source: str
    unfit: str
    def __init__(self, backend: _Optional[str] = ..., tier: _Optional[str] = ..., age_s: _Optional[float] = ..., source: _Optional[str] = ..., unfit: _Optional[str] = ...) -> None: ...

class Place(_message.Message):
    __slots__ = ("place", "result")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    place: str
    result: str
    def __init__(self, place: _Optional[str] = ..., result: _Optional[str] = ...) -> None: ...

class PlacesResponse(_message.Message):
    __slots__ = ("places",)
    PLACES_FIELD_NUMBER: _ClassVar[int]
    places: _containers.RepeatedCompositeFieldContainer[Place]
    def __init__(self, places: _Optional[_Iterable[_Union[Place, _Mapping]]] = ...) -> None: ...

class ListBackendsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListBackendsResponse(_message.Message):
    __slots__ = ("backends",)
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    backends: _containers.RepeatedCompositeFieldContainer[Backend]
    def __init__(self, backends: _Optional[_Iterable[_Union[Backend, _Mapping]]] = ...) -> None: ...

class BackendRequest(_message.Message):
    __slots__ = ("backend",)
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    backend: str
    def __init__(self, backend: _Optional[str] = ...) -> None: ...

class Backend(_message.Message):
    __slots__ = ("id", "kind", "address", "state", "base_model", "dtype", "rank_max", "running", "queued", "seats", "host_pages", "device_pages", "kv_tokens", "kv_reserved", "page_limit", "open", "heals", "resident", "detail", "pace", "predicted_wait_s", "owner", "epoch", "host_pages_assumed", "draining", "seats_assumed", "refused", "pages_assumed")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    RANK_MAX_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    SEATS_FIELD_NUMBER: _ClassVar[int]
    HOST_PAGES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_PAGES_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_RESERVED_FIELD_NUMBER: _ClassVar[int]
    PAGE_LIMIT_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    HEALS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    PACE_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HOST_PAGES_ASSUMED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    SEATS_ASSUMED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    PAGES_ASSUMED_FIELD_NUMBER: _ClassVar[int]
    id: str
    kind: str
    address: str
    state: str
    base_model: str
    dtype: str
    rank_max: int
    running: int
    queued: int
    seats: int
    host_pages: int
    device_pages: int
    kv_tokens: int
    kv_reserved: int
    page_limit: int
    open: _containers.RepeatedCompositeFieldContainer[OpenVersion]
    heals: _containers.RepeatedCompositeFieldContainer[HealNote]
    resident: _containers.RepeatedScalarFieldContainer[str]
    detail: str
    pace: str
    predicted_wait_s: float
    owner: str
    epoch: int
    host_pages_assumed: bool
    draining: bool
    seats_assumed: bool
    refused: int
    pages_assumed: bool
    def __init__(self, id: _Optional[str] = ..., kind: _Optional[str] = ..., address: _Optional[str] = ..., state: _Optional[str] = ..., base_model: _Optional[str] = ..., dtype: _Optional[str] = ..., rank_max: _Optional[int] = ..., running: _Optional[int] = ..., queued: _Optional[int] = ..., seats: _Optional[int] = ..., host_pages: _Optional[int] = ..., device_pages: _Optional[int] = ..., kv_tokens: _Optional[int] = ..., kv_reserved: _Optional[int] = ..., page_limit: _Optional[int] = ..., open: _Optional[_Iterable[_Union[OpenVersion, _Mapping]]] = ..., heals: _Optional[_Iterable[_Union[HealNote, _Mapping]]] = ..., resident: _Optional[_Iterable[str]] = ..., detail: _Optional[str] = ..., pace: _Optional[str] = ..., predicted_wait_s: _Optional[float] = ..., owner: _Optional[str] = ..., epoch: _Optional[int] = ..., host_pages_assumed: _Optional[bool] = ..., draining: _Optional[bool] = ..., seats_assumed: _Optional[bool] = ..., refused: _Optional[int] = ..., pages_assumed: _Optional[bool] = ...) -> None: ...

class AddBackendRequest(_message.Message):
    __slots__ = ("backend", "url", "like")
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    LIKE_FIELD_NUMBER: _ClassVar[int]
    backend: str
    url: str
    like: str
    def __init__(self, backend: _Optional[str] = ..., url: _Optional[str] = ..., like: _Optional[str] = ...) -> None: ...

class ReloadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReloadResponse(_message.Message):
    __slots__ = ("changed",)
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    changed: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, changed: _Optional[_Iterable[str]] = ...) -> None: ...

class GetConfigurationRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EffectiveConfiguration(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class ListReplicasRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListReplicasResponse(_message.Message):
    __slots__ = ("replicas",)
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    def __init__(self, replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("id", "name", "address", "self", "leads", "draining", "weight", "owns", "forwards", "reroutes")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SELF_FIELD_NUMBER: _ClassVar[int]
    LEADS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    OWNS_FIELD_NUMBER: _ClassVar[int]
    FORWARDS_FIELD_NUMBER: _ClassVar[int]
    REROUTES_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    address: str
    self: bool
    leads: bool
    draining: bool
    weight: float
    owns: _containers.RepeatedCompositeFieldContainer[OwnedBackend]
    forwards: int
    reroutes: int
    def __init__(self_, id: _Optional[str] = ..., name: _Optional[str] = ..., address: _Optional[str] = ..., self: _Optional[bool] = ..., leads: _Optional[bool] = ..., draining: _Optional[bool] = ..., weight: _Optional[float] = ..., owns: _Optional[_Iterable[_Union[OwnedBackend, _Mapping]]] = ..., forwards: _Optional[int] = ..., reroutes: _Optional[int] = ...) -> None: ...

class OwnedBackend(_message.Message):
    __slots__ = ("backend", "epoch", "state")
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    backend: str
    epoch: int
    state: str
    def __init__(self, backend: _Optional[str] = ..., epoch: _Optional[int] = ..., state: _Optional[str] = ...) -> None: ...

class OpenVersion(_message.Message):
    __slots__ = ("name", "digest", "age_s", "pages", "running", "queued", "pinned_by")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    PINNED_BY_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    age_s: float
    pages: int
    running: int
    queued: int
    pinned_by: str
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., age_s: _Optional[float] = ..., pages: _Optional[int] = ..., running: _Optional[int] = ..., queued: _Optional[int] = ..., pinned_by: _Optional[str] = ...) -> None: ...

class HealNote(_message.Message):
    __slots__ = ("age_s", "reason", "adapter")
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    age_s: float
    reason: str
    adapter: str
    def __init__(self, age_s: _Optional[float] = ..., reason: _Optional[str] = ..., adapter: _Optional[str] = ...) -> None: ...

class QueueRequest(_message.Message):
    __slots__ = ("adapter", "backend", "limit")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    backend: str
    limit: int
    def __init__(self, adapter: _Optional[str] = ..., backend: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class QueueResponse(_message.Message):
    __slots__ = ("verdict", "waiting", "running", "requests", "why", "groups", "groups_total", "runs")
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    verdict: str
    waiting: int
    running: int
    requests: _containers.RepeatedCompositeFieldContainer[WaitingRequest]
    why: _containers.RepeatedCompositeFieldContainer[WhyCount]
    groups: _containers.RepeatedCompositeFieldContainer[QueueGroup]
    groups_total: int
    runs: _containers.RepeatedCompositeFieldContainer[OpenRequest]
    def __init__(self, verdict: _Optional[str] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ..., requests: _Optional[_Iterable[_Union[WaitingRequest, _Mapping]]] = ..., why: _Optional[_Iterable[_Union[WhyCount, _Mapping]]] = ..., groups: _Optional[_Iterable[_Union[QueueGroup, _Mapping]]] = ..., groups_total: _Optional[int] = ..., runs: _Optional[_Iterable[_Union[OpenRequest, _Mapping]]] = ...) -> None: ...

class QueueGroup(_message.Message):
    __slots__ = ("adapter", "tenant", "backend", "waiting", "running", "tokens", "oldest")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    OLDEST_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    tenant: str
    backend: str
    waiting: int
    running: int
    tokens: int
    oldest: WaitingRequest
    def __init__(self, adapter: _Optional[str] = ..., tenant: _Optional[str] = ..., backend: _Optional[str] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ..., tokens: _Optional[int] = ..., oldest: _Optional[_Union[WaitingRequest, _Mapping]] = ...) -> None: ...

class WhyCount(_message.Message):
    __slots__ = ("why", "count")
    WHY_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    why: str
    count: int
    def __init__(self, why: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class WaitingRequest(_message.Message):
    __slots__ = ("request", "adapter", "tenant", "backend", "waited_s", "bound_s", "why", "expires_s", "voided", "request_id")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CLASS_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    WAITED_S_FIELD_NUMBER: _ClassVar[int]
    BOUND_S_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_S_FIELD_NUMBER: _ClassVar[int]
    VOIDED_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request: int
    adapter: str
    tenant: str
    backend: str
    waited_s: float
    bound_s: float
    why: str
    expires_s: float
    voided: str
    request_id: str
    def __init__(self, request: _Optional[int] = ..., adapter: _Optional[str] = ..., tenant: _Optional[str] = ..., backend: _Optional[str] = ..., waited_s: _Optional[float] = ..., bound_s: _Optional[float] = ..., why: _Optional[str] = ..., expires_s: _Optional[float] = ..., voided: _Optional[str] = ..., request_id: _Optional[str] = ..., **kwargs) -> None: ...

class WatchPoolRequest(_message.Message):
    __slots__ = ("page", "sort", "filter", "offset", "limit", "interval_s", "lanes_of", "only")
    PAGE_FIELD_NUMBER: _ClassVar[int]
    SORT_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    LANES_OF_FIELD_NUMBER: _ClassVar[int]
    ONLY_FIELD_NUMBER: _ClassVar[int]
    page: str
    sort: str
    filter: str
    offset: int
    limit: int
    interval_s: float
    lanes_of: str
    only: RequestNames
    def __init__(self, page: _Optional[str] = ..., sort: _Optional[str] = ..., filter: _Optional[str] = ..., offset: _Optional[int] = ..., limit: _Optional[int] = ..., interval_s: _Optional[float] = ..., lanes_of: _Optional[str] = ..., only: _Optional[_Union[RequestNames, _Mapping]] = ...) -> None: ...

class PoolView(_message.Message):
    __slots__ = ("time", "replica", "verdict", "waiting", "running", "tokens_per_s", "backends", "backends_serving", "seats", "adapters", "rows_total", "groups", "backend_rows", "adapter_rows", "tenant_rows", "request_rows", "lanes", "seats_assumed")
    TIME_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    BACKENDS_SERVING_FIELD_NUMBER: _ClassVar[int]
    SEATS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    ROWS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    BACKEND_ROWS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_ROWS_FIELD_NUMBER: _ClassVar[int]
    TENANT_ROWS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ROWS_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    SEATS_ASSUMED_FIELD_NUMBER: _ClassVar[int]
    time: float
    replica: str
    verdict: str
    waiting: int
    running: int
    tokens_per_s: float
    backends: int
    backends_serving: int
    seats: int
    adapters: int
    rows_total: int
    groups: _containers.RepeatedCompositeFieldContainer[QueueGroup]
    backend_rows: _containers.RepeatedCompositeFieldContainer[BackendRow]
    adapter_rows: _containers.RepeatedCompositeFieldContainer[AdapterRow]
    tenant_rows: _containers.RepeatedCompositeFieldContainer[TenantRow]
    request_rows: _containers.RepeatedCompositeFieldContainer[OpenRequest]
    lanes: _containers.RepeatedCompositeFieldContainer[Lane]
    seats_assumed: bool
    def __init__(self, time: _Optional[float] = ..., replica: _Optional[str] = ..., verdict: _Optional[str] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., backends: _Optional[int] = ..., backends_serving: _Optional[int] = ..., seats: _Optional[int] = ..., adapters: _Optional[int] = ..., rows_total: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[QueueGroup, _Mapping]]] = ..., backend_rows: _Optional[_Iterable[_Union[BackendRow, _Mapping]]] = ..., adapter_rows: _Optional[_Iterable[_Union[AdapterRow, _Mapping]]] = ..., tenant_rows: _Optional[_Iterable[_Union[TenantRow, _Mapping]]] = ..., request_rows: _Optional[_Iterable[_Union[OpenRequest, _Mapping]]] = ..., lanes: _Optional[_Iterable[_Union[Lane, _Mapping]]] = ..., seats_assumed: _Optional[bool] = ...) -> None: ...

class BackendRow(_message.Message):
    __slots__ = ("backend", "tokens_per_s", "silent_s")
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    SILENT_S_FIELD_NUMBER: _ClassVar[int]
    backend: Backend
    tokens_per_s: float
    silent_s: float
    def __init__(self, backend: _Optional[_Union[Backend, _Mapping]] = ..., tokens_per_s: _Optional[float] = ..., silent_s: _Optional[float] = ...) -> None: ...

class AdapterRow(_message.Message):
    __slots__ = ("name", "version", "waiting", "running", "oldest", "tokens_per_s", "on_gpu", "in_engine_host", "loading", "store", "pinned", "quarantined", "paused_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    OLDEST_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    ON_GPU_FIELD_NUMBER: _ClassVar[int]
    IN_ENGINE_HOST_FIELD_NUMBER: _ClassVar[int]
    LOADING_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    PAUSED_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    waiting: int
    running: int
    oldest: WaitingRequest
    tokens_per_s: float
    on_gpu: int
    in_engine_host: int
    loading: int
    store: str
    pinned: bool
    quarantined: str
    paused_s: float
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ..., oldest: _Optional[_Union[WaitingRequest, _Mapping]] = ..., tokens_per_s: _Optional[float] = ..., on_gpu: _Optional[int] = ..., in_engine_host: _Optional[int] = ..., loading: _Optional[int] = ..., store: _Optional[str] = ..., pinned: _Optional[bool] = ..., quarantined: _Optional[str] = ..., paused_s: _Optional[float] = ...) -> None: ...

class TenantRow(_message.Message):
    __slots__ = ("tenant", "waiting", "running", "oldest", "tokens_per_s", "tokens", "weight")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    OLDEST_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    waiting: int
    running: int
    oldest: WaitingRequest
    tokens_per_s: float
    tokens: int
    weight: float
    def __init__(self, tenant: _Optional[str] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ..., oldest: _Optional[_Union[WaitingRequest, _Mapping]] = ..., tokens_per_s: _Optional[float] = ..., tokens: _Optional[int] = ..., weight: _Optional[float] = ...) -> None: ...

class Lane(_message.Message):
    __slots__ = ("held", "names")
    HELD_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    held: _containers.RepeatedScalarFieldContainer[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, held: _Optional[_Iterable[int]] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...
