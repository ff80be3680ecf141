"""The configurations of the models that take text: `ensemble` with its two steps, and `tensorrt_llm_bls`."""

from __future__ import annotations

from dataclasses import replace

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from sidecar.lab.engine.kserve.models import Model, model_config
from tests.e2e.triton.models.names import CORE_INPUTS, QUESTIONS, STEPS

BLS = "tensorrt_llm_bls"
PREPROCESSING, POSTPROCESSING = "preprocessing", "postprocessing"
_TOKENS = {"output_ids": "TOKENS_BATCH", "sequence_length": "SEQUENCE_LENGTH"}


def step_configs(max_batch_size: int) -> dict[str, str]:
    """Return the config.pbtxt of the two steps by name."""
    preprocessing = _python(PREPROCESSING, max_batch_size)
    _inputs(preprocessing, pb.TYPE_STRING, [1], "QUERY")
    _inputs(preprocessing, pb.TYPE_INT32, [1], "REQUEST_OUTPUT_LEN")
    _inputs(preprocessing, pb.TYPE_STRING, [-1], "BAD_WORDS_DICT", "STOP_WORDS_DICT", optional=True)
    _inputs(preprocessing, pb.TYPE_INT32, [1], "END_ID", "PAD_ID", optional=True)
    preprocessing.output.add(name="INPUT_ID", data_type=pb.TYPE_INT32, dims=[-1])
    for name in ("REQUEST_INPUT_LEN", "REQUEST_OUTPUT_LEN", "OUT_END_ID", "OUT_PAD_ID"):
        preprocessing.output.add(name=name, data_type=pb.TYPE_INT32, dims=[1])
    postprocessing = _python(POSTPROCESSING, max_batch_size)
    _inputs(postprocessing, pb.TYPE_INT32, [-1, -1], "TOKENS_BATCH")
    _inputs(postprocessing, pb.TYPE_INT32, [-1], "SEQUENCE_LENGTH")
    # One text a beam, without a batch dimension of its own, as NVIDIA's.
    postprocessing.output.add(name="OUTPUT", data_type=pb.TYPE_STRING, dims=[-1])
    return {config.name: text_format.MessageToString(config) for config in (preprocessing, postprocessing)}


def bls_config(model: Model, instances: int) -> str:
    """Return the config.pbtxt of `tensorrt_llm_bls`: the tensors of the ensemble."""
    config = model_config(replace(model, name=BLS))
    config.platform, config.backend = "", "python"
    _instances(config, instances)
    return text_format.MessageToString(config)


def ensemble_config(model: Model, core: str) -> str:
    """Return the config.pbtxt of `ensemble` over an engine's model."""
    config = model_config(model)
    config.backend = ""
    # Triton finds it from the steps.
    config.ClearField("model_transaction_policy")
    before = config.ensemble_scheduling.step.add(model_name=PREPROCESSING, model_version=-1)
    before.input_map.update({theirs: ours for ours, theirs in QUESTIONS.items()})
    before.output_map.update({name: f"_{name}" for name in STEPS})
    middle = config.ensemble_scheduling.step.add(model_name=core, model_version=-1)
    given = {tensor.name for tensor in config.input}
    middle.input_map.update({theirs: f"_{name}" for name, theirs in STEPS.items()})
    middle.input_map.update({theirs: ours for ours, theirs in CORE_INPUTS.items() if ours in given})
    middle.output_map.update({name: f"_{name}" for name in _TOKENS})
    middle.output_map.update({one.name: one.name for one in config.output if one.name != "text_output"})
    after = config.ensemble_scheduling.step.add(model_name=POSTPROCESSING, model_version=-1)
    after.input_map.update({theirs: f"_{ours}" for ours, theirs in _TOKENS.items()})
    after.output_map["OUTPUT"] = "text_output"
    return text_format.MessageToString(config)


def _python(name: str, max_batch_size: int) -> pb.ModelConfig:
    config = pb.ModelConfig(name=name, backend="python", max_batch_size=max_batch_size)
    _instances(config, 1)
    return config


def _instances(config: pb.ModelConfig, count: int) -> None:
    config.ClearField("instance_group")
    config.instance_group.add(count=count, kind=pb.ModelInstanceGroup.KIND_CPU)


def _inputs(config: pb.ModelConfig, kind: int, dims: list[int], *names: str, optional: bool = False) -> None:
    for name in names:
        config.input.add(name=name, data_type=kind, dims=dims, optional=optional)
