"""Sign in at an OIDC provider with a browser on any device (RFC 8628), and renew the tokens (RFC 6749, section 6).

The command line shows an address and a code, and asks the provider until the person has signed in there. It sends the
ID token where the provider gives one, as its audience is the client id, else the access token.
"""

from __future__ import annotations

import json
import ssl
from base64 import urlsafe_b64decode
from collections.abc import Callable, Mapping
from dataclasses import replace
from time import sleep, time
from typing import Any
from urllib.parse import urlsplit

import httpx

from sidecar.cli.credentials import Credential
from sidecar.cli.exits import CommandError, Exit
from sidecar.config.identities import clipped
from sidecar.errors import Reason

TIMEOUT_S = 10.0
INTERVAL_S, SLOWER_S = 5.0, 5.0
"""The default pause between two questions, and what "slow_down" adds to it."""
DISCOVERY = "/.well-known/openid-configuration"
GRANT = "urn:ietf:params:oauth:grant-type:device_code"
DENIED = {
    "access_denied": "the sign-in was denied",
    "expired_token": "nobody signed in before the code expired; log in again",
}


def sign_in(wanted: Credential, scope: str, tell: Callable[[str], None]) -> Credential:
    """Return a credential for the issuer and client of `wanted`; `tell` shows the person what to do.

    Raises CommandError if the provider cannot do this, or if nobody signs in.
    """
    with _client(wanted) as client:
        known = _discovered(client, wanted.issuer)
        endpoint = known.get("device_authorization_endpoint")
        if endpoint is None:
            raise _failed(f"{wanted.issuer} has no device_authorization_endpoint; log in with --key-file", 200, {})
        form = {"client_id": wanted.client_id, "scope": scope}
        status, answer = _post(client, _https(endpoint), form)
        if status != 200:
            raise _failed(f"{wanted.issuer} does not let {wanted.client_id} sign in by device", status, answer)
        code, uri = _word(answer, "user_code"), _https(_word(answer, "verification_uri"))
        tell(f"open {uri} in a browser and enter the code {code}")
        if "verification_uri_complete" in answer:
            tell(f"or open {_https(_word(answer, 'verification_uri_complete'))}")
        return _credential(wanted, _tokens(client, _https(known.get("token_endpoint")), wanted.client_id, answer))


def _tokens(client: httpx.Client, endpoint: str, client_id: str, device: Mapping[str, Any]) -> Mapping[str, Any]:
    """Ask until the person has signed in."""
    form = {"grant_type": GRANT, "device_code": _word(device, "device_code"), "client_id": client_id}
    pause_s = _seconds(device, "interval", INTERVAL_S)
    ends_at = time() + _seconds(device, "expires_in", 600.0)
    while True:
        sleep(pause_s)
        if time() >= ends_at:
            raise _failed(DENIED["expired_token"], 200, {})
        try:
            status, answer = _post(client, endpoint, form)
        except httpx.TransportError:
            pause_s *= 2  # as section 3.5 wants it
            continue
        if status == 200:
            return answer
        error = answer.get("error")
        if error == "slow_down":
            pause_s += SLOWER_S
        elif error != "authorization_pending":
            raise _failed(DENIED.get(str(error), "the provider ended the sign-in"), status, answer)


def renewed(credential: Credential, address: str) -> Credential:
    """Return the credential with new tokens. Raises CommandError if the provider gives none."""
    again = (
        f"the login at {address} has ended; log in again: sidecar login --admin {address} --issuer "
        f"{credential.issuer} --client-id {credential.client_id}"
    )
    if not credential.refresh_token:
        raise _failed(again, 200, {})
    form = {
        "grant_type": "refresh_token",
        "refresh_token": credential.refresh_token,
        "client_id": credential.client_id,
    }
    with _client(credential) as client:
        try:
            known = _discovered(client, credential.issuer)
            status, answer = _post(client, _https(known.get("token_endpoint")), form)
        except httpx.TransportError as error:
            raise _failed(f"cannot reach {credential.issuer} to renew the login ({error})", 200, {}) from error
    if status != 200:
        raise _failed(again, status, answer)
    return _credential(credential, answer)


def _credential(wanted: Credential, tokens: Mapping[str, Any]) -> Credential:
    secret = _word(tokens, "id_token" if "id_token" in tokens else "access_token")
    ends_at = _end_of(secret) or time() + _seconds(tokens, "expires_in", 300.0)
    refresh_token = _word(tokens, "refresh_token") if "refresh_token" in tokens else wanted.refresh_token
    return replace(wanted, secret=secret, expires_at=ends_at, refresh_token=refresh_token)


def _end_of(token: str) -> float:
    """Return the time at which a JWT ends, in Unix seconds, 0 if it is none. The sidecar verifies it, not we."""
    try:
        part = token.split(".")[1]
        return float(json.loads(urlsafe_b64decode(part + "=" * (-len(part) % 4)))["exp"])
    except (ValueError, LookupError, TypeError):
        return 0.0


# Asking the provider.


def _client(wanted: Credential) -> httpx.Client:
    try:
        tls = ssl.create_default_context(cafile=wanted.issuer_ca or None)
    except OSError as error:
        raise CommandError(f"{wanted.issuer_ca}: {error.strerror or error}", Exit.MISUSED) from error
    return httpx.Client(verify=tls, timeout=TIMEOUT_S)


def _discovered(client: httpx.Client, issuer: str) -> Mapping[str, Any]:
    url = _https(issuer.rstrip("/") + DISCOVERY)
    try:
        status, known = _parsed(client.get(url))
    except httpx.TransportError as error:
        raise CommandError(f"cannot reach the issuer {issuer} ({error})", Exit.UNREACHABLE) from error
    if status != 200:
        raise _failed(f"{url} answers HTTP {status}; --issuer is the URL before {DISCOVERY}", status, {})
    if known.get("issuer") != issuer:  # else a token of one issuer would be taken for one of another
        raise _failed(f'{url} is of the issuer "{clipped(str(known.get("issuer")))}"; name that with --issuer', 200, {})
    return known


def _post(client: httpx.Client, url: str, form: Mapping[str, str]) -> tuple[int, Mapping[str, Any]]:
    return _parsed(client.post(url, data=form, headers={"accept": "application/json"}))


def _parsed(response: httpx.Response) -> tuple[int, Mapping[str, Any]]:
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if isinstance(answer, dict):
        return response.status_code, answer
    raise _failed(f"{response.url.copy_with(query=None)} answers HTTP {response.status_code} without JSON", 200, {})


def _https(url: Any) -> str:
    if not isinstance(url, str) or urlsplit(url).scheme != "https" or not url.isprintable():
        raise CommandError(f'"{clipped(str(url))}" is no https URL; the provider must be asked by TLS', Exit.MISUSED)
    return url


def _word(answer: Mapping[str, Any], name: str) -> str:
    """Return a text that can stand in a header and in a terminal."""
    word = answer.get(name)
    if isinstance(word, str) and word and word.isascii() and word.isprintable():
        return word
    raise _failed(f"the provider's answer has no {name} that can be used", 200, {})


def _seconds(answer: Mapping[str, Any], name: str, default: float) -> float:
    value = answer.get(name, default)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and 0 < value < 1e9 else default


def _failed(message: str, status: int, answer: Mapping[str, Any]) -> CommandError:
    """Return an error with the provider's own words, if it has some."""
    words = [clipped(str(answer[name])) for name in ("error", "error_description") if name in answer]
    said = f" (HTTP {status}: {', '.join(words)})" if words else ""
    return CommandError(message + said, Exit.FAILED, Reason.UNAUTHENTICATED.value)
