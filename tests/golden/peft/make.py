"""Makes the golden adapters with the real `peft` library: `python make.py FOLDER`.

For each case a folder with what PEFT's save_pretrained wrote, the base model's config.json, and `delta.npz`: for each
adapted module PEFT's own `get_delta_weight` in float32, [out, in]. A and B are drawn by NumPy, so that the same case is
the same everywhere.
"""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import FFN, HIDDEN, MODELS
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """A model, LoraConfig's arguments, the dtype of A and B, and what is done to the saved files."""

    model: str
    config: dict[str, Any]
    dtype: torch.dtype = torch.float32
    size: float = 0.05
    sharded: bool = False
    renamed: tuple[str, str] | None = None
    shifts: tuple[int, int] = field(default=(0, 0))
    """Powers of two on A and on B, for values that leave float16's range."""
    named: bool = True
    """Whether the config is given a name of the base model; PEFT has none for a model made in memory."""


def _plain(*modules: str, **config: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 8, "target_modules": list(modules), **config}


CASES: dict[str, Case] = {
    "llama-qv": Case("llama", _plain("q_proj", "v_proj")),
    "llama-all-linear": Case("llama", _plain(*ALL_LINEAR), torch.bfloat16),
    "llama-all-linear-word": Case("llama", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
    "llama-rslora": Case("llama", _plain(*ATTENTION, use_rslora=True, r=3), torch.float16),
    "llama-patterns": Case(
        "llama",
        _plain(
            *ALL_LINEAR,
            rank_pattern={"layers.1.mlp.down_proj": 6, "q_proj": 2, r".*\.0\.self_attn\.v_proj": 1},
            alpha_pattern={"k_proj": 3, "^model.layers.1.*up_proj": 5.5},
        ),
    ),
    "llama-layers": Case("llama", _plain(*ATTENTION, layers_to_transform=[1])),
    "llama-layers-pattern": Case("llama", _plain("q_proj", layers_to_transform=0, layers_pattern="layers")),
    "llama-regex": Case("llama", _plain() | {"target_modules": r".*\.(self_attn|mlp)\.(k|up)_proj"}),
    "llama-exclude": Case("llama", _plain("q_proj", "o_proj", exclude_modules=["layers.0.self_attn.o_proj"])),
    "llama-gaussian": Case("llama", _plain("q_proj", init_lora_weights="gaussian", lora_dropout=0.1)),
    "llama-orthogonal": Case("llama", _plain("q_proj", init_lora_weights="orthogonal")),
    "llama-sharded": Case("llama", _plain(*ALL_LINEAR), torch.bfloat16, sharded=True),
    "llama-large-a": Case("llama", _plain("q_proj", "v_proj"), torch.bfloat16, shifts=(90, -88)),
    "llama-large-b": Case("llama", _plain("q_proj", "v_proj"), torch.bfloat16, shifts=(-60, 66)),
    "llama-compiled": Case("llama", _plain("q_proj"), renamed=("base_model.model.", "base_model.model._orig_mod.")),
    "llama-unnamed": Case("llama", _plain("q_proj"), named=False),
    "llama-old-names": Case("llama", _plain("q_proj"), renamed=(".weight", ".default.weight")),
    "qwen2-all-linear": Case("qwen2", _plain(*ALL_LINEAR)),
    "gemma-attention": Case("gemma", _plain(*ATTENTION)),
    "phi-dense": Case("phi", _plain("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")),
    "phi3-fused": Case("phi3", _plain("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), torch.bfloat16),
    "gpt2-conv1d": Case("gpt2", _plain("c_attn", "c_proj", "c_fc", fan_in_fan_out=True)),
    "gptj": Case("gptj", _plain("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out")),
    "bigcode-multi-query": Case("bigcode", _plain("c_attn", "c_proj", "c_fc")),
    "neox-fused": Case("neox", _plain("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")),
    "bloom-fused": Case("bloom", _plain("query_key_value", "dense")),
    "falcon-multi-query": Case("falcon", _plain("query_key_value", "dense")),
    "falcon-grouped": Case("falcon-grouped", _plain("query_key_value", "dense")),
    "mpt-fused": Case("mpt", _plain("Wqkv", "out_proj", "up_proj", "down_proj")),
    "opt": Case("opt", _plain("q_proj", "v_proj", "out_proj", "fc1", "fc2")),
    "starcoder2": Case("starcoder2", _plain(*ATTENTION, "c_fc", "c_proj")),
    "baichuan-fused": Case("baichuan", _plain("W_pack", "o_proj", "up_proj")),
    "internlm2-fused": Case("internlm2", _plain("wqkv", "wo", "w1", "w2", "w3")),
    "chatglm-fused": Case("chatglm", _plain("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")),
    "mixtral-experts": Case("mixtral", _plain("q_proj", "gate", "w1", "w2", "w3", rank_pattern={"experts.1.w1": 2})),
    "qwen2-moe-experts": Case("qwen2-moe", _plain(*ALL_LINEAR[4:], "gate", "shared_expert_gate")),
    "vision-language": Case("vision-language", _plain("q_proj", "v_proj")),
}


def make(folder: Path, name: str, case: Case) -> None:
    """Write one case."""
    torch.manual_seed(0)
    base = MODELS[case.model]()
    config = base.config if isinstance(base.config, dict) else base.config.to_dict()
    model = get_peft_model(base, LoraConfig(**case.config))
    fill(model, np.random.default_rng(zlib.crc32(name.encode())), case)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    if case.renamed is not None:
        tensors = {key.replace(*case.renamed): value for key, value in tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if case.sharded:
        shard(folder, tensors)
    tidy(folder, config, case)
    np.savez_compressed(folder / "delta.npz", **deltas_of(model))


def fill(model: torch.nn.Module, generator: np.random.Generator, case: Case) -> None:
    """Draw A and B, rounded to the case's dtype, which they are saved in."""
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            shift = case.shifts[0 if "lora_A" in name else 1]
            drawn = generator.normal(0.0, case.size, tuple(parameter.shape)) * 2.0**shift
            parameter.data = torch.from_numpy(drawn).to(case.dtype)


def deltas_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Return PEFT's delta of each module, [out, in], in float32 from the values as saved; the model is used up."""
    deltas = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            for part in (module.lora_A, module.lora_B):
                part.float()
            delta = module.get_delta_weight("default").detach().float().numpy()
            path = name.removeprefix("base_model.model.")
            deltas[path] = delta.T if getattr(module, "fan_in_fan_out", False) else delta
    return deltas


def shard(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write the tensors in two files with an index, as transformers names them."""
    (folder / "adapter_model.safetensors").unlink()
    names, owners = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file_name = f"adapter_model-{number:05}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, folder / file_name, metadata={"format": "pt"})
        owners |= dict.fromkeys(part, file_name)
    total = sum(value.numel() * value.element_size() for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": owners}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


def tidy(folder: Path, config: dict[str, Any], case: Case) -> None:
    """Name the base model, if it is to have one, and write its config.json without what depends on versions."""
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    if case.named:
        fields["base_model_name_or_path"] = f"tiny-{case.model}"
    for key in ("target_modules", "exclude_modules"):
        if isinstance(fields.get(key), list):
            fields[key] = sorted(fields[key])
    path.write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n")
    kept = {key: value for key, value in config.items() if isinstance(value, int | str) or key == "text_config"}
    kept.pop("transformers_version", None)
    (folder / "base").mkdir(exist_ok=True)
    (folder / "base" / "config.json").write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def main() -> None:
    target = Path(sys.argv[1])
    for name, case in CASES.items():
        folder = target / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder, name, case)
    print(f"{len(CASES)} adapters, {sum(p.stat().st_size for p in target.rglob('*') if p.is_file()):,} bytes")


if __name__ == "__main__":
    assert HIDDEN < FFN
    main()
