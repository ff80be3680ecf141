"""What PEFT answers: `python peft_answers.py MODEL`, in vLLM's environment.

Reads a JSON object a line, {"adapter": folder or null, "prompt": token ids, "tokens": count}, and writes for each the
list of the greedy token ids, in float32 and with no regard to the end-of-sequence token.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from peft import PeftModel
from transformers import LlamaForCausalLM


def answer(model: LlamaForCausalLM, adapter: str | None, prompt: list[int], tokens: int) -> list[int]:
    """Return the greedy continuation of a prompt; the model is as it was before."""
    wrapped: Any = PeftModel.from_pretrained(model, adapter) if adapter else model
    ids = torch.tensor([prompt])
    with torch.no_grad():
        generated = wrapped.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    if adapter:
        wrapped.unload()
    return list(generated[0, len(prompt) :].tolist())


def main() -> None:
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(model, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
