"""How true the simulator is: its figures beside those of real engines and of the theory. All in virtual time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.bench.figures import Figure
from tests.worlds.measured import (
    BASE_ROWS,
    LOSSES,
    POOLS,
    SLOTS,
    TRTLLM,
    VLLM,
    loss,
    of_closed_form,
    reachable_tokens_per_s,
    room_figure,
    simulated,
)

CLOSED_FORM_OFF = 0.05
BASE_OFF = 0.10
ORDER = "soft_gated"
RANKS = (8, 64)


async def bench(folder: Path) -> list[Figure]:
    """Return every figure; a minute and a half of one core."""
    return [*_base_model(), *_losses(), *_room(), *_closed_form()]


def _closed_form() -> Iterator[Figure]:
    for in_flight in POOLS:
        for slots in SLOTS:
            share = of_closed_form(ORDER, in_flight, slots)
            reachable = reachable_tokens_per_s(in_flight, slots)
            yield Figure(
                f"closed form, {in_flight} in flight, {slots} slots: off by",
                abs(share - 1),
                "",
                judged_by="value",
                goal=CLOSED_FORM_OFF,
                note=f"{ORDER} {share * reachable:,.0f} of {reachable:,.0f} tokens/s",
            )


def _base_model() -> Iterator[Figure]:
    for row in BASE_ROWS:
        ran = simulated(
            workload="base", engine=row.engine, order=ORDER, input_tokens=row.input_tokens,
            output_tokens=row.output_tokens, in_flight=row.in_flight, requests=row.requests,
        ).throughput_tokens_per_s  # fmt: skip
        yield Figure(
            f"base model, {row.engine}, {row.input_tokens} in, {row.output_tokens} out, {row.in_flight}: off by",
            abs(ran / row.tokens_per_s - 1),
            "",
            judged_by="value",
            goal=BASE_OFF,
            note=f"{ran:,.0f} of {row.tokens_per_s:,.0f} tokens/s",
        )


def _losses() -> Iterator[Figure]:
    for (engine, modules), (least, most) in LOSSES.items():
        for rank in RANKS:
            yield Figure(
                f"loss by 16 adapters, {engine}, {modules}, rank {rank}",
                100 * loss(ORDER, engine, adapters=16, slots=16, rank=rank, lora_modules=modules),
                "%",
                note=f"published: {100 * least:.1f} to {100 * most:.1f}",
            )


def _room() -> Iterator[Figure]:
    for engine in (TRTLLM, VLLM):
        for in_flight in (128, 256):
            figure = room_figure(engine, in_flight)
            told = ", ".join(f"{slots}: {tokens_per_s:,.0f}" for slots, tokens_per_s in figure.items())
            yield Figure(
                f"64 slots over 32, {engine}, {in_flight} in flight",
                figure[64] / figure[32],
                "x",
                note=f"by slots {told}",
            )
