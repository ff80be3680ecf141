"""How long the keys of an issuer count: rotation, outages and restarts, by the test's clock."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from sidecar.access.jwks import Jwks, fetch_jwks
from sidecar.config.identity import Issuer
from tests.kit.issuing import AUDIENCE, NAME, Clock, House, claims, house
from tests.kit.jwts import Signer, base64url, jwks_of, number

OLD, NEW = Signer(kid="old"), Signer(kid="new")


class Pauses:
    """The pauses between fetches: each ends when the test says so, and the clock goes on by as much."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._begun: asyncio.Queue[float] = asyncio.Queue()
        self._ended: asyncio.Queue[None] = asyncio.Queue()

    async def sleep(self, seconds: float) -> None:
        self._begun.put_nowait(seconds)
        await self._ended.get()

    async def begun(self) -> float:
        """Wait for the fetch before a pause, and return the pause's length in seconds."""
        async with asyncio.timeout(60):
            return await self._begun.get()

    async def pass_by(self, seconds: float) -> float:
        """End the pause and return the length of the next one, which comes after a fetch."""
        self._clock.now += seconds
        self._ended.put_nowait(None)
        return await self.begun()


class Rotation:
    """The keys of an issuer in a file, and a clock."""

    def __init__(self, folder: Path, clock: Clock | None = None, **options: Any) -> None:
        self.file = folder / "jwks.json"
        self.clock = clock or Clock()
        self.pauses = Pauses(self.clock)
        issuer = Issuer(**{"issuer": NAME, "audience": AUDIENCE, "jwks": str(self.file)} | options)
        self.jwks = Jwks(issuer, folder / "access", self.clock, fetch_jwks, self.pauses.sleep)

    @property
    def kids(self) -> list[str | None]:
        return sorted(key.kid for key in self.jwks.find(None))  # type: ignore[type-var]


async def test_keys_come_and_go_with_the_refresh(tmp_path: Path) -> None:
    it = Rotation(tmp_path, jwks_refresh_s=300)
    it.file.write_bytes(jwks_of(OLD))
    it.jwks.start()
    assert await it.pauses.begun() == 300
    assert it.kids == ["old"]
    (old,) = it.jwks.find("old")
    it.file.write_bytes(jwks_of(OLD, NEW))
    assert it.kids == ["old"]
    await it.pauses.pass_by(300)
    assert it.kids == ["new", "old"]
    assert it.jwks.holds(old)
    it.file.write_bytes(jwks_of(NEW))
    await it.pauses.pass_by(300)
    assert it.kids == ["new"]
    assert not it.jwks.holds(old)
    await it.jwks.stop()


async def test_an_issuer_that_publishes_no_key_has_none(tmp_path: Path) -> None:
    it = Rotation(tmp_path)
    it.file.write_bytes(jwks_of(OLD))
    it.jwks.start()
    await it.pauses.begun()
    it.file.write_bytes(jwks_of())
    await it.pauses.pass_by(300)
    assert it.jwks.is_empty
    await it.jwks.stop()


async def test_keys_count_for_a_day_without_their_issuer_and_no_longer(tmp_path: Path) -> None:
    it = Rotation(tmp_path, jwks_stale_max_s=24 * 3600)
    it.file.write_bytes(jwks_of(OLD))
    it.jwks.start()
    await it.pauses.begun()
    (old,) = it.jwks.find("old")
    it.file.unlink()
    assert await it.pauses.pass_by(24 * 3600 - 1) == 10, "it is asked again sooner"
    assert it.kids == ["old"]
    assert it.jwks.holds(old)
    await it.pauses.pass_by(1)
    assert it.kids == []
    assert it.jwks.is_empty
    assert not it.jwks.holds(old)
    it.file.write_bytes(jwks_of(OLD))
    assert await it.pauses.pass_by(10) == 300
    assert it.kids == ["old"]
    assert it.jwks.holds(old)
    await it.jwks.stop()


async def test_a_restart_does_not_make_keys_younger(tmp_path: Path) -> None:
    it = Rotation(tmp_path)
    it.file.write_bytes(jwks_of(OLD))
    it.jwks.start()
    await it.pauses.begun()
    await it.jwks.stop()
    it.file.unlink()
    for after_s, kids in ((23 * 3600, ["old"]), (3599, ["old"]), (1, [])):
        it.clock.now += after_s
        again = Rotation(tmp_path, it.clock)
        again.jwks.start()
        assert again.kids == kids, "at once, before any fetch"
        await again.pauses.begun()
        assert again.kids == kids
        await again.jwks.stop()


@pytest.mark.parametrize("damage", ["cut", "empty", "not JSON", "no keys", "future", "another type", "a folder"])
async def test_a_damaged_copy_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    it = Rotation(tmp_path)
    it.file.write_bytes(jwks_of(OLD))
    it.jwks.start()
    await it.pauses.begun()
    await it.jwks.stop()
    it.file.unlink()
    (copy,) = (tmp_path / "access").iterdir()
    record = json.loads(copy.read_text())
    texts = {
        "cut": copy.read_text()[:-10],
        "empty": "",
        "not JSON": "\x00" * 100,
        "no keys": json.dumps(record | {"jwks": "{}"}),
        "future": json.dumps(record | {"fetched_at": it.clock.now + 3600}),
        "another type": json.dumps(record | {"fetched_at": "never"}),
    }
    copy.unlink()
    if damage == "a folder":
        copy.mkdir()
    else:
        copy.write_text(texts[damage])
    again = Rotation(tmp_path, it.clock)
    again.jwks.start()
    await again.pauses.begun()
    assert again.jwks.is_empty
    assert "is not used" in caplog.text
    again.file.write_bytes(jwks_of(NEW))
    await again.pauses.pass_by(10)
    assert again.kids == ["new"]
    await again.jwks.stop()


async def test_the_copy_of_another_address_is_not_used(tmp_path: Path) -> None:
    """Whoever corrects the address of the keys does not mean those of the old one."""
    it = Rotation(tmp_path)
    it.file.write_bytes(jwks_of(OLD))
    it.jwks.start()
    await it.pauses.begun()
    await it.jwks.stop()
    other = Rotation(tmp_path, it.clock, jwks=str(tmp_path / "elsewhere.json"))
    other.jwks.start()
    await other.pauses.begun()
    assert other.jwks.is_empty
    await other.jwks.stop()


async def test_a_disk_that_takes_no_copy_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "access").write_text("in the way")
    it = Rotation(tmp_path)
    it.file.write_bytes(jwks_of(OLD))
    it.jwks.start()
    await it.pauses.begun()
    assert it.kids == ["old"]
    assert "were not copied to" in caplog.text
    await it.jwks.stop()


UNUSABLE: dict[str, Any] = {
    "symmetric": {"kty": "oct", "k": base64url(b"0" * 32), "kid": "x"},
    "of an unknown type": {"kty": "AKP", "alg": "ML-DSA-44", "pub": "AAAA"},
    "without a type": {"n": "AAAA", "e": "AQAB"},
    "private": OLD.jwk | {"d": number(OLD.private.private_numbers().private_value, 32)},
    "short": {"kty": "RSA", "n": number((1 << 1023) + 1), "e": "AQAB"},
    "not on its curve": {"kty": "EC", "crv": "P-256", "x": number(1, 32), "y": number(1, 32)},
    "of an unknown curve": OLD.jwk | {"crv": "P-257"},
    "cut": {"kty": "EC", "crv": "P-256", "x": OLD.jwk["x"]},
    "not base64url": {"kty": "RSA", "n": "+" * 400, "e": "AQAB"},
    "empty": {"kty": "RSA", "n": "A" * 400, "e": ""},
    "with a number as id": OLD.jwk | {"kid": 1},
    "with an odd use": OLD.jwk | {"use": ["sig"]},
    "with a list of odd operations": OLD.jwk | {"key_ops": "everything"},
    "a list": [OLD.jwk],
    "a text": "key",
    "nothing": None,
}


@pytest.mark.filterwarnings("ignore:Key size")
@pytest.mark.parametrize("name", UNUSABLE)
async def test_a_key_that_proves_nothing_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """With a warning, and without those beside it."""
    it = Rotation(tmp_path)
    it.file.write_bytes(jwks_of(NEW, beside=(UNUSABLE[name],)))
    it.jwks.start()
    await it.pauses.begun()
    assert it.kids == ["new"]
    assert "key 0 of the issuer https://issuer.example is not used: " in caplog.text
    await it.jwks.stop()


async def test_a_key_for_encryption_is_left_out_quietly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Many issuers publish one beside those that sign."""
    async with house(tmp_path, NEW, beside=(OLD.jwk | {"use": "enc"},)) as made:
        assert await made.tokens.verify(NEW.token(claims()))
        await made.refused(OLD.token(claims()), "publishes no such key")
    assert caplog.text == ""


async def test_a_known_token_ends_when_the_keys_are_too_old(tmp_path: Path) -> None:
    made = House(tmp_path, jwks_stale_max_s=200)
    made.publish(OLD)
    made.tokens.start()
    token = OLD.token(claims())
    assert await made.tokens.verify(token)
    made.jwks.unlink()
    made.clock.now += 199
    assert await made.tokens.verify(token)
    made.clock.now += 1
    await made.waits_for_keys(token)
    await made.tokens.stop()
