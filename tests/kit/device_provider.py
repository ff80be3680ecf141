"""An OIDC provider over HTTPS with the device flow of RFC 8628, whose examples it uses word for word."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from tests.kit.authority import Authority

CLIENT_ID, SCOPE = "1406020730", "example_scope"
DEVICE_CODE = "GmRhmhcxhwAzkoEqiMEg_DnyEysNkuNhszIySk9eS"
DEVICE = {
    "device_code": DEVICE_CODE,
    "user_code": "WDJB-MJHT",
    "verification_uri": "https://example.com/device",
    "verification_uri_complete": "https://example.com/device?user_code=WDJB-MJHT",
    "expires_in": 1800,
    "interval": 5,
}
"""Section 3.2."""
PENDING, SLOW_DOWN = (400, {"error": "authorization_pending"}), (400, {"error": "slow_down"})
Answer = tuple[int, Any]


@dataclass
class Provider:
    """`asked` has each request's path and form. The token endpoint gives the `answers`, the last one again and again.

    A body that is bytes is sent as it is; None breaks the connection.
    """

    ca: Path
    issuer: str = ""
    discovery: dict[str, Any] = field(default_factory=dict)
    device: Answer = (200, DEVICE)
    answers: list[Answer] = field(default_factory=list)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    @property
    def forms(self) -> list[dict[str, str]]:
        """What the token endpoint was asked."""
        return [form for path, form in self.asked if path == "/token"]

    def answer(self, path: str) -> Answer:
        if path == "/.well-known/openid-configuration":
            return 200, {
                "issuer": self.issuer,
                "device_authorization_endpoint": f"{self.issuer}/device_authorization",
                "token_endpoint": f"{self.issuer}/token",
            } | self.discovery
        if path == "/device_authorization":
            return self.device
        if path == "/token":
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return 404, {}


def _handler(provider: Provider) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({})

        def do_POST(self) -> None:
            assert self.headers["content-type"] == "application/x-www-form-urlencoded"
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            self._send({name: value for name, (value,) in parse_qs(body, strict_parsing=True).items()})

        def _send(self, form: dict[str, str]) -> None:
            provider.asked.append((self.path, form))
            status, body = provider.answer(self.path)
            if body is None:
                self.connection.close()
                return
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *what: Any) -> None:
            """Say nothing."""

    return Handler


@contextmanager
def provider_in(authority: Authority, key: Path, certificate: Path) -> Iterator[Provider]:
    """Serve at localhost with a certificate of the authority."""
    provider = Provider(authority.ca)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(provider))
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    provider.issuer = f"https://localhost:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield provider
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
