"""A sidecar's listeners, as a command reaches one of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sidecar.cli.exits import CommandError, Exit

SERVER_DEFAULT, SERVER_VARIABLE = "127.0.0.1:9000", "LORA_SIDECAR_SERVER"
ADMIN_DEFAULT, ADMIN_VARIABLE = "127.0.0.1:9001", "LORA_SIDECAR_ADMIN"
TOKEN_FILE_VARIABLE = "LORA_SIDECAR_TOKEN_FILE"
CA_VARIABLE = "LORA_SIDECAR_CA"
CLEARTEXT_VARIABLE = "LORA_SIDECAR_ALLOW_CLEARTEXT"
CLIENT_VARIABLES = (SERVER_VARIABLE, ADMIN_VARIABLE, TOKEN_FILE_VARIABLE, CA_VARIABLE, CLEARTEXT_VARIABLE)
"""Environment variables of client commands; they are not keys of the server's configuration."""


@dataclass(frozen=True)
class Endpoint:
    """One listener of a sidecar, and how to reach it. Raises CommandError for an empty address."""

    address: str
    listener: str
    option: str
    token_file: Path | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    allow_cleartext: bool = False

    def __post_init__(self) -> None:
        if not self.address.strip():
            raise CommandError(f"{self.option} names no address: give HOST:PORT or unix:PATH", Exit.MISUSED)

    @property
    def speaks_tls(self) -> bool:
        return self.ca is not None or self.certificate is not None
