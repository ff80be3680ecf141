"""The sidecar beside an engine, in this chart's pod and in another chart's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.helm.installed import CHART
from tests.e2e.helm.rendering import Object, Refused, Renderer, configuration, one

GIB = 1 << 30
README = CHART / "README.md"


@pytest.fixture(scope="module")
def other_chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chart of somebody else's, whose engine is as the README shows it."""
    folder = tmp_path_factory.mktemp("other") / "engines"
    (folder / "templates").mkdir(parents=True)
    shutil.copytree(CHART, folder / "charts" / "lora-sidecar")
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]
    dependency = {"name": "lora-sidecar", "version": version}
    chart = {"apiVersion": "v2", "name": "engines", "version": "1.0.0", "dependencies": [dependency]}
    (folder / "Chart.yaml").write_text(yaml.safe_dump(chart))
    values, template = _blocks(README.read_text().partition("## A sidecar in the pod of your own chart")[2])
    (folder / "values.yaml").write_text(values)
    head = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: engines}\n"
    (folder / "templates" / "triton.yaml").write_text(head + template)
    return folder


def _blocks(text: str) -> list[str]:
    return [part.split("```")[0].removeprefix("yaml\n") for part in text.split("```yaml")[1:3]]


def test_start_and_stop_order(rendered: dict[str, list[Object]]) -> None:
    """The sidecar is up before the engine starts, and the engine goes only when the sidecar is empty."""
    pod = one(rendered["sidecar-triton"], "Deployment")["spec"]["template"]["spec"]
    (sidecar,) = pod["initContainers"]
    assert sidecar["restartPolicy"] == "Always"
    assert (
        sidecar["startupProbe"]["httpGet"]["path"] == "/livez"
    )  # not whether it can serve: the engine is not there yet
    assert "lifecycle" not in sidecar
    (engine,) = pod["containers"]
    stop = engine["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert "http://127.0.0.1:9004/drain" in stop
    assert pod["terminationGracePeriodSeconds"] >= 10 + 300 + 60


def test_shared_memory(newest: Renderer) -> None:
    """Both have one /dev/shm with room for the store and the engine, and the sidecar's memory has the store in it."""
    values = {"mode": "sidecar", "store": {"memory_bytes": 8 * GIB}, "sidecar": {"engineSharedMemory": "3Gi"}}
    values["sidecar"] |= {"engine": {"enabled": True, "image": "triton"}}
    objects = newest.objects(values)
    pod = one(objects, "Deployment")["spec"]["template"]["spec"]
    (volume,) = (volume for volume in pod["volumes"] if volume["name"] == "lora-sidecar-shm")
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": str(11 * GIB)}
    for container in (*pod["initContainers"], *pod["containers"]):
        assert {"name": "lora-sidecar-shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert pod["initContainers"][0]["resources"]["limits"]["memory"] == str(10 * GIB)
    backend = yaml.safe_load(configuration(objects))["backends"][0]
    assert backend["weights_transport"] == "shared_memory"
    assert backend["url"] == "triton://127.0.0.1:8001"


def test_vllm_reads_what_the_sidecar_writes(rendered: dict[str, list[Object]]) -> None:
    """Both mount the folder of adapters, and vLLM may be told of them while it runs."""
    pod = one(rendered["sidecar-vllm"], "Deployment")["spec"]["template"]["spec"]
    mount = {"name": "lora-sidecar-adapters", "mountPath": "/adapters"}
    assert all(mount in container["volumeMounts"] for container in (*pod["initContainers"], *pod["containers"]))
    assert {"name": "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "value": "1"} in pod["containers"][0]["env"]


def test_sglang_is_sent_what_it_serves(helm: Renderer) -> None:
    """No folder is shared, and it is reached at its own port."""
    engine = {"enabled": True, "image": "lmsysorg/sglang:v0.5.23"}
    values = {"mode": "sidecar", "sidecar": {"kind": "sglang", "engine": engine}}
    with pytest.raises(Refused, match="sglang needs backends: one entry"):
        helm.objects(values)
    backend = {"url": "sglang://127.0.0.1:30000", "base_model": {"name": "llama", "config": "/models/llama"}}
    objects = helm.objects(values | {"backends": [backend]})
    pod = one(objects, "Deployment")["spec"]["template"]["spec"]
    assert "lora-sidecar-adapters" not in {volume["name"] for volume in pod["volumes"]}
    assert pod["containers"][0]["readinessProbe"]["httpGet"] == {"path": "/health", "port": 30000}
    assert yaml.safe_load(configuration(objects))["backends"] == [backend]


def test_another_charts_pod(helm: Renderer, other_chart: Path) -> None:
    """The README's example is a whole pod: the same container, volumes, labels and end as in ours."""
    objects = helm.objects(chart=other_chart)
    workload = one(objects, "Deployment")["spec"]["template"]
    pod: dict[str, Any] = workload["spec"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    mounted = {mount["name"] for each in (*pod["initContainers"], *pod["containers"]) for mount in each["volumeMounts"]}
    assert mounted <= volumes
    service = one(objects, "Service", "lora-sidecar")
    assert service["spec"]["selector"].items() <= workload["metadata"]["labels"].items()
    config = next(volume for volume in pod["volumes"] if volume["name"] == "lora-sidecar-config")
    assert config["configMap"]["name"] == one(objects, "ConfigMap")["metadata"]["name"]
    assert pod["initContainers"][0]["restartPolicy"] == "Always"
    assert "drain" in str(pod["containers"][0]["lifecycle"])
    assert yaml.safe_load(configuration(objects))["store"]["memory_bytes"] == 16 * GIB
    assert "checksum/lora-sidecar-config" in workload["metadata"]["annotations"]


def test_gateway_values_are_refused_there(helm: Renderer, other_chart: Path) -> None:
    """Whoever includes the templates and leaves the mode at gateway is told."""
    values = {"mode": "gateway", "backends": [{"url": "triton://triton:8001"}]}
    with pytest.raises(Refused, match="set mode: sidecar in the chart's values"):
        helm.objects({"lora-sidecar": values}, chart=other_chart)


def test_own_engines_are_scaled(newest: Renderer) -> None:
    """KEDA scales the chart's own engines unless others are named, and an upgrade does not set their number back."""
    values = {
        "mode": "sidecar",
        "engineScaling": {"enabled": True},
        "sidecar": {"engine": {"enabled": True, "image": "e"}},
    }
    objects = newest.objects(values)
    engines = one(objects, "Deployment")
    assert one(objects, "ScaledObject")["spec"]["scaleTargetRef"]["name"] == engines["metadata"]["name"]
    assert "replicas" not in engines["spec"]
    values["engineScaling"] = {"enabled": True, "target": {"name": "others"}}
    assert one(newest.objects(values), "Deployment")["spec"]["replicas"] == 1
