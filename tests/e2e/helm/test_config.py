"""The configuration that the chart renders is one that the sidecar takes, with the files that the pod has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sidecar.config import validated, written_in
from tests.e2e.helm.rendering import EXAMPLES, Object, Renderer, configuration, containers, pods
from tests.kit.cli_runs import Ended, runner

ETC = "/etc/lora-sidecar"
POD = {"$(POD_IP)": "10.0.0.7", "$(POD_NAME)": "pool-lora-sidecar-0"}
OF_SECRETS = ("tls.crt", "tls.key", "ca.crt", "token", "password", "key")
"""The keys of all Secrets that the examples and the matrix name."""
LLAMA_3_1_8B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
"""What the sidecar reads of the `config.json` in the ConfigMap of the SGLang example."""


def lay(objects: list[Object], folder: Path) -> tuple[Path, dict[str, str]]:
    """Make the files that the pod's container has, below a folder; return the configuration and our variables."""
    container = the_container(objects)
    for mount in container["volumeMounts"]:
        if mount["mountPath"].startswith(f"{ETC}/") and not mount["mountPath"].endswith("/config"):
            place = folder / mount["mountPath"].removeprefix(f"{ETC}/")
            place.mkdir()
            for key in OF_SECRETS:
                (place / key).touch()
            (place / "config.json").write_text(json.dumps(LLAMA_3_1_8B))
            (place / "keys.yaml").write_text("[]")  # as a Secret of keys begins
    file = folder / "config.yaml"
    file.write_text(configuration(objects).replace(ETC, str(folder)))
    variables = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    return file, {name: _in_pod(value) for name, value in variables.items() if name.startswith("LORA_SIDECAR_")}


def the_container(objects: list[Object]) -> Object:
    """Return the container of the sidecar, or one with nothing mounted where the engine's pod is somebody else's."""
    ours = [each for pod in pods(objects) for each in containers(pod) if each["name"] == "lora-sidecar"]
    assert len(ours) <= 1
    return ours[0] if ours else {"volumeMounts": [], "env": []}


def _in_pod(value: str) -> str:
    for variable, stands_for in POD.items():
        value = value.replace(variable, stands_for)
    return value


@pytest.fixture
def sidecar(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run a command of ours, here."""
    return runner(capfd)


@pytest.mark.parametrize("name", [path.stem for path in EXAMPLES])
def test_examples_are_accepted(
    rendered: dict[str, list[Object]],
    tmp_path: Path,
    name: str,
    sidecar: Callable[..., Ended],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`sidecar config check` takes the configuration of each example."""
    file, variables = lay(rendered[name], tmp_path)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    done = sidecar("config", "check", str(file))
    assert done.code == 0, done.err
    backends = yaml.safe_load(done.out)["backends"]
    assert len(backends) == len(yaml.safe_load(configuration(rendered[name]))["backends"])


def test_matrix_is_accepted(rendered: dict[str, list[Object]], tmp_path: Path) -> None:
    """So is every case of the matrix."""
    read = 0
    for name, objects in rendered.items():
        if _is_another_charts(objects):
            continue
        (tmp_path / name).mkdir()
        file, variables = lay(objects, tmp_path / name)
        config = validated(written_in(file, {key: value for key, value in variables.items() if "__" in key}))
        read += 1
        clustered = config.replicas.address is not None
        assert clustered == ("LORA_SIDECAR_REPLICAS__ADVERTISE" in variables), name
        if clustered:
            host, _, port = str(config.replicas.advertise).rpartition(":")
            assert port == "9003", name
            assert host in ("10.0.0.7", "[10.0.0.7]", "pool-lora-sidecar-0.pool-lora-sidecar-replicas.lora.svc"), name
    assert read > 30


def _is_another_charts(objects: list[Object]) -> bool:
    return not the_container(objects)["volumeMounts"]


def test_a_plan_is_a_values_file(newest: Renderer, tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """What `sidecar plan --emit helm` prints can be given to Helm as it is, and is then what is served."""
    plan = sidecar("plan", "--throughput", "500", "--adapters", "8", "--requests", "256", "--emit", "helm")
    assert plan.code == 0, plan.err
    values = tmp_path / "plan.yaml"
    values.write_text(plan.out)
    (tmp_path / "pod").mkdir()
    file, _ = lay(newest.objects(values), tmp_path / "pod")
    served = validated(written_in(file, {}))
    assert served.store.memory_bytes == yaml.safe_load(plan.out)["store"]["memory_bytes"]
    assert len(served.backends) == len(yaml.safe_load(plan.out)["backends"])


def test_large_numbers(rendered: dict[str, list[Object]]) -> None:
    """Bytes are written out: neither Helm makes 1.7e+10 of them."""
    assert "memory_bytes: 17179869184\n" in configuration(rendered["four-tritons"])
