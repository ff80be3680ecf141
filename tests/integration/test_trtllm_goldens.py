"""The adapters that the real PEFT library made, on emulated trtllm-serves: token ids by PEFT's own deltas.

The emulated engine reads the staged files as the server's source does. What is right comes by another way: PEFT's delta
of each module is added to the base model's weights, and no adapter is applied at all.
"""

from __future__ import annotations

import shutil
from contextlib import AsyncExitStack
from pathlib import Path

import grpc.aio
import pytest

from sidecar.adapters.base_model import read_base_model
from sidecar.lab.engine import shape as shapes
from sidecar.lab.engine.llama import Llama
from sidecar.lab.engine.shape import HF_MODULES, ModelShape, module_dims
from sidecar.lab.engine.tokens import BOS, EOS
from sidecar.lab.engine.weights import seeded_weights
from sidecar.proto import admin_pb2
from tests.golden.test_peft import ADAPTERS, CASES, expected
from tests.kit.ports import free_port
from tests.kit.serving import serving
from tests.kit.trtllm_emulated import running_trtllm

REFUSED = {
    "gemma-attention": 'its "attn_dense" is 32 → 16 and the engine\'s is 16 → 16',
    "mixtral-experts": 'it adapts "moe_h_to_4h", which the engine is without',
    "qwen2-moe-experts": 'it adapts "moe_h_to_4h", which the engine is without',
}
"""Cases that are refused, each with its reason: modules that the declared engine does not have, or by its own table has
in another size.
"""
UNRUNNABLE = ("gemma-attention",)
"""Cases whose base model the emulated engine cannot run at all: more heads than its hidden size has room for."""
QUICK = ("falcon-grouped", "gemma-attention", "llama-patterns", "llama-rslora", "mixtral-experts", "phi3-fused")
TOKENS, SEED, MARGIN = 16, 3, 0.03
PROMPTS = [[BOS, *range(first, first + 1 + first % 7)] for first in range(40, 120, 4)]


def shape_of(case: str) -> ModelShape:
    """Return a Llama of the sizes of a case's base model."""
    base = read_base_model(ADAPTERS / case / "base")
    hidden, ffn = base.modules["mlp_h_to_4h"]
    heads = base.heads
    return ModelShape(case, hidden, base.layers, heads.query, heads.key_value, heads.size, ffn, vocab=259)


def answers_of(case: str, shape: ModelShape, with_delta: bool) -> list[list[int]]:
    """Return greedy token ids of the base model, or with PEFT's deltas in its weights.

    An answer ends before a token that the engine's float16 may choose otherwise.
    """
    weights = seeded_weights(shape, SEED, "float16")
    if with_delta:
        names = {dims.module_id: name for name, dims in module_dims(shape).items()}
        for (layer, module), (delta,) in expected(case, read_base_model(ADAPTERS / case / "base").heads, (), 1).items():
            weights[f"layers.{layer}.{names[module]}"] = weights[f"layers.{layer}.{names[module]}"] + delta
    model, found = Llama(shape, weights), []
    for number, prompt in enumerate(PROMPTS):
        model.open(number, prompt, None)
        answer: list[int] = []
        while len(answer) < TOKENS and EOS not in answer:
            token = model.step([number])[number]
            second, first = sorted(model.logits_of(number))[-2:]
            if first - second < MARGIN:
                break
            answer.append(token)
        found.append(answer)
    return found


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
async def test_a_golden_adapter_answers_as_peft_or_is_refused(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = shape_of(case)
    monkeypatch.setitem(shapes.SHAPES, case, shape)
    shutil.copytree(ADAPTERS / case, tmp_path / "adapter")
    async with AsyncExitStack() as stack:
        address, submitted = f"127.0.0.1:{free_port()}", {}
        if case not in UNRUNNABLE:
            modules = {"lora_modules": tuple(HF_MODULES.values()), "max_loras": 2, "max_cpu_loras": 4}
            options = {"shape": case, "seed": SEED, "compute": "llama"} | modules
            engine, _ = await stack.enter_async_context(running_trtllm(**options))
            address, submitted = engine.http_address, engine.adapters.submitted
        entry = {
            "url": f"trtllm://{address}",
            "adapters_dir": str(tmp_path / "shared"),
            "base_model": {"name": f"tiny-{case}", "config": str(ADAPTERS / case / "base")},
            "lora_config": {"max_loras": 2, "max_cpu_loras": 4, "lora_target_modules": list(HF_MODULES.values())},
        }
        up = case not in UNRUNNABLE
        served = await stack.enter_async_context(serving([], roots=[tmp_path], until_up=up, backends=[entry]))
        given = admin_pb2.RegisterRequest(name="golden", path=str(tmp_path / "adapter"), base=f"tiny-{case}")
        if case in REFUSED:
            before = len(submitted)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await served.adapters.Register(given)
            assert REFUSED[case] in (refused.value.details() or "")
            assert len(submitted) == before
            return
        await served.adapters.Register(given)
        base, right = answers_of(case, shape, False), answers_of(case, shape, True)
        assert right != base
        assert sum(map(len, right)) > 4 * len(PROMPTS)
        for prompt, answer in zip(PROMPTS, right, strict=True):
            if answer:
                assert (await served.ask_tokens("golden", prompt, len(answer))).tokens == answer


def test_at_least_thirty_of_them_answer() -> None:
    assert len(CASES) - len(REFUSED) >= 30
