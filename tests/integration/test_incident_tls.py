"""What a sidecar says of itself is captured by TLS, where its http listener speaks that."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from sidecar.errors import Misused
from sidecar.incident.parts import HttpListener, Missing, answers_of
from tests.integration.test_incident import command
from tests.kit.authority import NEEDS_OPENSSL, Authority
from tests.kit.emulated import running_engine
from tests.kit.serving import serving, write_adapters
from tests.unit.test_capture import members_of

FREE: dict[str, Any] = {"address": "127.0.0.1:0"}


@asynccontextmanager
async def serving_by_tls(folder: Path, asks_back: bool) -> AsyncIterator[tuple[Authority, str]]:
    """Serve with TLS on the http listener; give its authority and address. `folder / "config.yaml"` says so."""
    write_adapters(folder / "adapters", 1)
    authority = Authority(folder)
    await authority.found()
    key, certificate = await authority.sign("server", "IP:127.0.0.1")
    tls = {"certificate": str(certificate), "key": str(key)} | ({"ca": str(authority.ca)} if asks_back else {})
    listeners = {"data": FREE, "admin": FREE, "http": FREE | {"tls": tls}}
    (folder / "config.yaml").write_text(json.dumps({"listeners": listeners}))
    async with (
        running_engine(compute="none") as engine,
        serving([engine], folder / "adapters", listeners=listeners, data_directory=str(folder / "data")) as served,
    ):
        yield authority, served.sidecar.http_address


async def capture(folder: Path, *options: str) -> dict[str, str]:
    """Capture; return why each thing is missing. Metrics are there, and of this sidecar, or among those."""
    out = folder / f"{uuid4().hex}.tgz"
    manifest = await command("debug", "capture", "-o", str(out), *options)
    missing = {item["what"]: item["why"] for item in manifest["missing"]}
    metrics = members_of(out).get("metrics.txt")
    assert (metrics is None) is ("metrics" in missing)
    assert metrics is None or b"lora_sidecar_requests_total" in metrics
    return missing


@NEEDS_OPENSSL
async def test_a_listener_that_speaks_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration says that it does; its CA is given, and what is not right is told with the way out."""
    config = ("--config", str(tmp_path / "config.yaml"), "--http")
    async with serving_by_tls(tmp_path, asks_back=False) as (authority, http):
        ca = ("--ca", str(authority.ca))
        assert "metrics" not in await capture(tmp_path, *config, http, *ca)
        assert "metrics" not in await capture(tmp_path, "--data-directory", str(tmp_path / "data"), "--http", http, *ca)
        for options, way_out in (
            ((*config, http), "--ca names the PEM file of the CA"),
            ((*config, http.replace("127.0.0.1", "localhost"), *ca), "--http names the address that its certificate"),
            ((*config, "127.0.0.1:1", *ca), "--http names another address"),
            (("--data-directory", str(tmp_path / "data"), "--http", http), "--ca turns TLS on"),
        ):
            assert way_out in (await capture(tmp_path, *options))["metrics"]
        monkeypatch.setenv("LORA_SIDECAR_CA", str(authority.ca))
        assert "metrics" not in await capture(tmp_path, *config, http)


@NEEDS_OPENSSL
async def test_a_listener_that_asks_for_a_certificate(tmp_path: Path) -> None:
    """One of ours is given; without it that is what is said to be missing."""
    config = ("--config", str(tmp_path / "config.yaml"), "--http")
    async with serving_by_tls(tmp_path, asks_back=True) as (authority, http):
        key, certificate = await authority.sign("operator")
        ca = ("--ca", str(authority.ca))
        ours = ("--certificate", str(certificate), "--key", str(key))
        assert "metrics" not in await capture(tmp_path, *config, http, *ca, *ours)
        missing = await capture(tmp_path, *config, http, *ca)
        assert "--certificate and --key name the PEM files of one" in missing["metrics"]


@NEEDS_OPENSSL
async def test_a_ca_for_a_listener_that_speaks_none(tmp_path: Path) -> None:
    """It is for others: the environment may name it for the admin listener."""
    write_adapters(tmp_path / "adapters", 1)
    authority = Authority(tmp_path)
    await authority.found()
    (tmp_path / "config.yaml").write_text(json.dumps({"listeners": {"http": FREE}}))
    async with running_engine(compute="none") as engine, serving([engine], tmp_path / "adapters") as served:
        config = ("--config", str(tmp_path / "config.yaml"), "--http", served.sidecar.http_address)
        assert "metrics" not in await capture(tmp_path, *config, "--ca", str(authority.ca))


def test_tls_files_that_are_none(tmp_path: Path) -> None:
    """Are a mistake of the command line, and told of with their path."""
    with pytest.raises(Misused, match=f"ca {tmp_path / 'none.pem'}.*No such file"):
        list(answers_of(HttpListener("127.0.0.1:1", {"ca": str(tmp_path / "none.pem")}), Missing()))
