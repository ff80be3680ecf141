"""The LLM-API model of TensorRT-LLM behind Triton: text in, text out, and adapters loaded from its own disk.

Source: `triton_backend/all_models/llmapi/tensorrt_llm/` (config.pbtxt, 1/model.py, 1/helpers.py). Its tensors have no
batch dimension. Every response of a streamed answer carries the whole text so far. An adapter is read from its path
whenever the engine's host cache does not have it; the path must exist for every request.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from sidecar.lab.engine.kserve.driver import Executor
from sidecar.lab.engine.kserve.errors import BackendError
from sidecar.lab.engine.kserve.generation import Generation, LoraTensors, Wanted
from sidecar.lab.engine.kserve.inference import Answer, Emit, Inference, Query, RunningQuery
from sidecar.lab.engine.kserve.options import LLMAPI, Options
from sidecar.lab.engine.kserve.outputs import Values, times_of
from sidecar.lab.engine.kserve.tensors import Tensor
from sidecar.lab.engine.kserve.work import Progress, Work
from sidecar.lab.engine.peft_files import read_peft
from sidecar.lab.engine.tokens import EOS, ByteTokenizer

MAX_TOKENS_DEFAULT = 32
CKPT_SOURCES = ("hf", "nemo")
_PREFIX = "Error generating request: "
_STOPPED = "Request cancelled by client"


def inference_of(driver: Executor, options: Options) -> Inference:
    """Return the inference of the models that these options make."""
    return LlmApiInference(driver, options) if options.protocol == LLMAPI else Inference(driver, options)


class LlmApiInference(Inference):
    """Runs queries to the LLM-API model on one engine."""

    def __init__(self, driver: Executor, options: Options) -> None:
        super().__init__(driver, options)
        self._dtype = driver.engine.spec.dtype
        self._shape = driver.engine.spec.shape

    async def run(self, query: Query, emit: Emit) -> None:
        """Emit the responses to a query, the last one final. Cancelling this cancels what the executor still runs."""
        try:
            if _scalar(query.tensors, "stop"):
                await emit(self._stop(query))
            else:
                await self._run(await self._asked_with_adapter(query), emit)
        except BackendError as error:
            await emit(Answer(None, f"{_PREFIX}{error.text}", final=True))
        finally:
            query.drop_tensors()

    def _stop(self, query: Query) -> Answer:
        """Cancel earlier requests with this id; unlike the core model this one always answers with an error."""
        if not query.triton_id:
            return Answer(None, "A request id must be provided for request cancellation", final=True)
        super()._stop(query)
        return Answer(None, _STOPPED, final=True)

    async def _asked_with_adapter(self, query: Query) -> RunningQuery:
        tensors = query.tensors
        prompt = _prompt(tensors)
        wanted = Wanted(
            streaming=bool(_scalar(tensors, "streaming")),
            exclude_input=bool(_scalar(tensors, "sampling_param_exclude_input_from_output")),
            num_input_tokens=False,
            num_output_tokens=False,
            perf_metrics=bool(_scalar(tensors, "sampling_param_return_perf_metrics")),
            finish_reason=bool(_scalar(tensors, "return_finish_reason")),
            stop_reason=bool(_scalar(tensors, "return_stop_reason")),
        )
        _refuse_unsupported(tensors)
        lora = await self._adapter(tensors)
        if wanted.streaming and not query.model.decoupled:
            raise BackendError("Streaming is only supported in decoupled mode.")
        return self._became(query, wanted, [self._generation(tensors, prompt, lora)])

    def _generation(self, tensors: dict[str, Tensor], prompt: str, lora: LoraTensors | None) -> Generation:
        asked = _scalar(tensors, "sampling_param_max_tokens")
        asked = MAX_TOKENS_DEFAULT if asked is None else int(asked)
        if asked <= 0:
            raise BackendError(f"max_tokens must be greater than 0, got {asked}")
        tokens = ByteTokenizer().encode(prompt)
        # The engine shortens an answer that would not fit instead of refusing it.
        fitting = max(1, min(asked, self._driver.engine.spec.max_seq_tokens - len(tokens)))
        return Generation(tokens, fitting, EOS, lora)

    async def _adapter(self, tensors: dict[str, Tensor]) -> LoraTensors | None:
        """Return the LoRA tensors for the executor: the id alone while the host cache has the adapter, else all."""
        parts = [_scalar(tensors, name) for name in ("lora_id", "lora_name", "lora_path")]
        if all(part is None for part in parts):
            return None
        if any(part is None for part in parts):
            raise BackendError("lora_id, lora_name, and lora_path must all be provided together")
        source = _scalar(tensors, "lora_ckpt_source")
        if source is not None and source.decode() not in CKPT_SOURCES:
            raise BackendError(f"lora_ckpt_source must be one of {CKPT_SOURCES}, got {source.decode()!r}")
        lora_id, path = int(parts[0]), Path(parts[2].decode())
        await asyncio.to_thread(_check_path, path)
        if self._driver.has_adapter(lora_id):
            return LoraTensors(lora_id, None, None)
        try:
            files = await asyncio.to_thread(read_peft, path, self._shape, self._dtype)
        except (OSError, ValueError, KeyError) as error:
            raise BackendError(f"Failed to load LoRA adapter: {error}") from error
        return LoraTensors(lora_id, files.weights, files.config)

    def _executor_text(self, work: Work, error: str) -> str:
        return f"{_PREFIX}{error}"

    def _values(self, asked: RunningQuery, progress: Progress) -> list[Values]:
        work, wanted = progress.work, asked.wanted
        if progress.token is not None:
            asked.sent.append(progress.token)
        before = [] if wanted.exclude_input or wanted.streaming else work.generation.tokens
        text = ByteTokenizer().decode([*before, *(asked.sent if wanted.streaming else work.tokens)])
        values = [Values("text_output", (1,), [text.encode()])]
        if wanted.finish_reason:
            values.append(Values("finish_reason", (1,), [_finish_reason(work, progress.final)]))
        if wanted.stop_reason:
            values.append(Values("stop_reason", (1,), [b"None"]))
        if wanted.perf_metrics:
            values += _perf_values(work, self._options.tokens_per_block)
        listed = set(asked.query.requested)
        return [value for value in values if not listed or value.name in listed]


def _check_path(path: Path) -> None:
    if not path.exists():
        raise BackendError(f"lora_path does not exist on the Triton server's filesystem: {path}")


def _prompt(tensors: dict[str, Tensor]) -> str:
    if "text_input" not in tensors:
        raise BackendError("text_input is missing from the request")
    texts = tensors["text_input"].array()
    if texts.ndim > 1:
        raise BackendError("The current implementation only supports text_input being a 1D tensor.")
    if not texts.size:
        raise BackendError("index 0 is out of bounds for axis 0 with size 0")
    try:
        return str(texts[0].decode())
    except UnicodeDecodeError as error:
        raise BackendError(str(error)) from error


def _scalar(tensors: dict[str, Tensor], name: str) -> Any:
    """Return a tensor's only element, None if it is missing. Raises BackendError for several."""
    tensor = tensors.get(name)
    if tensor is None:
        return None
    array = tensor.array()
    if array.size != 1:
        raise BackendError(f"Expected a scalar tensor for tensor {name}")
    return array.reshape(-1)[0]


def _refuse_unsupported(tensors: dict[str, Tensor]) -> None:
    """Refuse what this engine cannot do and the client could not notice; other sampling fields change nothing."""
    if _scalar(tensors, "return_cumulative_logprob"):
        raise BackendError("return_cumulative_logprob: this engine has no probabilities")
    if "image_url" in tensors:
        raise BackendError("image_url: this model takes text only")
    best_of = _scalar(tensors, "sampling_param_best_of")
    if best_of is not None and best_of > 1:
        raise BackendError(f"best_of {best_of} is not available from this engine")


def _finish_reason(work: Work, final: bool) -> bytes:
    if not final:
        return b"None"
    return b"length" if len(work.tokens) == work.generation.max_new_tokens else b"stop"


def _perf_values(work: Work, tokens_per_block: int) -> list[Values]:
    """Return blocks, times and drafts of the request so far; this engine neither reuses blocks nor drafts."""
    blocks = -(-(len(work.generation.tokens) + len(work.tokens)) // tokens_per_block)
    numbers: dict[str, float] = {
        "kv_cache_reused_block": 0,
        "kv_cache_missed_block": blocks,
        "kv_cache_alloc_new_blocks": blocks,
        "kv_cache_alloc_total_blocks": blocks,
        "kv_cache_hit_rate": 0.0,
        "acceptance_rate": 0.0,
        "total_accepted_draft_tokens": 0,
        "total_draft_tokens": 0,
    }
    return [Values(name, (1,), [number]) for name, number in (numbers | times_of(work)).items()]
