"""Every way that models name and fuse their projections, beyond the plain Llama: told apart, split, interleaved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sidecar.adapters.base_model import BaseModel, base_model_of, read_base_model
from sidecar.adapters.layout import numpy_dtype
from sidecar.adapters.packed import lora_config, pack, plan
from sidecar.adapters.peft import read_adapter
from sidecar.adapters.registration import adapter_of
from sidecar.cli.inspecting import inspect
from sidecar.core.facts import EngineFacts
from sidecar.core.layout import Heads, Layout, packed_size_bytes
from sidecar.core.misfits import misfit
from sidecar.errors import Invalid, Misused, Reason
from sidecar.telling.misfits import label, sentence
from tests.kit.peft_files import read_tensors, write_adapter, write_safetensors

RANK = 2
PREFIX = "base_model.model."
LAYER = f"{PREFIX}model.layers.0."


def adapter(directory: Path, names: Mapping[str, tuple[int, int]], **config: object) -> Path:
    """Write an adapter of these modules (in, out), by their names in the base model after the layer's number."""
    generator = np.random.default_rng(1)
    tensors = {}
    for name, (in_dim, out_dim) in names.items():
        for side, shape in (("A", (RANK, in_dim)), ("B", (out_dim, RANK))):
            tensors[f"{LAYER}{name}.lora_{side}.weight"] = generator.normal(0, 0.05, shape).astype(np.float32)
    return write_adapter(directory, modules=[], rank=RANK, alpha=RANK, extra_tensors=tensors, **config)


def refused(path: Path, layout: Layout | None = None) -> str:
    """Read (and plan) an adapter that must be refused; return the message."""
    with pytest.raises(Invalid) as caught, read_adapter(path) as source:
        plan(source, layout or Layout("float16"))
    return caught.value.message


@pytest.mark.parametrize(
    ("name", "module", "number"),
    [
        ("model.layers.0.self_attn.q_proj", "attn_q", 1),
        ("language_model.model.layers.0.self_attn.k_proj", "attn_k", 2),
        ("model.language_model.layers.0.self_attn.v_proj", "attn_v", 3),
        ("model.text_model.layers.0.self_attn.o_proj", "attn_dense", 4),
        ("_orig_mod.model.layers.0.mlp.gate_proj", "mlp_h_to_4h", 5),
        ("model._fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.mlp.up_proj", "mlp_gate", 7),
        ("base_model.model.model.layers.0.mlp.down_proj", "mlp_4h_to_h", 6),
        ("model.decoder.layers.0.self_attn.out_proj", "attn_dense", 4),
        ("model.decoder.layers.0.fc1", "mlp_h_to_4h", 5),
        ("model.decoder.layers.0.encoder_attn.q_proj", "cross_attn_q", 9),
        ("model.layers.0.cross_attn.o_proj", "cross_attn_dense", 12),
        ("model.layers.0.self_attn.dense", "attn_dense", 4),
        ("transformer.h.0.attn.c_proj", "attn_dense", 4),
        ("transformer.h.0.mlp.c_proj", "mlp_4h_to_h", 6),
        ("transformer.h.0.mlp.w1", "mlp_gate", 7),
        ("transformer.h.0.mlp.w2", "mlp_h_to_4h", 5),
        ("gpt_neox.layers.0.mlp.dense_4h_to_h", "mlp_4h_to_h", 6),
        ("transformer.blocks.0.ffn.up_proj", "mlp_h_to_4h", 5),
        ("model.layers.0.feed_forward.w3", "mlp_gate", 7),
        ("model.layers.0.block_sparse_moe.gate", "moe_router", 16),
        ("model.layers.0.block_sparse_moe.experts.0.w1", "moe_h_to_4h", 13),
        ("model.layers.0.mlp.experts.0.down_proj", "moe_4h_to_h", 14),
        ("model.layers.0.mlp.shared_expert.up_proj", "shared_expert_gate", 21),
        ("model.layers.0.mlp.shared_experts.gate_proj", "shared_expert_h_to_4h", 19),
        ("model.layers.0.mlp.shared_expert_gate", "mlp_router", 17),
        ("transformer.encoder.layers.0.mlp.dense_h_to_4h", "mlp_gate_up", 18),
        ("model.layers.0.self_attn.qkv_proj", "attn_qkv", 0),
    ],
)
def test_names_of_many_models_find_their_module(tmp_path: Path, name: str, module: str, number: int) -> None:
    """Prefixes, what training wrappers leave in names, and each model's own words."""
    tensors = {
        f"{PREFIX}{name}.lora_A.weight": np.ones((RANK, 8), np.float16),
        f"{PREFIX}{name}.lora_B.weight": np.ones((8, RANK), np.float16),
    }
    path = write_adapter(tmp_path / "sql", modules=[], rank=RANK, extra_tensors=tensors)
    with read_adapter(path) as source:
        assert [(target.module, target.module_id, target.layer) for target in source.targets] == [(module, number, 0)]


def test_what_unsloth_and_axolotl_write_is_read(tmp_path: Path) -> None:
    """Unsloth's quantised base and long regular expression; Axolotl's compiled model and local path."""
    regex = (
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:q_proj))"
    )
    unsloth = write_adapter(
        tmp_path / "unsloth",
        prefix=f"{PREFIX}model.language_model.",
        auto_mapping={"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True},
        base_model_name_or_path="unsloth/llama-3-8b-bnb-4bit",
        target_modules=regex,
        lora_alpha=16.0,
    )
    axolotl = write_adapter(
        tmp_path / "axolotl",
        prefix=f"{PREFIX}_orig_mod.",
        base_model_name_or_path="./outputs/merged",
        target_modules=["v_proj", "q_proj"],
        peft_version="0.17.1@abc",
        inference_mode=True,
    )
    for path in (unsloth, axolotl):
        with read_adapter(path, base_model="tiny-llama", base=base()) as source:
            assert [target.module for target in source.targets] == ["attn_q", "attn_v"] * 2


def test_a_fused_adapter_is_refused_while_its_engine_is_unknown(tmp_path: Path) -> None:
    """Cut at a guessed place it would answer wrong in silence: the message says what is missing, and where to."""
    path = adapter(tmp_path / "sql", {"self_attn.qkv_proj": (16, 32)})
    assert "the engine's modules are not known" in refused(path)
    message = refused(path, Layout("float16", fused=("attn_qkv",)))
    assert "the engine's attention heads are not known" in message
    assert "give the engine's config.json (backends[].engine.config)" in message


def test_a_fused_adapter_of_other_heads_is_refused(tmp_path: Path) -> None:
    """32 rows are not the 16 + 16 + 16 of this engine."""
    path = adapter(tmp_path / "sql", {"self_attn.qkv_proj": (16, 32)})
    message = refused(path, Layout("float16", fused=(), heads=Heads(4, 4, 4)))
    assert "has 32 rows, and the engine's q, k and v have 16 + 16 + 16" in message


def test_ranks_that_do_not_divide_the_heads_are_refused(tmp_path: Path) -> None:
    """Two key-value heads over four ranks: the engine repeats them, which rows cannot say."""
    path = adapter(tmp_path / "sql", {"self_attn.qkv_proj": (16, 32)})
    message = refused(path, Layout("float16", 1, 4, ("attn_qkv",), Heads(4, 2, 4)))
    assert "parts of 16 + 8 + 8 rows, which 4 tensor-parallel ranks cannot share evenly" in message


def test_one_module_in_two_forms_is_refused(tmp_path: Path) -> None:
    """No model has qkv_proj and q_proj in one layer."""
    path = adapter(tmp_path / "sql", {"self_attn.qkv_proj": (16, 32), "self_attn.k_proj": (16, 8)})
    assert "both adapt attn_k; no model has both" in refused(path)


def test_half_of_an_odd_gate_up_is_refused(tmp_path: Path) -> None:
    """Gate and up have one size."""
    assert "has gate and up of 33 rows" in refused(adapter(tmp_path / "sql", {"mlp.gate_up_proj": (16, 33)}))


def test_a_missing_expert_is_refused(tmp_path: Path) -> None:
    """A row holds all experts; expert 1 cannot be left out."""
    names = {f"block_sparse_moe.experts.{number}.w1": (16, 24) for number in (0, 2)}
    message = refused(adapter(tmp_path / "sql", names))
    assert "adapts expert 2 of moe_h_to_4h but expert 1 has none; rows hold all experts or none" in message


def test_experts_of_two_sizes_are_refused(tmp_path: Path) -> None:
    """All experts of a module have one shape."""
    names = {"block_sparse_moe.experts.0.w1": (16, 24), "block_sparse_moe.experts.1.w1": (16, 32)}
    assert "are of experts of two sizes" in refused(adapter(tmp_path / "sql", names))


def test_core_and_packer_agree_on_every_layout(tmp_path: Path) -> None:
    """What the core reserves is what the packer writes, for fused and stacked modules, split and whole."""
    names = {
        "self_attn.qkv_proj": (16, 32), "mlp.gate_up_proj": (16, 48), "block_sparse_moe.gate": (16, 2),
        **{f"block_sparse_moe.experts.{number}.w2": (24, 16) for number in (0, 1)},
    }  # fmt: skip
    with read_adapter(adapter(tmp_path / "sql", names)) as source:
        known = adapter_of(source)
        for fused in ((), ("attn_qkv",), ("mlp_gate_up",), ("attn_qkv", "mlp_gate_up")):
            for tp in (1, 2):
                layout = Layout("float16", 8, tp, fused, Heads(4, 2, 4))
                packing = plan(source, layout)
                assert packing.size_bytes == packed_size_bytes(known.rows, layout)
                out = np.ones(packing.shape, numpy_dtype(layout))
                pack(source, packing, out)
                assert lora_config(packing).shape == (len(packing.rows), 3)
                assert np.isfinite(out).all()


def sharded(path: Path, **changed: object) -> Path:
    """Write an adapter's tensors in two files with an index; `changed` overrides the weight_map."""
    tensors = read_tensors(path)
    (path / "adapter_model.safetensors").unlink()
    owners = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        file_name = f"adapter_model-0000{number}-of-00002.safetensors"
        write_safetensors(path / file_name, {name: tensors[name] for name in names})
        owners |= dict.fromkeys(names, file_name)
    index = {"metadata": {}, "weight_map": {**owners, **changed}}
    (path / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    return path


def test_shards_are_one_adapter(tmp_path: Path) -> None:
    """Digest and targets are those of the same tensors in one file."""
    with read_adapter(write_adapter(tmp_path / "one")) as source:
        digest, modules = source.digest, [target.module for target in source.targets]
    with read_adapter(sharded(write_adapter(tmp_path / "two"))) as source:
        assert (source.digest, [target.module for target in source.targets]) == (digest, modules)
        source.file.check_unchanged()


@pytest.mark.parametrize(
    ("owner", "why"),
    [
        ("../adapter_model.safetensors", "no plain file name"),
        ("adapter_model.bin", "no plain file name"),
        ("missing.safetensors", "is missing, which its index names"),
        ("adapter_model-00001-of-00002.safetensors", "lacks tensor 'x'"),
        (7, "no plain file name"),
    ],
)
def test_an_index_that_is_not_true_is_refused(tmp_path: Path, owner: object, why: str) -> None:
    """Names outside the folder, missing files, tensors that are not where the index says."""
    assert why in refused(sharded(write_adapter(tmp_path / "sql"), x=owner))


def test_a_shard_with_more_than_its_index_says_is_refused(tmp_path: Path) -> None:
    """Nothing is dropped: a tensor that the index does not name ends it."""
    path = sharded(write_adapter(tmp_path / "sql"))
    name = "adapter_model-00001-of-00002.safetensors"
    write_safetensors(path / name, {"stray": np.ones((1, 1), np.float16)})
    assert "against its index; fetch the adapter again" in refused(path)


def test_a_file_beside_an_index_is_refused(tmp_path: Path) -> None:
    """Which of the two is meant, nobody can say."""
    path = sharded(write_adapter(tmp_path / "sql"))
    write_safetensors(path / "adapter_model.safetensors", {"x": np.ones((1, 1), np.float16)})
    assert "keep the one that is meant" in refused(path)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.bin.index.json", "adapter_model.pt"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    """A folder with pickles only is refused with the way to save it."""
    path = write_adapter(tmp_path / "sql")
    (path / "adapter_model.safetensors").rename(path / name)
    message = refused(path)
    assert f"it has {name} only, a pickle, which is never opened" in message
    assert "save it with safe_serialization=True" in message


BASE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 160}


def base(**fields: object) -> BaseModel:
    """Return what a config.json of the tiny llama says, with changes."""
    return base_model_of({**BASE, "num_hidden_layers": 2, **fields})


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"hidden_size": 128}, "lora_A.weight' and its lora_B are 64 → 64 and the base model's attn_q is 128 → 128"),
        ({"num_hidden_layers": 1}, "is of layer 1 and the base model has 1"),
        ({"num_key_value_heads": 1}, "are 64 → 32 and the base model's attn_v is 64 → 16"),
    ],
)
def test_every_tensor_is_checked_against_the_base_model(tmp_path: Path, fields: dict[str, int], why: str) -> None:
    """A mismatch names the tensor and both sides."""
    with pytest.raises(Invalid) as caught:
        read_adapter(write_adapter(tmp_path / "sql"), base=base(**fields))
    assert caught.value.reason is Reason.ADAPTER_MISMATCH
    assert why in caught.value.message


def test_experts_need_a_base_model_that_has_them(tmp_path: Path) -> None:
    """A dense base model has no module for them."""
    path = adapter(tmp_path / "sql", {"block_sparse_moe.experts.0.w1": (64, 160)})
    with pytest.raises(Invalid, match="adapts moe_h_to_4h, which the base model does not have"):
        read_adapter(path, base=base())
    with read_adapter(path, base=base(num_local_experts=1)) as source:
        assert source.targets[0].module == "moe_h_to_4h"


def test_a_name_given_for_the_base_model_replaces_the_configs(tmp_path: Path) -> None:
    """Trained on a local path: the name given counts for matching; the digest is of the files."""
    path = write_adapter(tmp_path / "sql", base_model_name_or_path="/home/me/llama-4bit")
    with read_adapter(path, base_model="tiny-llama") as renamed, read_adapter(path) as plain:
        assert renamed.base_model == "tiny-llama"
        assert renamed.digest == plain.digest


def test_a_base_models_config_is_read_under_each_models_names(tmp_path: Path) -> None:
    """GPT-2's, Falcon's and a vision model's fields, from the folder or the file."""
    gpt2 = base_model_of({"n_embd": 16, "n_head": 4, "n_layer": 2})
    assert (gpt2.heads, gpt2.layers, gpt2.modules["mlp_h_to_4h"]) == (Heads(4, 4, 4), 2, (16, 64))
    falcon = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "num_kv_heads": 4}
    assert base_model_of({**falcon, "multi_query": True}).heads == Heads(4, 1, 4)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {**BASE, "num_hidden_layers": 2}}))
    assert read_base_model(tmp_path) == read_base_model(tmp_path / "config.json") == replace(base(), is_multimodal=True)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "it is not JSON"),
        ("{}", "the field hidden_size is missing"),
        ('{"hidden_size": "x"}', "not a size"),
        ('{"hidden_size": 64, "num_attention_heads": 3, "num_key_value_heads": 2}', "are no attention"),
    ],
)
def test_a_base_models_config_that_is_not_right_is_refused(tmp_path: Path, text: str, why: str) -> None:
    """Misused, with the field."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(Misused, match=r"is not a decoder's config\.json") as caught:
        read_base_model(tmp_path)
    assert why in caught.value.message
    with pytest.raises(Misused, match="No such file"):
        read_base_model(tmp_path / "missing")


def test_inspect_says_which_backends_could_serve_it_and_why_not(tmp_path: Path) -> None:
    """Pages, bytes and task id where it fits; the short reason and the sentence where it does not."""
    path = adapter(tmp_path / "sql", {"self_attn.qkv_proj": (16, 32)})
    split = {"attn_q": (16, 16), "attn_k": (16, 8), "attn_v": (16, 8)}
    fits = EngineFacts(
        base_models=("tiny-llama",), dtype="float16", rank_max=8, modules=split, layers=2, heads=4, kv_heads=2,
        head_size=4, host_pages=4,
    )  # fmt: skip
    engines = {"good": fits, "unknown": EngineFacts(dtype="bfloat16"), "small": EngineFacts(rank_max=1)}
    found = inspect(path, backends=engines)["backends"]
    good, unknown, small = found
    assert (good["backend"], good["serves"], good["pages"], good["rows"]) == ("good", True, 1, 3)
    assert good["packed_bytes"] == 3 * RANK * 32 * 2
    assert good["flushed_share"] >= 0
    assert (unknown["serves"], unknown["short"]) == (False, "engine's modules unknown")
    assert "give the engine's config.json" in unknown["why"]
    assert small["short"] == "max rank 1 < 2"


@pytest.mark.parametrize(
    ("changes", "short"),
    [
        ({"modules": None}, "engine's modules unknown"),
        ({"heads": None}, "engine's heads unknown"),
        ({"head_size": 8}, "other heads"),
        ({"tp": 4, "kv_heads": 2}, "2 kv heads over tp 4"),
        ({"modules": {"attn_q": (16, 16)}}, "no module attn_k"),
        ({"modules": {"attn_qkv": (16, 48)}}, "other dims of attn_qkv"),
    ],
)
def test_misfits_of_fused_adapters(tmp_path: Path, changes: dict[str, object], short: str) -> None:
    """What is missing or different of the engine, before any GPU sees the adapter."""
    known: dict[str, object] = {"modules": {"attn_qkv": (16, 32)}, "heads": 4, "kv_heads": 2, "head_size": 4}
    with read_adapter(adapter(tmp_path / "sql", {"self_attn.qkv_proj": (16, 32)})) as source:
        held = adapter_of(source)
    assert misfit(held, EngineFacts(**known)) is None  # type: ignore[arg-type]
    found = misfit(held, EngineFacts(**{**known, **changes}))  # type: ignore[arg-type]
    assert found is not None
    assert label(found) == short
    assert len(sentence(found)) > 40


def test_labels_tell_layouts_apart_only_where_the_bytes_differ() -> None:
    """A plain adapter has one packed form however the engine fuses; a fused one has one for each way."""
    layouts = [
        Layout("float16", 1, tp, fused, Heads(4, 2, 4))
        for tp in (1, 2)
        for fused in ((), ("attn_qkv",), ("mlp_gate_up",))
    ]
    assert len({layout.for_modules(["attn_q"]).label for layout in layouts}) == 2
    assert len({layout.for_modules(["attn_qkv"]).label for layout in layouts}) == 4
    assert layouts[0].for_modules(["attn_q"]).label == "float16.r1.tp1"
    assert layouts[1].for_modules(["attn_qkv", "attn_dense"]).label == "float16.r1.tp1.attn_qkv.h4k2s4"
    assert layouts[2].for_modules(["mlp_gate_up"]).label == "float16.r1.tp1.mlp_gate_up"
