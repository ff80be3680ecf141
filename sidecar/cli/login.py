"""`sidecar login`, `logout` and `whoami`: each command sends your own credential, so that the audit names you."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from sidecar.cli import credentials
from sidecar.cli.client import Client, connected
from sidecar.cli.credentials import Credential
from sidecar.cli.endpoint import admin_command
from sidecar.cli.exits import CommandError, Exit, say
from sidecar.cli.show import AsJson, print_json, with_never
from sidecar.proto import admin_pb2 as pb

OIDC = "OIDC"
SCOPE = "openid offline_access"
"""With offline_access, providers give a refresh token."""


@admin_command
def login(
    client: Client,
    key_file: Annotated[Path | None, typer.Option(help="File with an API key or a token.", show_default=False)] = None,
    token_stdin: Annotated[bool, typer.Option("--token-stdin", help="Read an API key or a token from stdin.")] = False,
    issuer: Annotated[
        str, typer.Option(help="The provider's URL; sign in there.", rich_help_panel=OIDC, show_default=False)
    ] = "",
    client_id: Annotated[
        str, typer.Option(help="Our client at the provider.", rich_help_panel=OIDC, show_default=False)
    ] = "",
    scope: Annotated[str, typer.Option(help="What is asked for.", rich_help_panel=OIDC)] = SCOPE,
    issuer_ca: Annotated[
        Path | None, typer.Option(help="Authority that signed it (PEM).", rich_help_panel=OIDC, show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Keep a credential for the admin listener; later commands send it there, and the audit names you.

    It is an API key, a token, or what an OIDC provider gives after you have signed in with a browser (device flow);
    that is renewed by itself. The file is lora-sidecar/credentials.json in your configuration folder, for you only.
    """
    if (key_file is not None) + token_stdin + bool(issuer) != 1 or bool(issuer) != bool(client_id):
        raise CommandError("give one of --key-file, --token-stdin, or --issuer with --client-id", Exit.MISUSED)
    if issuer:
        from sidecar.cli.device_flow import sign_in

        ca = "" if issuer_ca is None else str(issuer_ca.resolve())
        wanted = Credential("", issuer=issuer, client_id=client_id, issuer_ca=ca)
        credential = sign_in(wanted, scope, lambda text: print(text, file=sys.stderr, flush=True))
    else:
        credential = Credential(_secret(key_file))
    with connected(client.endpoint, credential.secret) as asking:  # kept only if the sidecar takes it
        who = asking.ask(asking.access.WhoAmI, pb.WhoAmIRequest())
    credentials.keep(client.endpoint.address, credential)
    if as_json:
        print_json(with_never(who, "expires_at"))
    else:
        say(f"logged in at {client.endpoint.address} as {_phrase(who)}")


def _secret(key_file: Path | None) -> str:
    """Return the first line of the file, or of stdin. Raises CommandError, which never contains it."""
    where = "stdin" if key_file is None else str(key_file)
    text = sys.stdin.readline() if key_file is None else key_file.read_text(errors="replace")
    return credentials.secret_in(text, where)


@admin_command
def logout(client: Client, as_json: AsJson = False) -> None:
    """Forget the credential that is kept for the admin listener. A key stays good until it is revoked."""
    address = client.endpoint.address
    was_there = credentials.forget(address)
    if as_json:
        print_json({"address": address, "logged_out": was_there})
    else:
        say(f"logged out of {address}" if was_there else f"there was no login at {address}")


@admin_command
def whoami(client: Client, as_json: AsJson = False) -> None:
    """Show who the sidecar takes you for, and how that is proven."""
    who = client.ask(client.access.WhoAmI, pb.WhoAmIRequest())
    if as_json:
        print_json(with_never(who, "expires_at"))
    else:
        say(_phrase(who))


def _phrase(who: Any) -> str:
    name = who.subject or ("an operator" if "operator" in who.roles else "nobody in particular")
    parts = [
        f"{name} of tenant {who.tenant}" if who.tenant else name,
        f"roles {', '.join(who.roles)}" if who.roles else "",
        f"groups {', '.join(who.groups)}" if who.groups else "",
        f"proven by: {who.proof}",
        f"until {datetime.fromtimestamp(who.expires_at, UTC):%Y-%m-%d %H:%M} UTC" if who.expires_at else "",
    ]
    return "; ".join(part for part in parts if part)
