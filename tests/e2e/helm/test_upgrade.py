"""An upgrade from any values to any others changes nothing that Kubernetes does not let anybody change."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.helm.api import api_server
from tests.e2e.helm.rendering import NAMESPACE, RELEASE, Object, Refused, Renderer, hooks, kind_and_name, one

STATEFUL_SET_MAY_CHANGE = {
    "replicas", "template", "updateStrategy", "persistentVolumeClaimRetentionPolicy", "minReadySeconds",
    "revisionHistoryLimit", "ordinals",
}  # fmt: skip
"""Of its spec; all else is forbidden (the API server's ValidateStatefulSetUpdate)."""
NAME = f"{RELEASE}-lora-sidecar"
PATH = f"/apis/apps/v1/namespaces/{NAMESPACE}/statefulsets/{NAME}"


def fixed(found: Object) -> Any:
    """Return the part of an object that can never be changed."""
    spec = found.get("spec", {})
    match found["kind"]:
        case "Deployment":
            return spec["selector"]
        case "StatefulSet":
            return {key: value for key, value in spec.items() if key not in STATEFUL_SET_MAY_CHANGE}
        case "Service":
            return spec.get("clusterIP") == "None"
        case "PersistentVolumeClaim":
            return {key: value for key, value in spec.items() if key != "resources"}
        case "PriorityClass":
            return found["value"], found.get("preemptionPolicy")
        case "RoleBinding" | "ClusterRoleBinding":
            return found["roleRef"]
        case "Secret" | "ConfigMap":
            return found.get("immutable", False)
        case "Job":
            return spec
    return None


def forbidden(before: list[Object], after: list[Object]) -> list[tuple[str, str, str]]:
    """Return the objects that stay and whose fixed part is not what it was; hooks are deleted and made anew."""
    old, new = (
        {kind_and_name(found): fixed(found) for found in objects if not hooks(found)} for objects in (before, after)
    )
    return [key for key in old.keys() & new.keys() if old[key] != new[key]]


def test_no_forbidden_change(rendered: dict[str, list[Object]]) -> None:
    """Between any two of the matrix and the examples no fixed field changes, but a claim's, which the chart refuses."""
    broken = defaultdict(list)
    for one_name, other in combinations(rendered, 2):
        for key in forbidden(rendered[one_name], rendered[other]):
            sizes = [_claim(rendered[name]) for name in (one_name, other)]
            if key[0] != "StatefulSet" or sizes[0] == sizes[1]:
                broken[key].append((one_name, other))
    assert not broken


def _claim(objects: list[Object]) -> Any:
    sets = [found for found in objects if found["kind"] == "StatefulSet"]
    return [found["spec"].get("volumeClaimTemplates") for found in sets]


def test_the_check_sees_changes(newest: Renderer) -> None:
    """What is forbidden is seen: another size of a disk is one, a switch to a disk is none."""
    small = newest.objects({"persistence": {"enabled": True, "size": "1Gi"}})
    large = newest.objects({"persistence": {"enabled": True, "size": "2Gi"}})
    none = newest.objects({})
    assert forbidden(small, large) == [("StatefulSet", NAMESPACE, NAME)]
    assert forbidden(small, none) == forbidden(none, small) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"size": "2Gi"}, "persistence.size is 2Gi and the StatefulSet pool-lora-sidecar was made with 1Gi"),
        ({"storageClass": "fast"}, 'persistence.storageClass is "fast"'),
        ({"accessModes": ["ReadWriteMany"]}, "persistence.accessModes are ReadWriteMany"),
    ],
)
def test_a_disk_that_is_there(helm: Renderer, tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    """Before an upgrade would be refused half-way, the chart says which value cannot change and what to do."""
    disk = {"enabled": True, "size": "1Gi"}
    mode = {"identity": {"mode": "observe"}}
    there = one(helm.objects({"persistence": disk}), "StatefulSet")
    live = ("--is-upgrade", "--dry-run=server", "--disable-openapi-validation")
    with api_server(tmp_path, {PATH: there}) as kubeconfig:
        same = helm.objects({"persistence": {**disk, "size": "1024Mi"}}, mode, options=live, KUBECONFIG=kubeconfig)
        with pytest.raises(Refused, match="--cascade=orphan") as refused:
            helm.objects({"persistence": disk | changed}, mode, options=live, KUBECONFIG=kubeconfig)
    assert one(same, "StatefulSet")["metadata"]["name"] == NAME
    assert said in str(refused.value)


def test_a_disk_never_has_two_masters(rendered: dict[str, list[Object]]) -> None:
    """A disk is a StatefulSet's, whose pods have one each, or its Deployment would have to be Recreate."""
    seen = 0
    for name, objects in rendered.items():
        for found in objects:
            volumes = found["spec"]["template"]["spec"]["volumes"] if found["kind"] == "Deployment" else []
            claims = [volume for volume in volumes if "persistentVolumeClaim" in volume]
            written = [claim for claim in claims if not claim["persistentVolumeClaim"].get("readOnly")]
            assert not written or found["spec"]["strategy"]["type"] == "Recreate" or _is_shared(written), name
            seen += "volumeClaimTemplates" in found.get("spec", {})
        if "data_directory" in str(objects):
            assert one(objects, "StatefulSet")["spec"]["volumeClaimTemplates"][0]["metadata"]["name"] == "data", name
    assert seen > 2


def _is_shared(volumes: list[Object]) -> bool:
    """Whether they are what an example has that engines and gateways share, with locks of its own."""
    return {volume["name"] for volume in volumes} == {"adapters"}
