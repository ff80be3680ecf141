"""`sidecar emulate`: run an emulated engine, TensorRT-LLM behind Triton or vLLM, until it is told to stop."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sidecar.lab.engine.kserve import Options, Server, serve
from sidecar.lab.engine.kserve.options import TRITON
from sidecar.lab.engine.openai import VllmOptions, VllmServer, serve_vllm
from sidecar.lab.engine.openai.loop import EngineDied
from sidecar.lab.engine.shape import ALL_LINEAR, SHAPES
from sidecar.lab.engine.spec import SCHEDULERS, VLLM

GRACE_S = 1.0
"""How long requests in flight may still run after SIGTERM."""

_SERVER, _ENGINE, _LORA, _VLLM, _FAULTS = "Server", "Engine", "LoRA caches", "vLLM", "Faults"


def emulate(
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=_SERVER)] = "127.0.0.1",
    grpc_port: Annotated[
        int, typer.Option(help="Port of the gRPC service; 0 takes a free one.", rich_help_panel=_SERVER)
    ] = 8001,
    metrics_port: Annotated[
        int, typer.Option(help="Port of the metrics; 0 takes a free one.", rich_help_panel=_SERVER)
    ] = 8002,
    http_port: Annotated[
        int, typer.Option(help="Port of vLLM's API and metrics; 0 takes a free one.", rich_help_panel=_SERVER)
    ] = 8000,
    decoupled: Annotated[
        bool, typer.Option(help="Serve decoupled models (streams only) or not.", rich_help_panel=_SERVER)
    ] = True,
    separate_final: Annotated[
        bool, typer.Option(help="Mark ends with an empty response of its own.", rich_help_panel=_SERVER)
    ] = False,
    triton_max_batch_size: Annotated[
        int, typer.Option(help="max_batch_size of the models.", rich_help_panel=_SERVER)
    ] = 64,
    instances: Annotated[
        int,
        typer.Option(help="Model instances, each with an engine and caches of its own.", rich_help_panel=_SERVER),
    ] = 1,
    text_model: Annotated[
        bool, typer.Option(help="Serve the text model (ensemble) as well.", rich_help_panel=_SERVER)
    ] = True,
    protocol: Annotated[
        str,
        typer.Option(
            help="triton: the core model; llmapi: the one that loads from paths; vllm: an OpenAI API.",
            rich_help_panel=_SERVER,
        ),
    ] = TRITON,
    write_engine_config: Annotated[
        Path | None,
        typer.Option(help="Write the engine's config.json there, for backends to read.", rich_help_panel=_SERVER),
    ] = None,
    served_log: Annotated[
        Path | None,
        typer.Option(help="Append a JSON line for each request that ends.", rich_help_panel=_SERVER),
    ] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="PEM file; with a key, the service speaks TLS.", rich_help_panel=_SERVER)
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file.", rich_help_panel=_SERVER)] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="PEM file; clients must show a certificate of its.", rich_help_panel=_SERVER)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the ready line as JSON.", rich_help_panel=_SERVER)
    ] = False,
    shape: Annotated[str, typer.Option(help=f"Model: {', '.join(SHAPES)}.", rich_help_panel=_ENGINE)] = "tiny",
    compute: Annotated[
        str | None,
        typer.Option(
            help="llama computes tokens, none makes dummy ones; default: llama for tiny.", rich_help_panel=_ENGINE
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the base model.", rich_help_panel=_ENGINE)] = 0,
    dtype: Annotated[
        str, typer.Option(help="Engine dtype: float16, bfloat16, float32.", rich_help_panel=_ENGINE)
    ] = "float16",
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks, for page sizes.", rich_help_panel=_ENGINE)] = 1,
    seats: Annotated[
        int, typer.Option("--seats", "--max-num-seqs", help="Requests that run at a time.", rich_help_panel=_ENGINE)
    ] = 64,
    max_input_tokens: Annotated[int, typer.Option(help="Longest prompt.", rich_help_panel=_ENGINE)] = 4096,
    max_seq_tokens: Annotated[
        int,
        typer.Option(
            "--max-seq-tokens", "--max-model-len", help="Longest prompt and answer together.", rich_help_panel=_ENGINE
        ),
    ] = 8192,
    max_tokens_per_step: Annotated[
        int,
        typer.Option(
            "--max-tokens-per-step",
            "--max-num-batched-tokens",
            help="Tokens that one step computes.",
            rich_help_panel=_ENGINE,
        ),
    ] = 8192,
    kv_blocks: Annotated[int, typer.Option(help="Blocks of the KV cache.", rich_help_panel=_ENGINE)] = 4096,
    tokens_per_block: Annotated[
        int | None, typer.Option(help="Tokens in a KV block; default: 64, vllm: 128.", rich_help_panel=_ENGINE)
    ] = None,
    scheduler: Annotated[
        str,
        typer.Option(
            help=f"TensorRT-LLM's capacity scheduler: {', '.join(SCHEDULERS)}; vllm has its own.",
            rich_help_panel=_ENGINE,
        ),
    ] = "guaranteed_no_evict",
    time_scale: Annotated[
        float,
        typer.Option(help="1: as slow as the modelled GPU; 0: as fast as possible.", rich_help_panel=_ENGINE),
    ] = 1.0,
    cost_table: Annotated[
        Path | None,
        typer.Option(help="Step times to model; default: an A100 with an 8B model.", rich_help_panel=_ENGINE),
    ] = None,
    lora_modules: Annotated[
        str, typer.Option(help="LoRA modules of the engine, by commas.", rich_help_panel=_LORA)
    ] = ",".join(ALL_LINEAR),
    lora_weights: Annotated[
        str | None,
        typer.Option(help="Type of lora_weights in ModelConfig: fp16, bf16; default: dtype.", rich_help_panel=_LORA),
    ] = None,
    max_lora_rank: Annotated[
        int | None, typer.Option(help="Rank limit of the engine; default: 64, vllm: 16.", rich_help_panel=_LORA)
    ] = None,
    lora_optimal_rank: Annotated[
        int, typer.Option(help="lora_cache_optimal_adapter_size: sizes a page.", rich_help_panel=_LORA)
    ] = 8,
    lora_max_rank_cached: Annotated[int, typer.Option(help="lora_cache_max_adapter_size.", rich_help_panel=_LORA)] = 64,
    lora_host_bytes: Annotated[int, typer.Option(help="lora_cache_host_memory_bytes.", rich_help_panel=_LORA)] = 1
    << 30,
    lora_device_bytes: Annotated[int, typer.Option(help="Bytes of the device cache.", rich_help_panel=_LORA)] = 1 << 30,
    lora_host_pages: Annotated[
        int | None, typer.Option(help="Pages of the host cache, instead of bytes.", rich_help_panel=_LORA)
    ] = None,
    lora_device_pages: Annotated[
        int | None, typer.Option(help="Pages of the device cache, instead of bytes.", rich_help_panel=_LORA)
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="Name of the base model, may be given again; default: the shape.", rich_help_panel=_VLLM),
    ] = None,
    max_loras: Annotated[int, typer.Option(help="Adapters in one batch.", rich_help_panel=_VLLM)] = 1,
    max_cpu_loras: Annotated[
        int | None, typer.Option(help="Adapters in the CPU cache; default: max_loras.", rich_help_panel=_VLLM)
    ] = None,
    runtime_lora: Annotated[
        bool, typer.Option(help="VLLM_ALLOW_RUNTIME_LORA_UPDATING: load and unload calls.", rich_help_panel=_VLLM)
    ] = True,
    stream_interval: Annotated[
        int, typer.Option(help="Tokens in a chunk of a stream, the first chunk aside.", rich_help_panel=_VLLM)
    ] = 1,
    api_key: Annotated[
        str | None, typer.Option(help="What clients must bring as bearer token.", rich_help_panel=_VLLM)
    ] = None,
    max_queue: Annotated[
        int, typer.Option(help="Limit of the executor's queue; 0: none.", rich_help_panel=_FAULTS)
    ] = 0,
    crash_on_load: Annotated[
        list[str] | None,
        typer.Option(
            help="Crash when this adapter (parameter lora_name, or task id) is loaded.", rich_help_panel=_FAULTS
        ),
    ] = None,
    crash_on_weights: Annotated[
        list[str] | None,
        typer.Option(help="Crash when weights with this SHA-256 prefix are loaded.", rich_help_panel=_FAULTS),
    ] = None,
    fail_step_on_load: Annotated[
        list[str] | None,
        typer.Option(help="Fail the step after this adapter is loaded, once.", rich_help_panel=_FAULTS),
    ] = None,
    full_errors: Annotated[
        int, typer.Option(help="Answer this many loads with a full cache.", rich_help_panel=_FAULTS)
    ] = 0,
    claim_errors: Annotated[
        int, typer.Option(help="Then this many with a failed page claim.", rich_help_panel=_FAULTS)
    ] = 0,
    freeze_after: Annotated[
        int | None, typer.Option(help="Stop iterating after this many steps.", rich_help_panel=_FAULTS)
    ] = None,
    slow_factor: Annotated[float, typer.Option(help="Multiply the time of every step.", rich_help_panel=_FAULTS)] = 1.0,
    fail_load: Annotated[
        list[str] | None,
        typer.Option(help="Fail vLLM's load calls of this adapter.", rich_help_panel=_FAULTS),
    ] = None,
    mixing_breaks_base: Annotated[
        bool,
        typer.Option(
            "--mixing-breaks-base",
            help="Answer base requests wrongly in vLLM batches that have adapters.",
            rich_help_panel=_FAULTS,
        ),
    ] = False,
    ignore_lora: Annotated[
        bool,
        typer.Option("--ignore-lora", help="Take every adapter and answer as the base model.", rich_help_panel=_FAULTS),
    ] = False,
) -> None:
    """Run an emulated engine: TensorRT-LLM behind Triton's gRPC protocol, or vLLM behind its OpenAI API.

    It keeps the engine's LoRA caches, scheduler and timing, computes with a tiny real model, and fails as the
    real one fails. SIGTERM stops it.
    """
    given = {"max_lora_rank": max_lora_rank, "tokens_per_block": tokens_per_block}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if protocol == VLLM:
        kind: type[Options] = VllmOptions
        chosen |= {
            "http_port": http_port,
            "served_model_name": tuple(served_model_name or ()),
            "max_loras": max_loras,
            "max_cpu_loras": max_cpu_loras,
            "runtime_lora": runtime_lora,
            "stream_interval": stream_interval,
            "api_key": api_key,
            "fail_load": tuple(fail_load or ()),
            "mixing_breaks_base": mixing_breaks_base,
        }
    else:
        kind = Options
        chosen["scheduler"] = scheduler
    try:
        options = kind(
            **chosen,
            host=host,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            decoupled=decoupled,
            separate_final=separate_final,
            triton_max_batch_size=triton_max_batch_size,
            instances=instances,
            text_model=text_model,
            protocol=protocol,
            write_engine_config=write_engine_config,
            served_log=served_log,
            tls_certificate=tls_certificate,
            tls_key=tls_key,
            tls_client_ca=tls_client_ca,
            shape=shape,
            compute=compute,
            seed=seed,
            dtype=dtype,
            tp=tp,
            seats=seats,
            max_input_tokens=max_input_tokens,
            max_seq_tokens=max_seq_tokens,
            max_tokens_per_step=max_tokens_per_step,
            kv_blocks=kv_blocks,
            time_scale=time_scale,
            cost_table=cost_table,
            lora_modules=tuple(name for name in lora_modules.split(",") if name),
            lora_weights=lora_weights,
            lora_optimal_rank=lora_optimal_rank,
            lora_max_rank_cached=lora_max_rank_cached,
            lora_host_bytes=lora_host_bytes,
            lora_device_bytes=lora_device_bytes,
            lora_host_pages=lora_host_pages,
            lora_device_pages=lora_device_pages,
            max_queue=max_queue,
            crash_on_load=tuple(crash_on_load or ()),
            crash_on_weights=tuple(crash_on_weights or ()),
            fail_step_on_load=tuple(fail_step_on_load or ()),
            full_errors=full_errors,
            claim_errors=claim_errors,
            freeze_after=freeze_after,
            slow_factor=slow_factor,
            ignore_lora=ignore_lora,
        )
        asyncio.run(_run(options, as_json))
    except (ValueError, OSError, RuntimeError) as error:
        Console(stderr=True).print(f"[red]emulate:[/red] {error}", highlight=False)
        raise typer.Exit(1) from error


async def _run(options: Options, as_json: bool) -> None:
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    server: Server | VllmServer
    server = await (serve_vllm(options) if isinstance(options, VllmOptions) else serve(options))
    _announce(server, as_json)
    waits = [asyncio.create_task(asked.wait()), asyncio.create_task(server.failed())]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    for ending in await asyncio.gather(*waits, return_exceptions=True):
        if isinstance(ending, EngineDied):
            # As vLLM's does, the process ends well all the same.
            Console(stderr=True).print(f"[red]emulate:[/red] the engine died: {ending}", highlight=False)
    await server.stop(GRACE_S)


def _announce(server: Server | VllmServer, as_json: bool) -> None:
    """Print one line, at once even into a pipe: whoever started this waits for it."""
    if isinstance(server, VllmServer):
        addresses = {"http": server.http_address, "metrics": server.metrics_address}
        text = f"ready: vLLM's API on {server.http_address}"
    else:
        addresses = {"grpc": server.grpc_address, "metrics": server.metrics_address or ""}
        text = f"ready: gRPC on {server.grpc_address}"
    line = f"{text}, metrics on http://{server.metrics_address}/metrics"
    print(json.dumps(addresses) if as_json else line, flush=True)
