"""A PEFT folder is read whole or refused with the thing, the reason and the way out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sidecar.adapters.peft import AdapterSource, read_adapter
from sidecar.errors import Invalid, Reason
from tests.kit.peft_files import (
    ALL_LINEAR,
    module_path,
    read_tensors,
    write_adapter,
    write_safetensors,
)

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def read(path: Path) -> AdapterSource:
    """Read an adapter and close its file."""
    with read_adapter(path) as source:
        return source


def refused(path: Path, reason: Reason) -> str:
    """Read an adapter that must be refused for this reason; return the message, which names the adapter."""
    with pytest.raises(Invalid) as caught:
        read_adapter(path)
    assert caught.value.reason is reason
    assert caught.value.details == {"adapter": path.name}
    assert caught.value.message.startswith(f"adapter '{path.name}': ")
    return caught.value.message


def test_targets_are_layer_major_by_module_id(tmp_path: Path) -> None:
    """Hugging Face's names become TensorRT-LLM's, gate_proj being mlp_h_to_4h, in one fixed order."""
    source = read(write_adapter(tmp_path / "sql", modules=ALL_LINEAR[::-1], layers=[1, 0], rank=4, alpha=8))
    per_layer = ["attn_q", "attn_k", "attn_v", "attn_dense", "mlp_h_to_4h", "mlp_4h_to_h", "mlp_gate"]
    assert [target.module for target in source.targets] == per_layer * 2
    assert [target.module_id for target in source.targets] == [1, 2, 3, 4, 5, 6, 7] * 2
    assert [target.layer for target in source.targets] == [0] * 7 + [1] * 7
    gate, down, up = source.targets[4:7]
    assert gate.a.name.endswith("gate_proj.lora_A.weight")
    assert up.b.name.endswith("up_proj.lora_B.weight")
    assert (down.in_dim, down.out_dim, down.rank, down.scale, down.dtype) == (160, 64, 4, 2.0, "BF16")
    assert source.name == "sql"
    assert source.base_model == "tiny-llama"


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("infix", ["", ".default"])
def test_old_and_new_spellings_of_names_are_read(tmp_path: Path, prefix: str, infix: str) -> None:
    """The prefix and the adapter's name inside a tensor's name are optional."""
    source = read(write_adapter(tmp_path / "sql", prefix=prefix, infix=infix))
    assert [target.module for target in source.targets] == ["attn_q", "attn_v"] * 2


def test_rslora_divides_by_the_root_of_the_rank(tmp_path: Path) -> None:
    """use_rslora: alpha / √r of each row's own rank."""
    ranks = {module_path("v_proj", 1): 2}
    source = read(write_adapter(tmp_path / "sql", rank=8, alpha=16, ranks=ranks, use_rslora=True))
    assert [t.scale for t in source.targets] == [16 / math.sqrt(8)] * 3 + [16 / math.sqrt(2)]


def test_patterns_match_ends_of_names_and_the_first_wins(tmp_path: Path) -> None:
    """rank_pattern and alpha_pattern follow PEFT: a regular expression on the end, in the file's order."""
    source = read(
        write_adapter(
            tmp_path / "sql",
            rank=8,
            alpha=16,
            ranks={module_path("q_proj", 0): 4, module_path("q_proj", 1): 4},
            rank_pattern={r"layers\.\d+\.self_attn\.q_proj": 4},
            alpha_pattern={"0.self_attn.v_proj": 1, "v_proj": 2, "proj": 99, "^model.layers.1.*q_proj": 32},
        )
    )
    assert [(t.rank, t.scale) for t in source.targets] == [(4, 4.0), (8, 1 / 8), (4, 8.0), (8, 2 / 8)]


def test_a_pattern_does_not_match_inside_a_word(tmp_path: Path) -> None:
    """A key matches whole parts of a name: `proj` is no part of `q_proj`."""
    source = read(write_adapter(tmp_path / "sql", rank=8, alpha=16, alpha_pattern={"proj": 1}))
    assert {target.scale for target in source.targets} == {2.0}


def test_initialisations_that_leave_the_base_alone_are_read(tmp_path: Path) -> None:
    """gaussian, eva, orthogonal and mica only choose where training starts."""
    for initialisation in (True, False, "gaussian", "eva", "orthogonal", "mica"):
        path = write_adapter(tmp_path / "sql", init_lora_weights=initialisation)
        assert len(read(path).targets) == 4


def test_unknown_but_empty_fields_are_read(tmp_path: Path) -> None:
    """A newer PEFT adds fields; one that is not in use changes nothing."""
    path = write_adapter(tmp_path / "sql", use_flying_lora=False, flying_config=None, peft_version="9.9")
    assert len(read(path).targets) == 4


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"use_dora": True}, "use_dora is set; DoRA needs the base model's weights"),
        ({"modules_to_save": ["classifier"]}, "modules_to_save is set; fully trained modules"),
        ({"bias": "all"}, "bias is 'all'; packed LoRA rows cannot carry it"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias is set; a bias cannot be carried"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', only 'LORA' can be served; merge it into the base model"),
        ({"peft_type": "VERA"}, "VeRA scales random matrices that all layers share; train a LoRA"),
        ({"peft_type": "IA3"}, "IA3 scales activations, which packed LoRA rows cannot carry; merge it"),
        ({"peft_type": "PROMPT_TUNING"}, "prompt tuning adds tokens to the prompt and no weights; send them"),
        ({"peft_type": "P_TUNING"}, "p-tuning adds tokens to the prompt"),
        ({"peft_type": "PREFIX_TUNING"}, "prefix tuning adds keys and values to the cache"),
        ({"peft_type": "ADALORA"}, "AdaLoRA keeps singular values"),
        ({"kasa_config": {"beta": 1}}, "kasa_config is set; KaSA changes the base model's weights"),
        ({"monteclora_config": {"n": 1}}, "monteclora_config is set"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga', so A and B are relative to a changed base"),
        ({"init_lora_weights": "OLoRA"}, "init_lora_weights is 'OLoRA', so A and B are relative to a changed base"),
        ({"init_lora_weights": "surprise"}, "init_lora_weights is 'surprise', which is not known"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is set"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is set"),
        ({"use_qalora": True}, "use_qalora is set"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is set"),
        ({"megatron_config": {"tp": 2}}, "megatron_config is set"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters is set"),
        ({"trainable_token_indices": [7]}, "trainable_token_indices is set"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config is set"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', so A and B are relative to a changed"),
        ({"init_lora_weights": "pissa_niter_16"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
        ({"init_lora_weights": "loftq"}, "so A and B repair a quantised base model that the engine does not have"),
        ({"init_lora_weights": {"a": 1}}, "init_lora_weights is"),
        ({"use_flying_lora": True}, "the field 'use_flying_lora' is not known"),
    ],
)
def test_a_setting_we_cannot_honour_is_refused_by_name(tmp_path: Path, config: Any, why: str) -> None:
    """No setting that changes the adapter's effect is ever dropped."""
    assert why in refused(write_adapter(tmp_path / "sql", **config), Reason.ADAPTER_UNSUPPORTED)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"r": ...}, "the field r is missing; save the adapter with save_pretrained"),
        ({"lora_alpha": ...}, "the field lora_alpha is missing"),
        ({"peft_type": ...}, "the field peft_type is missing"),
        ({"base_model_name_or_path": " "}, "base_model_name_or_path is ' '; name the base model"),
        ({"base_model_name_or_path": "a\ud800"}, "half a letter"),
        ({"r": 0}, "r is '0'; it is a whole number from 1"),
        ({"r": True}, "r is 'True'"),
        ({"r": 8.0}, "r is '8.0'"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'; it is a number"),
        ({"lora_alpha": 1e300}, "lora_alpha is '1e+300'"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'; it is true or false"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern is not an object of numbers"),
        ({"alpha_pattern": [1]}, "alpha_pattern is not an object of numbers"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: the key '(' is not a regular expression"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "the key '(a+)+$' is a regular expression that can take too long"),
        ({"alpha_pattern": {".*.*.*.*x": 1}}, "can take too long"),
        ({"alpha_pattern": {"(.|.)" * 40: 1}}, "can take too long"),
        ({"alpha_pattern": {r"(.)\1": 1}}, "can take too long"),
        ({"alpha_pattern": {"(?=x)": 1}}, "can take too long"),
        ({"alpha_pattern": {"x" * 300: 1}}, "is too long"),
        ({"alpha_pattern": {f"m{i}": 1 for i in range(4097)}}, "has 4097 entries"),
        ({"alpha_pattern": {f"a*b*c*{i}": 1 for i in range(9)}}, "take too long together"),
        ({"target_modules": ["q_proj"]}, "target_modules leaves out 'model.layers.0.self_attn.v_proj'"),
        ({"exclude_modules": ["1.self_attn.q_proj"]}, "exclude_modules leaves out 'model.layers.1.self_attn.q_proj'"),
        ({"layers_to_transform": [1]}, "layers_to_transform leaves out 'model.layers.0.self_attn.q_proj'"),
        ({"layers_to_transform": 0}, "config and weights are of different trainings"),
        ({"layers_to_transform": ["0"]}, "it is a number or a list of numbers"),
        ({"target_modules": {"q_proj": 1}}, "it is a list of names or one regular expression"),
    ],
)
def test_a_config_that_is_not_right_is_refused_by_field(tmp_path: Path, config: Any, why: str) -> None:
    """Missing fields, wrong types and unsafe patterns each have a message."""
    assert why in refused(write_adapter(tmp_path / "sql", **config), Reason.ADAPTER_MALFORMED)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "it is not JSON"),
        ("[]", "it is not a JSON object"),
        ('{"r": 8, "r": 16}', "the key 'r' occurs twice"),
        ('{"r": Infinity}', "Infinity is not a JSON number"),
        ('{"r": ' + "9" * 5000 + "}", "adapter_config.json"),
        (" " * ((1 << 20) + 1), "is larger than 1048576 bytes"),
    ],
)
def test_a_config_that_is_not_json_is_refused(tmp_path: Path, text: str, why: str) -> None:
    """Damaged configs never raise anything but Invalid."""
    path = write_adapter(tmp_path / "sql")
    (path / "adapter_config.json").write_text(text)
    assert why in refused(path, Reason.ADAPTER_MALFORMED)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (f"{Q_PROJ}.lora_magnitude_vector", "holds a DoRA magnitude"),
        (f"{Q_PROJ}.weight_m_wdecomp.weight", "holds a DoRA magnitude"),
        ("base_model.model.score.modules_to_save.weight", "is a fully trained module (modules_to_save)"),
        ("base_model.model.lm_head.weight", "changes the embeddings or lm_head"),
        ("base_model.model.lm_head.lora_A.weight", "changes the embeddings or lm_head"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "changes the embeddings or lm_head"),
        (f"{Q_PROJ}.lora_B.bias", "is a bias, which packed LoRA rows cannot carry"),
        ("base_model.model.transformer.wte.lora_embedding_A", "changes the embeddings or lm_head"),
        ("base_model.model.gpt_neox.embed_out.lora_A.weight", "changes the embeddings or lm_head"),
        ("base_model.model.model.layers.0.mlp.experts.lora_A.weight", "as one parameter (target_parameters)"),
        ("base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight", "as one parameter"),
        ("base_model.model.model.layers.0.self_attn.q_a_proj.lora_A.weight", "multi-head latent attention"),
        (f"{Q_PROJ}.vera_lambda_b", "belongs to another method than LoRA; merge it"),
        (f"{Q_PROJ}.ia3_l", "belongs to another method than LoRA"),
        ("prompt_encoder.prompt_embeddings", "belongs to another method than LoRA"),
    ],
)
def test_a_tensor_that_has_no_place_is_refused_by_name(tmp_path: Path, name: str, why: str) -> None:
    """Each kind of tensor that packed rows cannot carry has its own message with the tensor's name."""
    path = write_adapter(tmp_path / "sql", extra_tensors={name: np.ones((8, 64), np.float16)})
    message = refused(path, Reason.ADAPTER_UNSUPPORTED)
    assert name in message
    assert why in message


@pytest.mark.parametrize(
    "name",
    [
        "anything",
        f"{Q_PROJ}.lora_C.weight",
        f"{Q_PROJ}.lora_A.other.weight",
        f"vision_tower.{Q_PROJ}.lora_A.weight",
        "base_model.model.model.layers.01.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.٣.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.mlp.q_proj.lora_A.weight",
        "base_model.model.model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.visual.blocks.0.attn.qkv.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.experts.0.w1.lora_A.weight",
        f"{Q_PROJ}.lora_A.weight\n",
    ],
)
def test_an_unknown_tensor_name_is_refused(tmp_path: Path, name: str) -> None:
    """NVIDIA's converter drops such tensors; here they end the registration."""
    path = write_adapter(tmp_path / "sql", extra_tensors={name: np.ones((8, 64), np.float16)})
    message = refused(path, Reason.ADAPTER_MALFORMED)
    assert "is not known; expected base_model.model.model.layers.<n>" in message


@pytest.mark.parametrize(("dropped", "missing"), [("A", "lora_A"), ("B", "lora_B")])
def test_half_a_pair_is_refused(tmp_path: Path, dropped: str, missing: str) -> None:
    """A without B, and B without A."""
    path = write_adapter(tmp_path / "sql")
    tensors = read_tensors(path)
    del tensors[f"{Q_PROJ}.lora_{dropped}.weight"]
    write_safetensors(path / "adapter_model.safetensors", tensors)
    assert f"has no {missing} beside it" in refused(path, Reason.ADAPTER_MALFORMED)


def test_a_rank_that_disagrees_with_the_tensors_is_refused(tmp_path: Path) -> None:
    """r = 16 over tensors of rank 8."""
    message = refused(write_adapter(tmp_path / "sql", rank=8, r=16), Reason.ADAPTER_MALFORMED)
    assert "gives 'model.layers.0.self_attn.q_proj' the rank 16 (r, rank_pattern) but its tensors have 8" in message


def test_a_rank_pattern_that_disagrees_is_refused(tmp_path: Path) -> None:
    """The pattern's rank counts, where it matches."""
    path = write_adapter(tmp_path / "sql", rank=8, rank_pattern={"1.self_attn.v_proj": 4})
    message = refused(path, Reason.ADAPTER_MALFORMED)
    assert "gives 'model.layers.1.self_attn.v_proj' the rank 4" in message


def with_tensors(path: Path, **changed: np.ndarray) -> Path:
    """Replace tensors of the first q_proj: `A=`, `B=`."""
    tensors = read_tensors(path) | {f"{Q_PROJ}.lora_{side}.weight": value for side, value in changed.items()}
    write_safetensors(path / "adapter_model.safetensors", tensors)
    return path


def test_a_pair_of_two_ranks_is_refused(tmp_path: Path) -> None:
    """B's rank is A's."""
    path = with_tensors(write_adapter(tmp_path / "sql"), B=np.ones((64, 4), np.float16))
    assert "has rank 4 but its lora_A has 8" in refused(path, Reason.ADAPTER_MALFORMED)


@pytest.mark.parametrize("shape", [(8,), (0, 64), (8, 64, 1)])
def test_a_weight_that_is_no_matrix_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Convolutions and empty tensors are not matrices."""
    path = with_tensors(write_adapter(tmp_path / "sql"), A=np.ones(shape, np.float16))
    assert "a LoRA weight is a matrix" in refused(path, Reason.ADAPTER_MALFORMED)


def test_a_dtype_that_is_no_float_is_refused(tmp_path: Path) -> None:
    """Only F16, BF16 and F32 are LoRA weights."""
    path = with_tensors(write_adapter(tmp_path / "sql"), A=np.ones((8, 64), np.int64))
    message = refused(path, Reason.ADAPTER_UNSUPPORTED)
    assert "is I64, not one of F16, BF16, F32; save it as bfloat16" in message


def test_a_module_of_two_sizes_is_refused(tmp_path: Path) -> None:
    """Engines have one size of a module for all layers."""
    path = with_tensors(write_adapter(tmp_path / "sql"), A=np.ones((8, 32), np.float16))
    message = refused(path, Reason.ADAPTER_UNSUPPORTED)
    assert "attn_q is 64 → 64 in layer 1 but 32 → 64 in layer 0" in message


def test_the_same_tensor_in_two_spellings_is_refused(tmp_path: Path) -> None:
    """With and without `.default` is the same place."""
    twin = {f"{Q_PROJ}.lora_A.default.weight": np.ones((8, 64), np.float16)}
    message = refused(write_adapter(tmp_path / "sql", extra_tensors=twin), Reason.ADAPTER_MALFORMED)
    assert "are the same tensor; keep one of them" in message


def test_an_adapter_without_tensors_is_refused(tmp_path: Path) -> None:
    """An empty file is not an adapter."""
    path = write_adapter(tmp_path / "sql", modules=[])
    assert "holds no LoRA tensor" in refused(path, Reason.ADAPTER_MALFORMED)


def test_the_config_that_peft_writes_today_is_read(tmp_path: Path) -> None:
    """Every field that save_pretrained writes is known."""
    path = write_adapter(
        tmp_path / "sql",
        alora_invocation_tokens=None,
        arrow_config=None,
        corda_config=None,
        ensure_weight_tying=False,
        eva_config=None,
        exclude_modules=None,
        lora_bias=False,
        peft_version="0.18.0",
        qalora_group_size=16,
        target_parameters=None,
        trainable_token_indices=None,
        use_qalora=False,
    )
    assert json.loads((path / "adapter_config.json").read_text())["qalora_group_size"] == 16
    assert len(read(path).targets) == 4
