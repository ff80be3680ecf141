"""The emulated engine's model: a Llama that applies LoRA from packed rows, batched over mixed adapters."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import sidecar
from sidecar.lab.engine.llama import Llama
from sidecar.lab.engine.packed import PackedAdapter, unpack
from sidecar.lab.engine.rounding import bfloat16_bits, narrow, rounded, widen
from sidecar.lab.engine.shape import ALL_LINEAR, TINY, module_dims
from sidecar.lab.engine.tokens import BOS, EOS, PAD, ByteTokenizer
from sidecar.lab.engine.weights import Weights, seeded_weights

DIMS = module_dims(TINY)
WEIGHTS = seeded_weights(TINY, 11, "float16")
TOKENIZER = ByteTokenizer()
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32 sums in another order

Pairs = dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]


def pairs_of(seed: int, rank: int = 4, modules: tuple[str, ...] = ALL_LINEAR, scale: float = 0.3) -> Pairs:
    """Random A [rank, in] and scaled B [out, rank] for every layer and the given modules."""
    random = np.random.default_rng(seed)
    return {
        (layer, name): (
            (random.standard_normal((rank, DIMS[name].in_dim)) * 0.2).astype(np.float32),
            (random.standard_normal((DIMS[name].out_dim, rank)) * scale).astype(np.float32),
        )
        for layer in range(TINY.layers)
        for name in modules
    }


def packed_naively(pairs: Pairs, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows written value by value: A row by row, B row by row, zeros up to the longest row."""
    rows, config = [], []
    for (layer, name), (A, B) in pairs.items():
        row = []
        for i in range(A.shape[0]):
            row.extend(A[i, j] for j in range(A.shape[1]))
        for i in range(B.shape[0]):
            row.extend(B[i, j] for j in range(B.shape[1]))
        rows.append(row)
        config.append([DIMS[name].module_id, layer, A.shape[0]])
    width = max(len(row) for row in rows)
    padded = [row + [np.float32(0)] * (width - len(row)) for row in rows]
    return narrow(np.array(padded, np.float32), dtype), np.array(config, np.int32)


def adapter_of(pairs: Pairs, dtype: str = "float16") -> PackedAdapter:
    return unpack(*packed_naively(pairs, dtype), TINY)


def merged(weights: Weights, pairs: Pairs, dtype: str) -> Weights:
    """Base weights plus B·A of the rounded factors."""
    result = dict(weights)
    for (layer, name), (A, B) in pairs.items():
        result[f"layers.{layer}.{name}"] = weights[f"layers.{layer}.{name}"] + rounded(B, dtype) @ rounded(A, dtype)
    return result


def run(model: Llama, request_id: int, steps: int) -> tuple[list[int], np.ndarray]:
    """Tokens and logits [step, vocab] of one sequence alone."""
    tokens, logits = [], []
    for _ in range(steps):
        tokens.append(model.step([request_id])[request_id])
        logits.append(model.logits_of(request_id))
    return tokens, np.array(logits)


def alone(prompt: list[int], adapter: PackedAdapter | None, steps: int, weights: Weights = WEIGHTS):
    model = Llama(TINY, weights)
    model.open(0, prompt, adapter)
    return run(model, 0, steps)


def test_tokenizer_round_trip() -> None:
    """Text comes back from its tokens; special tokens and broken UTF-8 don't raise."""
    assert TOKENIZER.encode("aé") == [BOS, 97, 0xC3, 0xA9]
    assert TOKENIZER.decode([BOS, *"aé".encode(), EOS, PAD]) == "aé"
    assert TOKENIZER.decode([0xC3]) == "\ufffd"


def test_bfloat16_rounds_to_nearest_even() -> None:
    """Ties go to the even neighbour, NaN and infinities survive."""
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1.0, np.inf, np.nan, 3.4e38], np.float32)
    back = widen(bfloat16_bits(values))
    assert back[:4].tolist() == [1.0, 1.0, 1 + 2**-6, -1.0]
    assert np.isinf(back[4])
    assert np.isnan(back[5])
    assert np.isinf(back[6])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_seeded_weights_fit_the_engine_dtype(dtype: str) -> None:
    """Weights are what the dtype can hold, the same for the same seed, others for another."""
    weights = seeded_weights(TINY, 3, dtype)
    for values in weights.values():
        np.testing.assert_array_equal(values, rounded(values, dtype))
    np.testing.assert_array_equal(weights["head"], seeded_weights(TINY, 3, dtype)["head"])
    assert not np.array_equal(weights["embedding"], seeded_weights(TINY, 4, dtype)["embedding"])


def test_seeded_weights_never_change() -> None:
    """The numbers behind the checked-in demo adapters are the same on every machine and NumPy."""
    weights = seeded_weights(TINY, 3, "float16")
    assert weights["embedding"][0, :3].tolist() == [0.176025390625, 0.72119140625, -0.72412109375]
    assert int(np.float64(weights["layers.1.mlp_gate"]).sum() * 2**24) == -68501275


@pytest.mark.parametrize("with_adapter", [False, True])
def test_decode_equals_full_recompute(with_adapter: bool) -> None:
    """Each cached decode step has the logits of a fresh prefill over all tokens, across shelf moves."""
    adapter = adapter_of(pairs_of(1)) if with_adapter else None
    prompt = TOKENIZER.encode("p" * 55 + " and more")
    tokens, logits = alone(prompt, adapter, 12)
    for step, expected in enumerate(logits):
        _, fresh = alone(prompt + tokens[:step], adapter, 1)
        np.testing.assert_allclose(fresh[0], expected, **CLOSE)


def test_long_prompt_in_parts() -> None:
    """A prompt longer than one block of queries equals a shorter one that was decoded up to its length."""
    prompt = [BOS, *(int(token) for token in np.random.default_rng(0).integers(0, 256, 250))]
    tokens, logits = alone(prompt, None, 40)
    _, fresh = alone(prompt + tokens[:-1], None, 1)
    np.testing.assert_allclose(logits[-1], fresh[0], **CLOSE)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_packed_equals_merged(dtype: str) -> None:
    """LoRA from packed rows gives the logits of base weights merged with B·A."""
    pairs = pairs_of(2, rank=5)
    weights = seeded_weights(TINY, 11, dtype)
    prompt = TOKENIZER.encode("Who is there?")
    tokens, logits = alone(prompt, adapter_of(pairs, dtype), 8, weights)
    merged_tokens, merged_logits = alone(prompt, None, 8, merged(weights, pairs, dtype))
    assert tokens == merged_tokens
    np.testing.assert_allclose(logits, merged_logits, rtol=1e-3, atol=1e-3)
    base_tokens, _ = alone(prompt, None, 8, weights)
    assert tokens != base_tokens


@pytest.mark.parametrize("module", ALL_LINEAR)
def test_each_projection_is_applied_in_its_place(module: str) -> None:
    """An adapter on one projection alone equals the merge into that projection, and changes the logits."""
    pairs = pairs_of(3, modules=(module,), scale=1.0)
    prompt = TOKENIZER.encode("one projection")
    _, logits = alone(prompt, adapter_of(pairs), 2)
    _, merged_logits = alone(prompt, None, 2, merged(WEIGHTS, pairs, "float16"))
    np.testing.assert_allclose(logits, merged_logits, rtol=1e-3, atol=1e-3)
    _, base_logits = alone(prompt, None, 2)
    assert np.abs(logits - base_logits).max() > 0.01


def test_batch_of_mixed_adapters_equals_each_alone() -> None:
    """Other adapters, ranks, modules and lengths, joining and leaving, change nobody's answer."""
    adapters = [
        None,
        adapter_of(pairs_of(4, rank=2)),
        adapter_of(pairs_of(5, rank=8)),
        adapter_of(pairs_of(6, rank=3, modules=("attn_q", "attn_v"))),
    ]
    prompts = [TOKENIZER.encode("x" * length) for length in (3, 40, 62, 70, 130, 9, 1)]
    model = Llama(TINY, WEIGHTS)
    answers: dict[int, list[int]] = {}
    for step in range(14):
        if step < len(prompts):  # one more each step: prefill and decode meet in one pass
            model.open(step, prompts[step], adapters[step % 4])
            answers[step] = []
        for request_id, token in model.step(list(answers)[:: 1 if step % 2 else -1]).items():
            answers[request_id].append(token)
        for request_id in [key for key, tokens in answers.items() if len(tokens) == 8]:
            model.close(request_id)
            expected, _ = alone(prompts[request_id], adapters[request_id % 4], 8)
            assert answers.pop(request_id) == expected
    assert not answers


def test_logits_do_not_depend_on_company() -> None:
    """Logits of a sequence in a batch of 24 are those of the sequence alone, within float32 noise."""
    adapters = [adapter_of(pairs_of(seed, rank=1 + seed % 7)) for seed in range(6)]
    model = Llama(TINY, WEIGHTS)
    for request_id in range(24):
        model.open(request_id, TOKENIZER.encode("company" * (1 + request_id % 3)), adapters[request_id % 6])
    for _ in range(3):
        model.step(range(24))
    for request_id in range(24):
        prompt = TOKENIZER.encode("company" * (1 + request_id % 3))
        _, logits = alone(prompt, adapters[request_id % 6], 3)
        np.testing.assert_allclose(model.logits_of(request_id), logits[-1], **CLOSE)


def test_zero_b_is_the_base_model() -> None:
    """An adapter whose B is zero changes not one bit of the logits."""
    pairs = {key: (A, np.zeros_like(B)) for key, (A, B) in pairs_of(7).items()}
    prompt = TOKENIZER.encode("nothing added")
    _, logits = alone(prompt, adapter_of(pairs), 4)
    _, base_logits = alone(prompt, None, 4)
    np.testing.assert_array_equal(logits, base_logits)


def test_an_adapter_of_nans_harms_only_itself() -> None:
    """The neighbour of a sequence full of NaN, and the next to sit in its seat, answer as if alone."""
    bad = adapter_of({key: (A * np.nan, B) for key, (A, B) in pairs_of(8).items()})
    prompt = TOKENIZER.encode("good neighbours")
    expected, _ = alone(prompt, None, 6)
    model = Llama(TINY, WEIGHTS)
    model.open(1, TOKENIZER.encode("z" * 40), bad)
    model.open(2, prompt, None)
    steps = [model.step([1, 2]) for _ in range(6)]
    assert [step[2] for step in steps] == expected
    model.close(1)
    model.open(3, prompt, None)
    assert run(model, 3, 6)[0] == expected


def test_fused_qkv_row_equals_three_rows() -> None:
    """A row of attn_qkv with A shared and B stacked as q, k, v equals separate rows."""
    pairs = pairs_of(9, modules=("attn_q", "attn_k", "attn_v"))
    shared = {(layer, name): (pairs[layer, "attn_q"][0], B) for (layer, name), (_, B) in pairs.items()}
    fused = {
        (layer, "attn_qkv"): (
            pairs[layer, "attn_q"][0],
            np.concatenate([pairs[layer, name][1] for name in ("attn_q", "attn_k", "attn_v")]),
        )
        for layer in range(TINY.layers)
    }
    prompt = TOKENIZER.encode("fused")
    _, separate_logits = alone(prompt, adapter_of(shared), 3)
    _, fused_logits = alone(prompt, adapter_of(fused), 3)
    np.testing.assert_allclose(fused_logits, separate_logits, **CLOSE)


def test_rows_beyond_their_rank_are_ignored_and_rank_zero_is_nothing() -> None:
    """Padding after B is never read, even when it is not zero; a row of rank 0 changes nothing."""
    weights, config = packed_naively(pairs_of(10), "float16")
    shortest = 4 * (DIMS["attn_k"].in_dim + DIMS["attn_k"].out_dim)
    dirty = weights.copy()
    dirty[config[:, 0] == DIMS["attn_k"].module_id, shortest:] = 7
    clean = unpack(weights, config, TINY)
    for key, pair in unpack(dirty, config, TINY).factors.items():
        np.testing.assert_array_equal(pair.B_transposed, clean.factors[key].B_transposed)
    nothing = config.copy()
    nothing[:, 2] = 0
    assert unpack(weights, nothing, TINY).factors == {}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1, 0, 40], "lora_weights has to few values for attn_q"),
        ([99, 0, 4], r"lora_config row \[99, 0, 4\] names no projection of tiny-llama"),
        ([1, 2, 4], "names no projection"),
        ([1, 0, -1], "names no projection"),
        ([18, 0, 1], "lora module mlp_gate_up is not one that tiny-llama computes"),
        ([2, 0, 4], "two lora_weights rows for attn_k of layer 0"),
    ],
)
def test_unpack_refuses(row: list[int], message: str) -> None:
    """Rows that the model cannot apply are refused with their reason."""
    weights, config = packed_naively(pairs_of(12), "float16")
    config[0] = row
    with pytest.raises(ValueError, match=message):
        unpack(weights, config, TINY)


def test_unpack_refuses_shapes_and_dtypes() -> None:
    """Arrays of another rank, row counts that differ, and integer weights are refused."""
    weights, config = packed_naively(pairs_of(12), "float16")
    with pytest.raises(ValueError, match="expected \\[N, W\\] and \\[N, 3\\]"):
        unpack(weights[None], config, TINY)
    with pytest.raises(ValueError, match="expected \\[N, W\\] and \\[N, 3\\]"):
        unpack(weights[1:], config, TINY)
    with pytest.raises(ValueError, match="dtype int32"):
        unpack(weights.astype(np.int32), config, TINY)


def test_open_refuses() -> None:
    """An id in use, no tokens, unknown tokens are refused; closing twice is no error."""
    model = Llama(TINY, WEIGHTS)
    model.open(1, [BOS], None)
    with pytest.raises(ValueError, match="request 1 is open already"):
        model.open(1, [BOS], None)
    for tokens in ([], [259], [-1]):
        with pytest.raises(ValueError, match="request 2: expected one or more tokens below 259"):
            model.open(2, tokens, None)
    with pytest.raises(ValueError, match="no step yet"):
        model.logits_of(1)
    model.close(1)
    model.close(1)
    assert model.step([]) == {}
    with pytest.raises(KeyError):
        model.step([1])


def test_executor_needs_only_numpy() -> None:
    """Model and cost model import nothing but the standard library and NumPy: they run inside Triton too."""
    code = (
        "import sys; import sidecar.lab.engine.llama, sidecar.pace.cost, sidecar.lab.engine.tokens;"
        "print(*sorted({name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], env=_environment(), capture_output=True, text=True)
    assert done.stderr == ""
    public = {name for name in done.stdout.split() if not name.startswith(("_", "cython"))}  # NumPy 1.26 has some
    assert public == {"numpy", "sidecar"}


def _environment() -> dict[str, str]:
    """Paths of this repository and of NumPy, for an interpreter that starts without site packages."""
    roots = [Path(module.__file__ or "").parent.parent for module in (sidecar, np)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(root) for root in roots)}


def test_grouped_query_heads_share_keys() -> None:
    """One model with its k and v heads written out twice equals the grouped one."""
    wide = replace(TINY, kv_heads=4)
    weights = dict(WEIGHTS)
    for layer in range(TINY.layers):
        for name in ("attn_k", "attn_v"):
            heads = WEIGHTS[f"layers.{layer}.{name}"].reshape(2, 16, 64)
            weights[f"layers.{layer}.{name}"] = np.repeat(heads, 2, axis=0).reshape(64, 64)
    prompt = TOKENIZER.encode("grouped")
    _, grouped_logits = alone(prompt, None, 4)
    model = Llama(wide, weights)
    model.open(0, prompt, None)
    np.testing.assert_allclose(run(model, 0, 4)[1], grouped_logits, **CLOSE)
