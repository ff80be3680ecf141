"""`sidecar login`: keys, tokens, and the device flow against an HTTPS server that follows RFC 8628's examples."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from sidecar.cli import credentials, device_flow
from sidecar.cli.credentials import Credential
from sidecar.cli.exits import CommandError
from tests.kit.authority import NEEDS_OPENSSL, Authority
from tests.kit.cli_runs import Ended, runner
from tests.kit.device_provider import CLIENT_ID, DEVICE, DEVICE_CODE, PENDING, SCOPE, SLOW_DOWN, Provider, provider_in
from tests.kit.serving import Serving, serving
from tests.kit.tokens import AUDIENCE, TokenMaker

pytestmark = NEEDS_OPENSSL
NOON = 1_790_000_000.0
TOKENS = {"access_token": "2YotnFZFEjr1zCsicMWpAA", "expires_in": 3600, "refresh_token": "tGzv3JOkF0XG5Qx2TlKWIA"}
"""RFC 6749, section 5.1."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration folder of this test."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "lora-sidecar"


@pytest.fixture
async def provider(tmp_path: Path) -> AsyncIterator[Provider]:
    authority = Authority(tmp_path)
    await authority.found()
    with provider_in(authority, *(await authority.sign("localhost", "DNS:localhost"))) as found:
        yield found


class Clock:
    """Time that only sleeping moves."""

    def __init__(self) -> None:
        self.now = NOON
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(device_flow, "sleep", made.sleep)
    for module in (device_flow, credentials):
        monkeypatch.setattr(module, "time", made)
    return made


def wanted(provider: Provider) -> Credential:
    return Credential("", issuer=provider.issuer, client_id=CLIENT_ID, issuer_ca=str(provider.ca))


def sign_in(provider: Provider, told: list[str] | None = None) -> Credential:
    return device_flow.sign_in(wanted(provider), SCOPE, (told if told is not None else []).append)


# The flow.


async def test_the_flow_of_the_rfc(provider: Provider, clock: Clock) -> None:
    """The requests are those of sections 3.1 and 3.4; the person is shown the code; pauses are those of section 3.5."""
    provider.answers = [PENDING, SLOW_DOWN, PENDING, (200, TOKENS)]
    told: list[str] = []
    got = await asyncio.to_thread(sign_in, provider, told)
    assert told == [
        "open https://example.com/device in a browser and enter the code WDJB-MJHT",
        "or open https://example.com/device?user_code=WDJB-MJHT",
    ]
    assert provider.asked[1] == ("/device_authorization", {"client_id": CLIENT_ID, "scope": SCOPE})
    grant = "urn:ietf:params:oauth:grant-type:device_code"
    assert provider.forms == [{"grant_type": grant, "device_code": DEVICE_CODE, "client_id": CLIENT_ID}] * 4
    assert clock.slept == [5, 5, 10, 10]
    assert (got.secret, got.refresh_token) == (TOKENS["access_token"], TOKENS["refresh_token"])
    assert got.expires_at == clock.now + 3600


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([PENDING, (400, {"error": "access_denied"})], "the sign-in was denied (HTTP 400: access_denied)"),
        ([(400, {"error": "expired_token"})], "nobody signed in before the code expired"),
        ([PENDING], "nobody signed in before the code expired"),
        ([(401, {"error": "invalid_client", "error_description": "no\x1b[2J client"})], "invalid_client, no?[2J"),
        ([(503, b"<html>")], "answers HTTP 503 without JSON"),
        ([(200, {"token_type": "bearer"})], "has no access_token that can be used"),
        ([(200, {"access_token": "a\r\nb: c"})], "has no access_token that can be used"),
    ],
)  # fmt: skip
async def test_a_sign_in_that_fails(answers: list[Any], says: str, provider: Provider, clock: Clock) -> None:
    """The error has the provider's own words, made printable, and asking ends with the code."""
    provider.answers = answers
    with pytest.raises(CommandError) as failed:
        await asyncio.to_thread(sign_in, provider)
    assert says in failed.value.message
    assert clock.now <= NOON + DEVICE["expires_in"] + 5  # type: ignore[operator]


async def test_a_broken_connection_slows_it_down(provider: Provider, clock: Clock) -> None:
    """Section 3.5: an exponential backoff after a connection that failed."""
    provider.answers = [(0, None), (0, None), (200, TOKENS)]
    await asyncio.to_thread(sign_in, provider)
    assert clock.slept == [5, 10, 20]


@pytest.mark.parametrize(
    ("discovery", "says"),
    [
        ({"issuer": "https://other.example"}, 'is of the issuer "https://other.example"'),
        ({"device_authorization_endpoint": None}, "has no device_authorization_endpoint"),
        ({"device_authorization_endpoint": "http://localhost/device"}, "is no https URL"),
        ({"token_endpoint": "http://localhost/token"}, "is no https URL"),
        ({"token_endpoint": 7}, "is no https URL"),
    ],
)
async def test_a_provider_that_cannot_be_used(
    discovery: dict[str, Any], says: str, provider: Provider, clock: Clock
) -> None:
    """Another issuer's document, a missing endpoint, and one without TLS: no code and no token is asked for there."""
    provider.discovery = discovery
    with pytest.raises(CommandError) as failed:
        await asyncio.to_thread(sign_in, provider)
    assert says in failed.value.message
    assert provider.forms == []


async def test_what_the_provider_shows_cannot_move_the_cursor(provider: Provider, clock: Clock) -> None:
    for name, value in (("user_code", "A\x1b[2J"), ("verification_uri", "https://e.example/\x1b]0;x\x07")):
        provider.device = (200, DEVICE | {name: value})
        with pytest.raises(CommandError):
            await asyncio.to_thread(sign_in, provider)


async def test_an_untrusted_provider(provider: Provider) -> None:
    """Without the CA that signed it, nothing is sent to it."""
    with pytest.raises(CommandError, match="cannot reach the issuer"):
        await asyncio.to_thread(device_flow.sign_in, Credential("", issuer=provider.issuer, client_id="x"), "s", print)
    assert provider.asked == []


# Renewing, and the file.


async def test_a_token_is_renewed_before_it_ends(provider: Provider, clock: Clock, home: Path) -> None:
    """Once for all commands, with the newest refresh token; when the provider has enough of it, the way out is told."""
    old = Credential("old", clock.now + 29, provider.issuer, CLIENT_ID, str(provider.ca), "first")
    credentials.keep("a:1", old)
    provider.answers = [
        (200, {"access_token": "new", "expires_in": 100, "refresh_token": "second"}),
        (200, {"access_token": "newer", "expires_in": 100}),
        (400, {"error": "invalid_grant"}),
    ]

    async def secrets() -> list[str | None]:
        return await asyncio.gather(
            *(asyncio.to_thread(credentials.secret_for, "a:1", device_flow.renewed) for _ in range(8))
        )

    assert await secrets() == ["new"] * 8
    assert [form["refresh_token"] for form in provider.forms] == ["first"]
    clock.now += 100
    assert await secrets() == ["newer"] * 8
    clock.now += 100
    with pytest.raises(CommandError, match="log in again: sidecar login --admin a:1 --issuer https://localhost:"):
        await asyncio.to_thread(credentials.secret_for, "a:1", device_flow.renewed)
    assert [form["refresh_token"] for form in provider.forms] == ["first", "second", "second"]
    assert provider.forms[-1]["grant_type"] == "refresh_token"
    left = await asyncio.to_thread(lambda: {file.name for file in home.iterdir()})
    assert left == {"credentials.json", "credentials.lock"}


def test_the_file_is_the_user_s_own(home: Path) -> None:
    """Mode 0600 in a folder of mode 0700; a file that others can read, and a damaged one, are not used."""
    credentials.keep("a:1", Credential("one"))
    credentials.keep("b:1", Credential("two"))
    file = home / "credentials.json"
    assert (file.stat().st_mode & 0o777, home.stat().st_mode & 0o777) == (0o600, 0o700)
    assert [credentials.secret_for(each, device_flow.renewed) for each in ("a:1", "b:1", "c:1")] == ["one", "two", None]
    assert "one" not in repr(Credential("one", refresh_token="one"))
    file.chmod(0o640)
    with pytest.raises(CommandError, match="others can read it"):
        credentials.secret_for("a:1", device_flow.renewed)
    file.chmod(0o600)
    for damaged in ("{", "[]", '{"a:1": {"secret": "x", "newer": 1}}', '{"a:1": 7}'):
        file.write_text(damaged)
        with pytest.raises(CommandError, match="damaged or of a newer release"):
            credentials.secret_for("a:1", device_flow.renewed)


# The commands, against a sidecar that wants a credential.


class House:
    """A sidecar whose callers have to prove who they are, and a command line."""

    def __init__(self, served: Serving, capfd: pytest.CaptureFixture[str]) -> None:
        self.address, self.data_address = served.sidecar.admin_address, served.sidecar.data_address
        self._command = runner(capfd)

    async def cli(self, *arguments: str) -> Ended:
        return await asyncio.to_thread(self._command, *arguments, "--admin", self.address)


@pytest.fixture
def maker(tmp_path: Path) -> TokenMaker:
    return TokenMaker(tmp_path)


@pytest.fixture
async def house(
    tmp_path: Path, provider: Provider, maker: TokenMaker, capfd: pytest.CaptureFixture[str]
) -> AsyncIterator[House]:
    entry = maker.entry | {"issuer": provider.issuer}
    identity = {"mode": "enforce", "issuers": [entry]}
    access = {"policies": {"roles": {"group:operators": ["operator"]}}}
    async with serving([], data_directory=str(tmp_path / "data"), identity=identity, access=access) as served:
        yield House(served, capfd)


@pytest.fixture
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_flow, "sleep", lambda seconds: None)


async def test_a_person_signs_in(house: House, provider: Provider, maker: TokenMaker, no_sleep: None) -> None:
    """The ID token is what the sidecar verifies; from then on each command is that person's, until logout."""
    ann = {"iss": provider.issuer, "sub": "ann@acme.example", "groups": ["operators"]}
    token = maker.token("acme", **ann)
    provider.answers = [PENDING, (200, TOKENS | {"id_token": token})]
    options = ("--issuer", provider.issuer, "--client-id", AUDIENCE, "--issuer-ca", str(provider.ca))
    ended = await house.cli("login", *options)
    assert ended.code == 0, ended.err
    assert "enter the code WDJB-MJHT" in ended.err
    assert ended.out.startswith(f"logged in at {house.address} as ann@acme.example of tenant acme; roles operator; ")
    who = (await house.cli("whoami", "--json")).json()
    assert (who["subject"], who["tenant"], who["proof"]) == ("ann@acme.example", "acme", "token")
    assert who["roles"] == ["operator"], "by access.policies.roles, for a group of hers"
    assert (await house.cli("adapters", "list")).code == 0
    assert (await house.cli("logout")).out == f"logged out of {house.address}\n"
    assert (await house.cli("logout")).out == f"there was no login at {house.address}\n"
    assert (await house.cli("whoami", "--json")).json()["proof"] == "local"
    assert (await house.cli("whoami", "--json")).json()["expires_at"] is None


async def test_a_key_is_kept_only_if_it_is_taken(
    house: House, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file or stdin; a wrong one is told as such, without a word of it, and leaves the former login."""
    made = (await house.cli("keys", "create", "--tenant", "acme", "--role", "operator", "--json")).json()
    file = tmp_path / "key"
    file.write_text(made["secret"] + "\n")
    assert f"as {made['id']} of tenant acme" in (await house.cli("login", "--key-file", str(file))).out
    monkeypatch.setattr("sys.stdin", io.StringIO("lsk_wrong\n"))
    wrong = await house.cli("login", "--token-stdin", "--json")
    assert wrong.error()["reason"] == "UNAUTHENTICATED"
    assert "lsk_wrong" not in wrong.err
    monkeypatch.setattr("sys.stdin", io.StringIO(made["secret"]))
    assert (await house.cli("login", "--token-stdin", "--json")).json()["subject"] == made["id"]
    kept = json.loads((home / "credentials.json").read_text())
    assert [kept[house.address][name] for name in ("secret", "issuer", "refresh_token")] == [made["secret"], "", ""]
    await house.cli("keys", "revoke", made["id"])
    refused = (await house.cli("whoami", "--json")).error()
    assert refused["reason"] == "UNAUTHENTICATED"
    assert refused["message"].endswith("in a file, sidecar login keeps one for this address")


async def test_a_credential_is_never_sent_in_clear_text(house: House, tmp_path: Path) -> None:
    """Neither by login nor by a later command; the check is before any connection."""
    file = tmp_path / "key"
    file.write_text("lsk_secret\n")
    command = house._command
    for arguments in (("login", "--key-file", str(file)), ("adapters", "list")):
        credentials.keep("192.0.2.1:9001", Credential("lsk_secret"))
        ended = await asyncio.to_thread(command, *arguments, "--admin", "192.0.2.1:9001")
        assert ended.code == 2
        assert "your login's credential would go to 192.0.2.1:9001 in clear text" in ended.err
        assert "lsk_secret" not in ended.err


@pytest.mark.parametrize(
    "options",
    [(), ("--issuer", "https://x.example"), ("--client-id", "x"), ("--token-stdin", "--key-file", "x"),
     ("--issuer", "http://x.example", "--client-id", "x"), ("--key-file", "EMPTY")],
)  # fmt: skip
async def test_a_login_without_sense(options: tuple[str, ...], house: House, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    ended = await house.cli("login", *(str(tmp_path / "empty") if each == "EMPTY" else each for each in options))
    assert (ended.code, ended.out) == (2, "")


async def test_generate_sends_a_credential(house: House, tmp_path: Path, provider: Provider) -> None:
    """`--token-file` has the key for the data listener, under the same rule about clear text."""
    made = (await house.cli("keys", "create", "--tenant", "acme", "--json")).json()
    file = tmp_path / "key"
    file.write_text(made["secret"])
    for options, reason in ((("--token-file", str(file)), "UNKNOWN_ADAPTER"), ((), "UNAUTHENTICATED")):
        command = ("generate", "nobody", "hi", "--json", "--server", house.data_address, *options)
        assert (await asyncio.to_thread(house._command, *command)).error()["reason"] == reason
    far = await asyncio.to_thread(
        house._command, "generate", "x", "hi", "--server", "192.0.2.1:9000", "--token-file", str(file)
    )
    assert (far.code, "in clear text" in far.err, made["secret"] in far.err) == (2, True, False)
