"""Makes the toy model that the tests serve: `python make_model.py FOLDER`, in vLLM's environment.

A random Llama of 5 M parameters with `initializer_range` so large that its answers differ, a byte-level BPE trained on
Python's own sources, and in `FOLDER/adapters` sixteen adapters `a00` … `a15` as PEFT saves them: all seven projections,
rank 8 (even) or 16 (odd), A **and** B random. Nothing is downloaded.
"""

from __future__ import annotations

import sys
import sysconfig
from itertools import islice
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 20
SIZE = 0.06
"""The standard deviation of all weights, also of the adapters' A and B."""
VOCABULARY = 4096
ADAPTERS = 16
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_tokenizer(folder: Path) -> None:
    """Train the tokenizer on modules of the standard library, in the order of their names."""
    library = Path(sysconfig.get_path("stdlib"))
    trained = ByteLevelBPETokenizer()
    files = [str(path) for path in islice(sorted(library.glob("*.py")), 60)]
    trained.train(files, vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(str(folder))


def make_model(folder: Path, ffn: int) -> LlamaForCausalLM:
    """Write the model in float32 and return it."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=ffn, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=2048, initializer_range=SIZE, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(str(folder))
    return model


def make_adapter(model: LlamaForCausalLM, folder: Path, number: int) -> None:
    """Write one adapter; the model is as it was before."""
    rank = 16 if number % 2 else 8
    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=MODULES))
    generator = torch.Generator().manual_seed(1000 + number)
    with torch.no_grad():
        for name, parameter in sorted(wrapped.named_parameters()):
            if "lora_" in name:
                # Of float16's values, so that an engine's own type rounds nothing.
                parameter.copy_(parameter.normal_(0.0, SIZE, generator=generator).half())
    wrapped.peft_config["default"].base_model_name_or_path = "base"
    wrapped.save_pretrained(str(folder))
    wrapped.unload()


def main() -> None:
    folder = Path(sys.argv[1])
    make_tokenizer(folder / "model")
    model = make_model(folder / "model", int(sys.argv[2]))
    for number in range(ADAPTERS):
        make_adapter(model, folder / "adapters" / f"a{number:02}", number)


if __name__ == "__main__":
    main()
