"""`sidecar adapters inspect` and `convert`: commands on a local PEFT folder, without a sidecar."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Group
from rich.text import Text

from sidecar.cli.exits import say
from sidecar.cli.serving import resolve
from sidecar.cli.show import AsJson, bad, bar, console, facts, print_json, size, table, titled, working

Source = Annotated[Path, typer.Argument(help="PEFT folder.", show_default=False)]
Base = Annotated[
    Path | None, typer.Option(help="The base model's config.json or folder, to check every tensor against.")
]


def inspect(
    source: Source,
    config: Annotated[
        Path | None,
        typer.Option(help="A sidecar's configuration: show which backends could serve it.", show_default=False),
    ] = None,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Show the contents of a PEFT folder, its loss in each engine dtype, and which backends could serve it."""
    from sidecar.adapters.base_model import read_base_model
    from sidecar.backends.registry import entries_of
    from sidecar.cli.inspecting import inspect as inspect_folder
    from sidecar.serve.pool import facts_of

    backends = {} if config is None else facts_of(entries_of(resolve(config)))
    with working(f"reading {source}"):
        found = inspect_folder(source, backends=backends, base=None if base is None else read_base_model(base))
    if as_json:
        print_json(found)
    else:
        console().print(Group(*_shown(found)))


def _shown(found: dict[str, Any]) -> list[Any]:
    first, last = found["layers"]
    head = facts(
        (
            ("adapter", found["adapter"]),
            ("digest", found["digest"]),
            ("base model", found["base_model"] or "not named; register it with --base NAME"),
            ("files", f"{found['dtype']}, {size(found['source_bytes'])}"),
            ("rows", f"{found['rows']} on layers {first} to {last}, rank at most {found['max_rank']}"),
        )
    )
    modules = [
        (
            module["module"],
            f"{module['in']} → {module['out']}",
            str(module["layers"]),
            ", ".join(map(str, module["ranks"])),
            ", ".join(f"{scale:g}" for scale in module["scales"]),
            f"{module['largest_a']:.3g}",
            f"{module['largest_b_scaled']:.3g}",
        )
        for module in found["modules"]
    ]
    columns = ("MODULE", "IN → OUT", ">LAYERS", ">RANKS", ">SCALES", ">LARGEST A", ">LARGEST B, SCALED")
    layouts = [_layout(layout) for layout in found["layouts"]]
    backends = [
        (place["backend"], str(place.get("pages", "-")), bad(place["why"]) if "why" in place else "")
        for place in found["backends"]
    ]
    return [
        head,
        *titled("modules", table(columns, modules)),
        *titled("packed", table(("DTYPE", ">SIZE", "SHAPE", "TASK ID", ">ERROR", "NOTES"), layouts)),
        *(
            titled("backends, by the configuration alone", table(("BACKEND", ">PAGES", "CANNOT SERVE IT"), backends))
            if backends
            else ()
        ),
    ]


def _layout(layout: dict[str, Any]) -> tuple[str | Text, ...]:
    shape = "×".join(map(str, layout["shape"]))
    known = (layout["dtype"], size(layout["packed_bytes"]), shape, layout["task_id"])
    if "refused" in layout:
        return (*known, "-", bad(layout["refused"]))
    notes = f"{len(layout['rebalanced'])} rows rebalanced" if layout["rebalanced"] else ""
    return (*known, f"{layout['relative_error']:.1e}", notes)


def convert(
    source: Source,
    out: Annotated[Path, typer.Option(help="Folder to write to; made if missing.", show_default=False)],
    dtype: Annotated[Literal["float16", "bfloat16"], typer.Option(help="The engine's dtype.")] = "float16",
    rank_multiple: Annotated[int, typer.Option(min=1, help="Pad ranks to a multiple of this.")] = 1,
    engine: Annotated[
        Path | None,
        typer.Option(help="The engine's config.json: its dtype and tp, and how fused projections must lie."),
    ] = None,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Write a PEFT folder as TensorRT-LLM's model.lora_weights.npy [1,N,W] and model.lora_config.npy [1,N,3]."""
    from sidecar.adapters.base_model import read_base_model
    from sidecar.adapters.convert import convert as convert_folder
    from sidecar.adapters.layout import Layout
    from sidecar.backends.engine_facts import from_engine_config

    layout = Layout(dtype, rank_multiple)
    if engine is not None:
        layout = replace(from_engine_config(engine), rank_multiple=rank_multiple).layout
    model = None if base is None else read_base_model(base)
    with bar(f"packing {source}") as progress:
        report = convert_folder(source, out, layout=layout, base=model, progress=progress)
    if as_json:
        record = asdict(report)
        print_json({**record, "weights": str(report.weights), "config": str(report.config)})
        return
    shape = "×".join(map(str, report.shape))
    say(f"{report.weights}: {shape} {layout.dtype}, {size(report.size_bytes)}")
    say(f"{report.config}: 1×{report.shape[1]}×3 int32")
    for row in report.packing.rebalanced:
        print(
            f"{row.module} of layer {row.layer} was rebalanced by 2^{row.exponent} to fit {layout.dtype}",
            file=sys.stderr,
        )
