"""The keys of an issuer, fetched from a real HTTPS server that is honest, slow, endless, elsewhere, or away."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sidecar.access import jwks
from tests.kit.authority import NEEDS_OPENSSL
from tests.kit.issuing import House, claims
from tests.kit.jwks_server import JwksServer, jwks_server
from tests.kit.jwts import Signer, jwks_of
from tests.kit.serving import until

pytestmark = NEEDS_OPENSSL
KEY, NEW = Signer(), Signer(kid="two")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a busy machine the time for a fetch, where a test is not about that time."""
    monkeypatch.setattr(jwks, "WAIT_S", 60.0)
    monkeypatch.setattr(jwks, "FETCH_S", 60.0)


@asynccontextmanager
async def issuing(folder: Path, *, started: bool = True, **options: str) -> AsyncIterator[tuple[JwksServer, House]]:
    """Run a server of one key, and a verifier that has fetched it if it is `started`."""
    async with jwks_server(folder) as server:
        server.publish(jwks_of(KEY))
        made = House(folder, **{"jwks": server.url, "jwks_ca": str(server.ca)} | options)
        try:
            if started:
                made.tokens.start()
                assert await made.tokens.verify(KEY.token(claims()))
            yield server, made
        finally:
            server.released.set()
            await made.tokens.stop()


async def test_ten_thousand_unknown_key_ids_cause_one_fetch(tmp_path: Path) -> None:
    async with issuing(tmp_path) as (server, made):
        assert len(server.heads) == 1
        forged = [Signer(kid=f"{count}", name="mallory").token(claims()) for count in range(10_000)]
        await made.refused(forged[0], "its issuer publishes no such key")
        assert len(server.heads) == 1, "it was asked a moment ago"
        made.clock.now += 60
        results = await asyncio.gather(*map(made.tokens.verify, forged), return_exceptions=True)
        assert all("publishes no such key" in str(result) for result in results)
        assert len(server.heads) == 2
        assert await made.tokens.verify(KEY.token(claims()))


async def test_a_token_of_a_new_key_is_taken_once_it_is_published(tmp_path: Path) -> None:
    """All that come with it wait for the one fetch."""
    async with issuing(tmp_path) as (server, made):
        server.publish(jwks_of(KEY, NEW))
        made.clock.now += 60
        tokens = [NEW.token(claims(jti=f"{count}")) for count in range(20)]
        assert len(await asyncio.gather(*map(made.tokens.verify, tokens))) == 20
        assert len(server.heads) == 2


async def test_a_wrong_signature_by_a_known_key_id_causes_no_fetch(tmp_path: Path) -> None:
    async with issuing(tmp_path) as (server, made):
        made.clock.now += 60
        await made.refused(Signer(name="mallory").token(claims()), "its signature is invalid")
        assert len(server.heads) == 1


async def test_a_server_that_hangs_keeps_nobody_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Known keys count meanwhile; who waits for a new one is refused before the fetch is given up."""
    async with issuing(tmp_path) as (server, made):
        monkeypatch.setattr(jwks, "WAIT_S", 0.05)
        monkeypatch.setattr(jwks, "FETCH_S", 60)
        server.answer = server.hang
        made.clock.now += 60
        await made.refused(NEW.token(claims()), "its issuer publishes no such key")
        await until(lambda: len(server.heads) == 2)
        assert caplog.text == ""
        assert await made.tokens.verify(KEY.token(claims(jti="another")))
        await made.refused(NEW.token(claims()), "its issuer publishes no such key")
        assert len(server.heads) == 2


@pytest.mark.parametrize(
    ("answer", "fetch_s", "said"),
    [
        (lambda server: server.drip, 0.3, "TimeoutError"),
        (lambda server: server.flood, 60, "it is larger than 1048576 bytes"),
    ],
    ids=["drips", "floods"],
)
async def test_an_endless_answer_ends(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    answer: Callable[[JwksServer], object],
    fetch_s: float,
    said: str,
) -> None:
    async with issuing(tmp_path) as (server, made):
        monkeypatch.setattr(jwks, "FETCH_S", fetch_s)
        server.answer = answer(server)  # type: ignore[assignment]
        made.clock.now += 60
        await made.refused(NEW.token(claims()), "its issuer publishes no such key")
        await until(lambda: said in caplog.text)
        assert server.sent_bytes < 64 << 20
        assert await made.tokens.verify(KEY.token(claims(jti="another")))


@pytest.mark.parametrize(
    ("status", "headers", "body", "said"),
    [
        ("302 Found", "location: http://localhost:1/jwks.json\r\n", b"", "the server redirects; set jwks to the URL"),
        ("301 Moved Permanently", "location: https://localhost/\r\n", b"", "the server redirects"),
        ("500 Internal Server Error", "", jwks_of(NEW), "the server answers 500"),
        ("204 No Content", "", b"", "the server answers 204"),
        ("200 OK", "content-encoding: gzip\r\n", jwks_of(NEW), "the server compresses"),
        ("200 OK", "", b"<html>Sign in</html>", "it is not JSON"),
        ("200 OK", "", b"", "it is not JSON"),
        ("200 OK", "", b"\xff\xfe", "it is not UTF-8"),
        ("200 OK", "", b"[]", "it is not a JSON object"),
        ("200 OK", "", b"{}", "it has no list of keys"),
        ("200 OK", "", b'{"keys": {}}', "it has no list of keys"),
        ("200 OK", "", b'{"keys": [], "keys": []}', "the key 'keys' occurs twice"),
        ("200 OK", "", json.dumps({"keys": [NEW.jwk] * 101}).encode(), "it has 101 keys; at most 100"),
        ("200 OK", "", b"[" * 100_000, "it is nested too deeply"),
    ],
)
async def test_whatever_else_a_server_answers_the_known_keys_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, status: str, headers: str, body: bytes, said: str
) -> None:
    async with issuing(tmp_path) as (server, made):
        server.publish(body, status=status, headers=headers)
        made.clock.now += 60
        await made.refused(NEW.token(claims()), "its issuer publishes no such key")
        assert len(server.heads) == 2
        await until(lambda: said in caplog.text)
        assert "the present ones count for" in caplog.text
        assert await made.tokens.verify(KEY.token(claims(jti="another")))
        server.publish(jwks_of(NEW))
        made.clock.now += 60
        assert await made.tokens.verify(NEW.token(claims()))
        assert "are fetched again" in caplog.text


async def test_an_issuer_that_is_away_at_the_start_is_asked_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with issuing(tmp_path, started=False) as (server, made):
        server.publish(b"", status="503 Service Unavailable")
        made.tokens.start()
        await made.waits_for_keys(KEY.token(claims()))
        assert "its tokens are refused" in caplog.text
        server.publish(jwks_of(KEY))
        made.clock.now += 60
        assert await made.tokens.verify(KEY.token(claims()))


@pytest.mark.parametrize("ca", ["other", "none", "missing", "pipe"])
async def test_a_server_of_another_authority_is_not_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ca: str
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    async with jwks_server(other) as stranger, issuing(tmp_path, started=False) as (server, _):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)  # to which nobody writes
        paths = {"other": str(stranger.ca), "missing": "/no/ca.pem", "pipe": str(pipe)}
        authority = {"jwks_ca": paths[ca]} if ca in paths else {}
        made = House(tmp_path, jwks=server.url, **authority)
        made.tokens.start()
        await made.waits_for_keys(KEY.token(claims()))
        await made.tokens.stop()
        assert server.heads == []
        wanted = f"jwks_ca {paths[ca]} cannot be used" if ca in ("missing", "pipe") else "CERTIFICATE_VERIFY_FAILED"
        assert wanted in caplog.text


async def test_a_kubernetes_api_server_gets_the_token_of_the_pod(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is read for each fetch, because the kubelet replaces it; and is never shown."""
    file = tmp_path / "token"
    file.write_text("first-secret\n")
    async with issuing(tmp_path, jwks_token_file=str(file)) as (server, made):
        assert "authorization: bearer first-secret\r\n" in server.heads[0].lower()
        file.write_text("second-secret")
        made.clock.now += 60
        await made.refused(NEW.token(claims()))
        assert "authorization: bearer second-secret\r\n" in server.heads[1].lower()
        file.write_text("third-secret\nwith: another header")
        made.clock.now += 60
        await made.refused(NEW.token(claims()))
        assert len(server.heads) == 2
        assert "token holds no token" in caplog.text
    assert "secret" not in caplog.text
    assert all(record.levelno < logging.ERROR for record in caplog.records)
