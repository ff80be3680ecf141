"""A machine on the way read an operator's token: neither side sends or takes one in clear text by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sidecar.config import parse
from sidecar.errors import Misused
from tests.kit.cli_runs import Ended, runner

ANYWHERE = ["0.0.0.0:9001", "[::]:9001", "10.0.0.7:9001", "admin.example:9001"]
HERE = ["127.0.0.1:9001", "localhost:9001", "[::1]:9001", "unix:/run/admin"]
TLS = {"certificate": "/c", "key": "/k"}


@pytest.fixture
def sidecar(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Return a function that runs one command here and now."""
    return runner(capfd)


def admin(**record: Any) -> Any:
    return parse({"listeners": {"admin": {"token_file": "/token"} | record}}, "the test").listeners.admin


@pytest.mark.parametrize("address", ANYWHERE)
def test_a_listener_that_other_machines_reach(address: str) -> None:
    """A token alone is no protection there; TLS is, or somebody who says that the network encrypts."""
    with pytest.raises(Misused, match=r"clear text.*tls.*allow_cleartext"):
        admin(address=address)
    assert admin(address=address, tls=TLS).token_file == "/token"
    assert admin(address=address, allow_cleartext=True).allow_cleartext


@pytest.mark.parametrize("address", HERE)
def test_a_listener_of_this_machine(address: str) -> None:
    assert admin(address=address).tls is None


def test_leave_to_send_in_clear_text_is_no_protection() -> None:
    """Without a token or certificates a listener that others reach is refused as before."""
    with pytest.raises(Misused, match="unprotected"):
        parse({"listeners": {"admin": {"address": "0.0.0.0:9001", "allow_cleartext": True}}}, "the test")


@pytest.mark.parametrize("command", [("adapters", "list"), ("queue",), ("backends", "check")])
def test_a_command_that_would_send_one(command: tuple[str, ...], sidecar: Callable[..., Ended], tmp_path: Path) -> None:
    """To another machine without TLS it does not even connect; the ways out are named, and taken."""
    token = tmp_path / "token"
    token.write_text("secret\n")
    there = (*command, "--admin", "192.0.2.1:1")
    refused = sidecar(*there, "--token-file", str(token))
    assert refused.code == 2
    assert all(word in refused.err for word in ("clear text", "--ca", "--allow-cleartext"))
    assert "secret" not in refused.err
    here = sidecar(*command, "--admin", "127.0.0.1:1", "--token-file", str(token))
    assert here.code == 4
    allowed = sidecar(*command, "--admin", "localhost.:1", "--token-file", str(token), "--allow-cleartext")
    assert allowed.code == 4
