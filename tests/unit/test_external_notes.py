"""What `sidecar config check` says of an external check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sidecar.access.configured import check
from sidecar.config import parse

ADDRESS = "127.0.0.1:9191"


def notes(mode: str = "enforce", more: dict[str, Any] | None = None, **external: Any) -> str:
    identity = {"mode": mode, "external": {"address": ADDRESS} | external}
    return "\n".join(check(parse({"identity": identity | (more or {})}, "the test")))


def test_it_says_what_calls_wait_for() -> None:
    waits = f"each call of a client waits for {ADDRESS}, 0.5 s at most, and is refused without its consent"
    assert waits in notes()
    assert "what that would deny is only recorded" in notes("observe")
    assert "waits" not in notes("observe")
    assert "calls wait for the check" in notes("observe", {"keys": False}, proves=True)


def test_it_says_which_header_is_not_sent() -> None:
    assert "x-forwarded-client-cert is not sent" in notes()
    assert "is not sent" not in notes(headers=["authorization"])
    mesh = {"certificates": {"forwarded": {"strict_mutual_tls": True}}, "local_admin": False}
    assert "is not sent" not in notes(more=mesh)


def test_it_names_files_that_are_not_there(tmp_path: Path) -> None:
    there = tmp_path / "ca.pem"
    there.write_text("")
    found = notes(tls={"ca": str(there), "key": str(tmp_path / "none.key")})
    assert f"tls.key: there is no file {tmp_path / 'none.key'} here" in found
    assert "tls.ca" not in found
