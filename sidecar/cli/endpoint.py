"""The options of commands that connect to a sidecar."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sidecar.cli.listener import (
    ADMIN_DEFAULT,
    ADMIN_VARIABLE,
    CA_VARIABLE,
    CLEARTEXT_VARIABLE,
    SERVER_DEFAULT,
    SERVER_VARIABLE,
    TOKEN_FILE_VARIABLE,
    Endpoint,
)

PANEL = "Connection"
ENGINES = "triton://, vllm://, sglang:// or trtllm:// with HOST:PORT"
"""How an engine is named, for help texts."""

Command = Callable[..., "int | None"]


def admin_command(body: Command) -> Command:
    """Turn a function into a command that connects to the admin listener; its first parameter is the `Client`."""
    return _command(body, "admin", "--admin", ADMIN_DEFAULT, ADMIN_VARIABLE, (_TOKEN_FILE, *_TLS_FILES, _CLEARTEXT))


def data_command(body: Command) -> Command:
    """Turn a function into a command that connects to the data listener; its first parameter is the `Client`."""
    return _command(body, "data", "--server", SERVER_DEFAULT, SERVER_VARIABLE, (_TOKEN_FILE, *_TLS_FILES, _CLEARTEXT))


def _command(
    body: Command, listener: str, option: str, default: str, variable: str, more: tuple[inspect.Parameter, ...]
) -> Command:
    address = inspect.Parameter(
        "address",
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[
            str,
            typer.Option(option, envvar=variable, help=f"Address of the {listener} listener.", rich_help_panel=PANEL),
        ],
    )

    def command(**values: Any) -> int | None:
        from sidecar.cli.client import connected

        connection = {parameter.name: values.pop(parameter.name) for parameter in (address, *more)}
        with connected(Endpoint(listener=listener, option=option, **connection)) as client:
            return body(client, **values)

    own = list(inspect.signature(body, eval_str=True).parameters.values())[1:]
    parameters = [*own, address, *more]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = body.__doc__
    return command


def _file_option(name: str, option: str, text: str, variable: str | None = None) -> inspect.Parameter:
    made = typer.Option(option, envvar=variable, help=text, rich_help_panel=PANEL, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, made]
    )


_TOKEN_FILE = _file_option("token_file", "--token-file", "File with a key or a token to send.", TOKEN_FILE_VARIABLE)
_TLS_FILES = (
    _file_option("ca", "--ca", "PEM file of the CA that signed the listener; turns TLS on.", CA_VARIABLE),
    _file_option("certificate", "--certificate", "PEM file of our own certificate."),
    _file_option("key", "--key", "PEM file of our own key."),
)
AllowCleartext = Annotated[
    bool,
    typer.Option(
        "--allow-cleartext",
        envvar=CLEARTEXT_VARIABLE,
        help="Send the token without TLS to another machine.",
        rich_help_panel=PANEL,
    ),
]
_CLEARTEXT = inspect.Parameter(
    "allow_cleartext",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=AllowCleartext,
)
