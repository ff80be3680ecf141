"""The emulated trtllm-serve reads PEFT's own adapters: its tokens are those of PEFT's deltas, where its rules allow it.

The deltas are the real PEFT library's (`make goldens`); they are added to the base weights of a model without adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sidecar.lab.engine.llama import Llama
from sidecar.lab.engine.packed import PackedAdapter
from sidecar.lab.engine.shape import HF_MODULES
from sidecar.lab.engine.spec import EngineSpec
from sidecar.lab.engine.trtllm.checkpoint import LoadError, read_checkpoint
from sidecar.lab.engine.trtllm.options import TrtllmOptions, trtllm_spec_of
from sidecar.lab.engine.weights import Weights, seeded_weights

ADAPTERS = Path(__file__).parent / "peft" / "adapters"
LLAMAS = sorted(path.name for path in ADAPTERS.glob("llama-*"))
PROMPTS = ([3, 1, 4, 1, 5], [2, 7, 1, 8, 2, 8], [16, 17, 18], [31], [9, 9, 9, 9])
TOKENS = 8
OTHERWISE = {"llama-patterns": "alpha_pattern has no effect"}
UNREAD = {
    "llama-sharded": "expected str, bytes or os.PathLike object",
    "llama-old-names": "unsupported key base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
}


def spec_for(case: str) -> EngineSpec:
    return trtllm_spec_of(TrtllmOptions(shape=str(ADAPTERS / case / "base" / "config.json"), dtype="float32"))


def merged(case: str, spec: EngineSpec) -> Weights:
    """Return base weights with PEFT's deltas in them."""
    weights = dict(seeded_weights(spec.shape, 7, spec.dtype))
    with np.load(ADAPTERS / case / "delta.npz") as deltas:
        for path in deltas:
            parts = path.split(".")
            name = f"layers.{parts[parts.index('layers') + 1]}.{HF_MODULES[parts[-1]]}"
            weights[name] = weights[name] + deltas[path].astype(np.float32)
    return weights


def answers(spec: EngineSpec, weights: Weights, adapter: PackedAdapter | None) -> list[list[int]]:
    model, made = Llama(spec.shape, weights), []
    for prompt in PROMPTS:
        model.open(1, prompt, adapter)
        made.append([model.step([1])[1] for _ in range(TOKENS)])
        model.close(1)
    return made


def logits(spec: EngineSpec, weights: Weights, adapter: PackedAdapter | None, prompt: Sequence[int]) -> np.ndarray:
    model = Llama(spec.shape, weights)
    model.open(1, prompt, adapter)
    model.step([1])
    return model.logits_of(1)


@pytest.mark.parametrize("case", [case for case in LLAMAS if case not in UNREAD])
def test_tokens_are_pefts(case: str) -> None:
    """Greedy tokens, and the scores behind them within float32's noise; and they are not the base model's."""
    spec = spec_for(case)
    base = seeded_weights(spec.shape, 7, spec.dtype)
    packed = read_checkpoint(str(ADAPTERS / case), 1, spec).packed
    got, want = answers(spec, base, packed), answers(spec, merged(case, spec), None)
    scores = logits(spec, base, packed, PROMPTS[0])
    true = logits(spec, merged(case, spec), None, PROMPTS[0])
    assert not np.allclose(true, logits(spec, base, None, PROMPTS[0]), rtol=1e-3, atol=1e-3)
    if case in OTHERWISE:
        assert not np.allclose(scores, true, rtol=1e-3, atol=1e-3)
        return
    assert np.allclose(scores, true, rtol=1e-3, atol=1e-4)
    assert got == want


@pytest.mark.parametrize("case", sorted(UNREAD))
def test_what_is_not_read(case: str) -> None:
    """Several files, and names with an adapter's name in them: the load fails."""
    with pytest.raises(LoadError, match=UNREAD[case]):
        read_checkpoint(str(ADAPTERS / case), 1, spec_for(case))


def test_modules_that_are_no_targets_are_left_out() -> None:
    """With q and v as targets, k becomes one too; the rest is read past, and the answer is another one."""
    spec = spec_for("llama-all-linear")
    narrow = trtllm_spec_of(
        replace(
            TrtllmOptions(shape=str(ADAPTERS / "llama-all-linear" / "base" / "config.json"), dtype="float32"),
            lora_modules=("attn_q", "attn_v"),
        )
    )
    whole = read_checkpoint(str(ADAPTERS / "llama-all-linear"), 1, spec)
    part = read_checkpoint(str(ADAPTERS / "llama-all-linear"), 1, narrow)
    assert {module for _, module in part.packed.factors} == {"attn_q", "attn_k", "attn_v"}
    assert len(part.ignored) == 2 * 2 * 4
    assert not whole.ignored
    base = seeded_weights(spec.shape, 7, spec.dtype)
    assert not np.allclose(
        logits(spec, base, whole.packed, PROMPTS[0]), logits(spec, base, part.packed, PROMPTS[0]), atol=1e-3
    )
