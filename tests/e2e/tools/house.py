"""What tools are pointed at: two emulated engines of a kind behind a sidecar, and a tokenizer that counts as they."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from tests.kit.emulated import running_engine
from tests.kit.peft_files import BASE_MODEL
from tests.kit.serving import Serving, serving, write_adapters
from tests.kit.vllm_emulated import running_vllm

TRITON, VLLM = "triton", "vllm"
KINDS = (TRITON, VLLM)
ENGINE = {"compute": "none", "time_scale": 0.1}
"""It never ends an answer by itself, and a step takes about a millisecond."""
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
)
BOS = "<s>"


@dataclass(frozen=True)
class House:
    """A running sidecar as a tool sees it."""

    kind: str
    served: Serving
    names: list[str]
    tokenizer: Path
    """A folder as of a model, with a tokenizer and its chat template."""

    @property
    def url(self) -> str:
        """Where the OpenAI API is, without `/v1`."""
        return f"http://{self.served.sidecar.http_address}"

    @property
    def grpc(self) -> str:
        """Where KServe's gRPC is."""
        return str(self.served.sidecar.data_address)

    @staticmethod
    def prompt_tokens(text: str) -> int:
        """Return how many tokens a prompt has: one a byte, and one for the beginning."""
        return 1 + len(text.encode())

    @staticmethod
    def chat_tokens(text: str) -> int:
        """Return how many tokens a conversation has that is one message of a user."""
        return House.prompt_tokens(f"user: {text}\nassistant: ")


@asynccontextmanager
async def house(folder: Path, kind: str, adapters: int = 8, **engine: Any) -> AsyncIterator[House]:
    """Serve adapters from two engines of a kind; `engine` are options that differ from ENGINE."""
    options = ENGINE | engine
    names = write_adapters(folder / "adapters", adapters)
    tokenizer = write_tokenizer(folder / "tokenizer")
    base = {"name": BASE_MODEL, "chat_template": str(tokenizer), "tokenizer": str(tokenizer)}
    backend: dict[str, Any] = {"base_model": base}
    async with AsyncExitStack() as stack:
        engines: list[Any] = []
        for _ in range(2):
            if kind == TRITON:
                engines.append(await stack.enter_async_context(running_engine(**options)))
            else:
                running = running_vllm(**options, max_loras=4, max_cpu_loras=8)
                engines.append((await stack.enter_async_context(running))[0])
        if kind == VLLM:
            (folder / "shared").mkdir()
            backend["adapters_dir"] = str(folder / "shared")
        served = await stack.enter_async_context(serving(engines, folder / "adapters", backend=backend))
        yield House(kind, served, names, tokenizer)


def write_tokenizer(folder: Path) -> Path:
    """Write a tokenizer of one token a byte and one for the beginning, as the emulated engines count."""
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, "</s>"])
    begun = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))])
    tokenizer.post_processor = begun
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": "</s>",
        "model_max_length": 8192, "chat_template": TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder
