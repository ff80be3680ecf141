"""The right tokens: through the sidecar comes what PEFT answers with the adapter's files, whatever else goes on."""

from __future__ import annotations

import random
from pathlib import Path

from sidecar.core.effects import Load
from sidecar.proto import admin_pb2, gateway_pb2
from tests.e2e.vllm.direct import at_once
from tests.e2e.vllm.fronted import Front, ask, in_front
from tests.e2e.vllm.server import VllmServer
from tests.e2e.vllm.toy import NAMES, Toy, all_different, prompt, write_version
from tests.kit.faults import assert_nothing_left

SHORT, LONG = prompt(1, 9), prompt(2, 300)
"""KV blocks hold 128 tokens here: only prompts that are longer meet the prefix cache."""
TOKENS = 12
END = 1


async def asked_all(front: Front, toy: Toy, sources: dict[str, Path], times: int = 1) -> None:
    """Ask every adapter with both prompts, in no order, 32 at a time: each answer is PEFT's."""
    wanted = {
        (name, asked): toy.greedy(path, asked, TOKENS)
        for name, path in sources.items()
        for asked in (tuple(SHORT), tuple(LONG))
    }
    assert all_different(tokens for (_, asked), tokens in wanted.items() if asked == tuple(LONG))
    asks = list(wanted) * times
    random.Random(3).shuffle(asks)

    async def one(name: str, asked: tuple[int, ...], stream: bool) -> None:
        told = await ask(front.client, name, asked, TOKENS, stream)
        assert (told.status, told.error) == (200, "")
        assert told.whole
        assert told.tokens == wanted[name, asked], name

    await at_once(
        32, [lambda number=number, one_=one_: one(*one_, stream=bool(number % 2)) for number, one_ in enumerate(asks)]
    )


async def test_every_adapter_answers_as_in_peft(either: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """Sixteen adapters over two slots and four places in memory, displaced while others run; then updated."""
    sources = {name: toy.adapters / name for name in NAMES}
    async with in_front(either, toy.adapters, tmp_path) as front:
        await asked_all(front, toy, sources, times=2)
        assert front.served.recorder.count(Load) >= len(NAMES)
        for number, name in enumerate(NAMES[:4]):
            sources[name] = write_version(tmp_path / f"new-{name}", seed=100 + number, rank=16 if number % 2 else 8)
            request = admin_pb2.RegisterRequest(name=name, path=str(sources[name]), hold_s=3600)
            await front.served.adapters.Register(request)
        await asked_all(front, toy, sources, times=2)
        for name in NAMES[:4]:
            old = await ask(front.client, f"{name}@v1", LONG, TOKENS)
            assert old.tokens == toy.greedy(toy.adapters / name, LONG, TOKENS)
        await assert_nothing_left(front.served)


async def test_the_same_through_grpc(either: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """`Generate` with token ids gives the same ids, in a stream."""
    async with in_front(either, toy.adapters, tmp_path) as front:
        for name in NAMES[:6]:
            request = gateway_pb2.GenerateRequest(
                adapter=name, tokens=gateway_pb2.TokenIds(ids=LONG), max_tokens=TOKENS, temperature=0.0
            )
            answers = [answer async for answer in front.served.gateway.Generate(request)]
            tokens = [token for answer in answers for token in answer.token_ids]
            wanted = toy.greedy(toy.adapters / name, LONG, TOKENS)
            assert END not in wanted, "the answer is shorter for a reason of its own"
            assert tokens == wanted
            assert answers[-1].origin.version == f"{name}@v1"


async def test_the_base_model_beside_adapters(server: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """Kept apart from them, as on this build it must be, it answers as it does alone, and so do they."""
    names: list[str] = [*NAMES[:3], "base"]
    wanted = {name: toy.greedy(None if name == "base" else toy.adapters / name, SHORT, TOKENS) for name in names}
    async with in_front(server, toy.adapters, tmp_path) as front:
        order = random.Random(5).choices(names, k=60)
        told = await at_once(16, [lambda name=name: ask(front.client, name, SHORT, TOKENS) for name in order])
        for name, answer in zip(order, told, strict=True):
            assert (answer.error, answer.tokens) == ("", wanted[name]), name
