"""`sidecar emulate`: run an emulated engine until a signal stops it.

The options come from the fields of `Options`, `VllmOptions`, `SglangOptions` and `TrtllmOptions`.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from dataclasses import Field, fields
from inspect import Parameter, Signature
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from rich.console import Console

from sidecar.errors import Misused, Reason
from sidecar.lab.engine.http.driver import EngineDied
from sidecar.lab.engine.kserve import Options, Server, serve
from sidecar.lab.engine.kserve.options import HTTP_ONLY, PANELS, SERVER, SGLANG, TRTLLM
from sidecar.lab.engine.openai import VllmOptions, VllmServer, serve_vllm
from sidecar.lab.engine.openai.sglang import SglangOptions, serve_sglang
from sidecar.lab.engine.spec import VLLM
from sidecar.lab.engine.trtllm import TrtllmOptions, TrtllmServer, serve_trtllm

AnyServer = Server | VllmServer | TrtllmServer
VLLM_NAMES = {"max_model_len": "max_seq_tokens", "max_num_batched_tokens": "max_tokens_per_step"}
"""Options that are also called as vLLM calls them."""
NAMES = {VLLM: "vLLM", SGLANG: "SGLang", TRTLLM: "trtllm-serve"}
GRACE_S = 1.0
"""How long requests in flight may run on after SIGTERM."""


def _parameter(declared: Field[Any], hint: Any) -> Parameter:
    """Return the command-line parameter of an option. One that may be given several times is a list."""
    meta = declared.metadata
    default = meta.get("default", declared.default)
    if default == ():
        default = None
    if get_origin(hint) is tuple:
        hint = str if default else list[str]
    annotation = hint if default is not None or type(None) in get_args(hint) else hint | None
    shown = meta.get("shown", True)
    option = typer.Option(*meta["flags"], help=meta["help"], rich_help_panel=meta["panel"], show_default=shown)
    return Parameter(declared.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, option])


def _signature() -> Signature:
    """Return the options of all kinds of engines as the command's parameters, in the order of their panels."""
    declared: dict[str, Parameter] = {}
    panels: dict[str, list[Parameter]] = {panel: [] for panel in PANELS}
    for kind in (Options, VllmOptions, TrtllmOptions):
        hints = get_type_hints(kind)
        for each in fields(kind):
            if each.metadata and each.name not in declared:
                declared[each.name] = _parameter(each, hints[each.name])
                panels[each.metadata["panel"]].append(declared[each.name])
    for alias, name in VLLM_NAMES.items():
        flag = name.replace("_", "-")
        option = typer.Option(help=f"--{flag}, by vLLM's name.", rich_help_panel=HTTP_ONLY)
        panels[HTTP_ONLY].append(
            Parameter(alias, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[int | None, option])
        )
    as_json = typer.Option("--json", help="Print the ready line as JSON.", rich_help_panel=SERVER)
    panels[SERVER].append(
        Parameter("as_json", Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, as_json])
    )
    return Signature([parameter for panel in panels.values() for parameter in panel])


def emulate(*, as_json: bool, **given: Any) -> None:
    """Run an emulated engine: TensorRT-LLM behind Triton, or vLLM, SGLang or trtllm-serve behind their OpenAI APIs.

    It keeps the engine's LoRA caches, scheduler and timing, computes with a tiny real model, and fails as the
    real one fails. SIGTERM stops it.
    """
    try:
        asyncio.run(_run(_options(given), as_json))
    except Misused as error:
        raise _failed(error.message, as_json, 2, error.reason.value) from error
    except ValueError as error:
        raise _failed(str(error), as_json, 2, Reason.CONFIG_INVALID.value) from error
    except (OSError, RuntimeError) as error:
        raise _failed(str(error), as_json, 1, "FAILED") from error


def _failed(message: str, as_json: bool, code: int, reason: str) -> typer.Exit:
    """Tell an error as the other commands do, and return the end of this one."""
    told = json.dumps({"error": {"message": message, "reason": reason}}) if as_json else f"error: {message} [{reason}]"
    print(told, file=sys.stderr, flush=True)
    return typer.Exit(code)


emulate.__signature__ = _signature()  # type: ignore[attr-defined]


def _options(given: dict[str, Any]) -> Options:
    """Return the options of the engine that `given` asks for; raises ValueError if they contradict each other."""
    given["lora_modules"] = [name for name in given["lora_modules"].split(",") if name]
    for alias, name in VLLM_NAMES.items():
        value = given.pop(alias)
        given[name] = given[name] if value is None else value
    kinds: dict[str, type[Options]] = {VLLM: VllmOptions, SGLANG: SglangOptions, TRTLLM: TrtllmOptions}
    kind = kinds.get(given["protocol"], Options)
    if kind is not Options:
        del given["scheduler"]
    known = {each.name for each in fields(kind)}
    chosen: dict[str, Any] = {}
    for name, value in given.items():
        if name in known and value is not None:
            chosen[name] = tuple(value) if isinstance(value, list) else value
    return kind(**chosen)


async def _run(options: Options, as_json: bool) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    server = await _serve(options)
    _announce(server, as_json)
    waits = [asyncio.create_task(stopped.wait()), asyncio.create_task(server.failed())]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    for ending in await asyncio.gather(*waits, return_exceptions=True):
        if isinstance(ending, EngineDied):
            # As with vLLM, the process exits with 0 all the same.
            Console(stderr=True).print(f"[red]emulate:[/red] the engine died: {ending}", highlight=False)
    await server.stop(GRACE_S)


async def _serve(options: Options) -> AnyServer:
    if isinstance(options, SglangOptions):
        return await serve_sglang(options)
    if isinstance(options, VllmOptions):
        return await serve_vllm(options)
    return await (serve_trtllm(options) if isinstance(options, TrtllmOptions) else serve(options))


def _announce(server: AnyServer, as_json: bool) -> None:
    """Print one line, flushed even into a pipe, since the parent process waits for it."""
    if isinstance(server, Server):
        addresses = {"grpc": server.grpc_address, "metrics": server.metrics_address or ""}
        text = f"ready: gRPC on {server.grpc_address}"
    else:
        addresses = {"http": server.http_address, "metrics": server.metrics_address}
        name = NAMES[server.options.protocol]
        text = f"ready: {name}'s API on {server.http_address}"
    line = f"{text}, metrics on http://{server.metrics_address}/metrics"
    print(json.dumps(addresses) if as_json else line, flush=True)
