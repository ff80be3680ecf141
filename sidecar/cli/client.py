"""The connection to a running sidecar, and the messages for its errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message

from sidecar.cli import credentials
from sidecar.cli.exits import CommandError, Exit, harmless
from sidecar.cli.listener import ADMIN_DEFAULT, SERVER_DEFAULT, Endpoint
from sidecar.errors import Reason
from sidecar.proto import admin_pb2, admin_pb2_grpc, gateway_pb2_grpc

ANSWER_TIMEOUT_S = 30.0


class Client:
    """A connection to a sidecar; `ask` makes one call and waits for the answer.

    It sends `secret`, else what the endpoint's token file or a login has for its address.
    """

    def __init__(self, endpoint: Endpoint, secret: str | None = None) -> None:
        self.endpoint = endpoint
        self._channel = _channel(endpoint)
        self._secret = secret
        stubs: Any = admin_pb2_grpc
        shown: Any = _Harmless(self._channel)
        self.adapters: Any = stubs.AdaptersStub(shown)
        self.backends: Any = stubs.BackendsStub(shown)
        self.configuration: Any = stubs.ConfigurationStub(shown)
        self.queues: Any = stubs.QueuesStub(shown)
        self.pool: Any = stubs.PoolStub(shown)
        self.replicas: Any = stubs.ReplicasStub(shown)
        self.access: Any = stubs.AccessStub(shown)
        data: Any = gateway_pb2_grpc
        self.gateway: Any = data.GatewayStub(self._channel)

    def ask(self, method: Any, request: Any, timeout_s: float | None = ANSWER_TIMEOUT_S) -> Any:
        return method(request, timeout=timeout_s, metadata=self._metadata)

    def list_adapters(self, timeout_s: float = ANSWER_TIMEOUT_S, **asked: Any) -> Iterator[Any]:
        """Yield the registered adapters by name, page by page; `asked` are fields of `ListAdaptersRequest`."""
        request = admin_pb2.ListAdaptersRequest(**asked)
        while True:
            page = self.ask(self.adapters.List, request, timeout_s)
            yield from page.adapters
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    @cached_property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return _metadata(self.endpoint, self._secret)  # with the first call: a login that has ended hinders no new one

    def close(self) -> None:
        self._channel.close()


class _Harmless:
    """A channel whose answers can be shown: names, ids and reasons come from clients, engines and their texts."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def __getattr__(self, kind: str) -> Any:
        return partial(self._made, getattr(self._channel, kind))

    def _made(self, make: Any, method: str, *, response_deserializer: Any, **others: Any) -> Any:
        return make(method, response_deserializer=lambda data: _made_harmless(response_deserializer(data)), **others)


def _made_harmless(message: Message) -> Message:
    for field, value in message.ListFields():
        if isinstance(value, str):
            if not value.isprintable():
                setattr(message, field.name, harmless(value))
        elif isinstance(value, Message):
            _made_harmless(value)
        elif hasattr(value, "items"):
            labels = {_text(name): _text(each) for name, each in value.items()}
            value.clear()
            value.update(labels)
        elif field.message_type is not None:
            for each in value:
                _made_harmless(each)
        elif field.is_repeated and field.cpp_type == field.CPPTYPE_STRING:
            value[:] = map(_text, value)
    return message


def _text(value: Any) -> Any:
    return harmless(value) if isinstance(value, str) else value


def _channel(endpoint: Endpoint) -> grpc.Channel:
    options = (("grpc.max_receive_message_length", -1), ("grpc.enable_retries", 0))
    if not endpoint.speaks_tls:
        return grpc.insecure_channel(endpoint.address, options)
    credentials = grpc.ssl_channel_credentials(_read(endpoint.ca), _read(endpoint.key), _read(endpoint.certificate))
    return grpc.secure_channel(endpoint.address, credentials, options)


def _renewed(credential: credentials.Credential, address: str) -> credentials.Credential:
    from sidecar.cli.device_flow import renewed  # of few commands, and slow to import

    return renewed(credential, address)


def _metadata(endpoint: Endpoint, secret: str | None) -> tuple[tuple[str, str], ...]:
    """Return the credential to send: the given one, that of the token file, or that of `sidecar login`."""
    what = "your login's credential"
    if secret is None and endpoint.token_file is not None:
        secret, what = _token_in(endpoint.token_file), f"the token in {endpoint.token_file}"
    if secret is None:
        secret = credentials.secret_for(endpoint.address, _renewed)
    if secret is None:
        return ()
    if not (endpoint.speaks_tls or endpoint.allow_cleartext or _is_local(endpoint.address)):
        raise CommandError(
            f"{what} would go to {endpoint.address} in clear text; name the CA that signed the listener with --ca, "
            "which turns TLS on, or say --allow-cleartext where the network encrypts",
            Exit.MISUSED,
        )
    return (("authorization", f"Bearer {secret}"),)


def _token_in(file: Path) -> str:
    return credentials.secret_in((_read(file) or b"").decode(errors="replace"), str(file))


def _is_local(address: str) -> bool:
    from sidecar.config.listeners import is_local

    return is_local(address) or address.startswith("unix:")


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}", Exit.MISUSED, Reason.CONFIG_INVALID.value) from error


@contextmanager
def connected(endpoint: Endpoint, secret: str | None = None) -> Iterator[Client]:
    """Yield a client; failed calls raise CommandError."""
    client = Client(endpoint, secret)
    try:
        yield client
    except grpc.RpcError as error:
        raise call_failed(error, endpoint) from error
    finally:
        client.close()


def call_failed(error: Any, endpoint: Endpoint) -> CommandError:
    """Return the error for a failed call: the sidecar's own message, or that no sidecar was reached."""
    info, retry_after_ms = _details(error)
    if info is not None:
        details: dict[str, Any] = dict(sorted(info.metadata.items()))
        if retry_after_ms is not None:
            details["retry_after_ms"] = retry_after_ms
        said = error.details()
        if info.reason == Reason.UNAUTHENTICATED.value and "--token-file" not in said:
            said += "; --token-file FILE sends the key or the token in a file"
            if endpoint.listener == "admin":  # login asks the admin listener, and keeps what it was taken for there
                said += ", sidecar login keeps one for this address"
        if info.reason == Reason.QUARANTINED.value and "adapters release" not in said and "adapter" in details:
            said += f'; operators do so with "sidecar adapters release {details["adapter"]}"'
        code = Exit.MISUSED if info.reason == Reason.CONFIG_INVALID.value else Exit.FAILED
        return CommandError(said, code, info.reason, code=error.code().name, **details)
    code, said = error.code(), error.details() or ""
    where = f"the {endpoint.listener} listener of a sidecar at {endpoint.address}"
    if code is grpc.StatusCode.UNIMPLEMENTED or "Failed parsing HTTP/2" in said:  # it speaks HTTP/1.1
        usual = ADMIN_DEFAULT if endpoint.listener == "admin" else SERVER_DEFAULT
        return CommandError(
            f"{endpoint.address} is not the {endpoint.listener} listener of a sidecar, which is usually "
            f"{usual}; name it with {endpoint.option}",
            Exit.UNREACHABLE,
            code=code.name,
        )
    if code is grpc.StatusCode.UNAVAILABLE:
        cause = said.rpartition(": ")[2].removesuffix("]")  # of a list in which gRPC has it
        return CommandError(f"cannot reach {where} {_why_unreached(cause, endpoint)}", Exit.UNREACHABLE, code=code.name)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return CommandError(f"{where} did not answer in time", Exit.UNREACHABLE, code=code.name)
    return CommandError(said or code.name, Exit.FAILED, code=code.name)


def _why_unreached(cause: str, endpoint: Endpoint) -> str:
    """Return the reason and the way out for a failed connection, if gRPC's message means a TLS problem."""
    host = endpoint.address.rpartition(":")[0]
    if not endpoint.speaks_tls and (cause == "Socket closed" or "reset by peer" in cause):
        return f"({cause}): it may speak TLS; give the CA that signed it with --ca"
    if endpoint.speaks_tls and ("Hostname Verification" in cause or "Peer name" in cause):
        return f"by TLS: its certificate does not name {host}; give {endpoint.option} a name that it has"
    if endpoint.speaks_tls and cause == "OK":  # gRPC's complete message for a failed handshake
        return (
            "by TLS: the CA of --ca did not sign its certificate, or it does not speak TLS, or asks for --certificate"
        )
    address = endpoint.address
    if not (address.startswith("unix") or address.rpartition(":")[2].isdigit()):
        return f"({cause}): the address has no port; give it as HOST:PORT with {endpoint.option}"
    start = "sidecar serve --backend triton://HOST:PORT --adapters FOLDER"
    return f'({cause}); start one with "{start}" or name its address with {endpoint.option}'


def _details(error: Any) -> tuple[Any, int | None]:
    """Return the ErrorInfo of a failed call and the milliseconds of its RetryInfo."""
    from google.rpc import error_details_pb2
    from grpc_status import rpc_status

    info, retry_after_ms = None, None
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # the details belong to another error: a proxy replaced the call's
        status = None
    for detail in () if status is None else status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo.FromString(detail.value)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry_after_ms = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay.ToMilliseconds()
    return info, retry_after_ms
