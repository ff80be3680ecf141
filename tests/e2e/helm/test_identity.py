"""Who clients are: a new installation enforces, an upgrade has to choose, and a Job makes keys that nobody renders."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from tests.e2e.helm.api import api_server
from tests.e2e.helm.pods import Pod
from tests.e2e.helm.rendering import NAMESPACE, RELEASE, Object, Refused, Renderer, configuration, hooks, one
from tests.e2e.helm.test_config import the_container
from tests.kit.emulated import EngineProcess
from tests.kit.kubernetes_api import FakeServer, fake_server, write_kubeconfig
from tests.kit.serving import PATIENCE_S

NAME = f"{RELEASE}-lora-sidecar"
KEYS = f"{NAME}-keys"
HTTP = 2
"""The last digit of the http listener's port."""
FOLDER = "/etc/lora-sidecar/identity-keys"
UPGRADE = ("--is-upgrade",)
ENFORCE: dict[str, Any] = {"identity": {"mode": "enforce"}}
ISTIO: dict[str, Any] = {
    "certificates": {
        "tenant_pattern": "spiffe://cluster.local/ns/{tenant}/sa/*",
        "forwarded": {"strict_mutual_tls": True},
    }
}


def identity(objects: list[Object]) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(configuration(objects))["identity"]
    return found


def job(objects: list[Object]) -> list[str]:
    """Return the command of the Job that runs before the pods; none without one."""
    found = [each for each in objects if each["kind"] == "Job"]
    if not found:
        return []
    [container] = found[0]["spec"]["template"]["spec"]["containers"]
    return [*container["command"], *container["args"]]


def mounted_keys(objects: list[Object]) -> Object | None:
    """Return the Secret volume that the sidecar's keys come from."""
    mounts = [mount["name"] for mount in the_container(objects)["volumeMounts"] if mount["mountPath"] == FOLDER]
    pod = one(objects, "Deployment", "lora-sidecar")["spec"]["template"]["spec"]
    found: list[Object] = [volume["secret"] for volume in pod["volumes"] if volume["name"] in mounts]
    return found[0] if found else None


def test_a_new_installation_enforces(helm: Renderer) -> None:
    """With keys that a Job makes, unless a Secret of them is named. The pods see the file of hashes only."""
    made, named = helm.objects({}), helm.objects({"identity": {"existingSecret": "ours"}})
    for objects, secret in ((made, KEYS), (named, "ours")):
        assert identity(objects) == {"mode": "enforce", "keys_file": f"{FOLDER}/keys.yaml"}
        volume = mounted_keys(objects)
        assert volume is not None
        assert volume["secretName"] == secret
        assert volume["items"] == [{"key": "keys.yaml", "path": "keys.yaml"}]
    assert f"--secret={KEYS}" in job(made)
    assert not [argument for argument in job(named) if argument.startswith("--secret")]


@pytest.mark.parametrize("values", [{}, {"identity": {"existingSecret": "ours"}}, {"identity": None}])
def test_an_upgrade_has_to_choose(helm: Renderer, values: dict[str, Any]) -> None:
    """Also if the values are those of a release that knew no identity (--reuse-values)."""
    with pytest.raises(Refused) as refused:
        helm.objects(values, options=UPGRADE)
    said = str(refused.value)
    assert "identity.mode is not set" in said
    assert said.index("observe") < said.index("enforce") < said.index("off believes")


@pytest.mark.parametrize(("mode", "known"), [("off", "off"), (False, "off"), ("observe",) * 2, ("enforce",) * 2])
def test_an_upgrade_that_chooses(helm: Renderer, mode: str | bool, known: str) -> None:
    """Every mode can be chosen, off as a word and as YAML reads it. Keys are made where they are asked for."""
    objects = helm.objects({"identity": {"mode": mode}}, options=UPGRADE)
    assert identity(objects)["mode"] == known
    assert ("keys_file" in identity(objects), bool(job(objects))) == (known != "off", known != "off")


def test_rendering_is_not_where_keys_come_from(helm: Renderer) -> None:
    """Two renderings are one text, with and without a cluster that has a Secret, and no Secret is in it."""
    text = helm.text()
    assert text == helm.text()
    assert not [found for found in yaml.safe_load_all(text) if found and found["kind"] == "Secret"]


def test_a_secret_in_the_cluster_changes_nothing(helm: Renderer, tmp_path: Path) -> None:
    path = f"/api/v1/namespaces/{NAMESPACE}/secrets/{KEYS}"
    there = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": KEYS, "namespace": NAMESPACE}, "data": {}}
    live = ("--dry-run=server", "--disable-openapi-validation")
    texts = []
    for number, objects in enumerate(({}, {path: there})):
        folder = tmp_path / str(number)
        folder.mkdir()
        with api_server(folder, objects) as kubeconfig:
            texts.append(helm.text(options=live, KUBECONFIG=kubeconfig))
    assert texts[0] == texts[1]


def test_the_job_comes_first_and_leaves_nothing(rendered: dict[str, list[Object]]) -> None:
    """Its account and rights are made before it, and all of it is deleted once it has succeeded."""
    seen = 0
    for name, objects in rendered.items():
        parts = [found for found in objects if found["metadata"]["name"].endswith("-keys")]
        if not parts:
            continue
        seen += 1
        assert [found["kind"] for found in parts].count("Job") == 1, name
        kinds = {found["kind"] for found in parts}
        assert kinds - {"NetworkPolicy"} == {"ServiceAccount", "Role", "RoleBinding", "Job"}, name
        weights = {}
        for found in parts:
            assert set(hooks(found)) == {"pre-install", "pre-upgrade"}, name
            notes = found["metadata"]["annotations"]
            assert notes["helm.sh/hook-delete-policy"] == "before-hook-creation,hook-succeeded", name
            weights[found["kind"]] = int(notes["helm.sh/hook-weight"])
        assert max(weights, key=lambda kind: weights[kind]) == "Job", name
        assert weights["Job"] > weights["RoleBinding"] > max(weights["Role"], weights["ServiceAccount"]), name
        template = one(objects, "Job")["spec"]["template"]
        assert template["spec"]["serviceAccountName"] == one(objects, "ServiceAccount", "-keys")["metadata"]["name"]
        labels = template["metadata"]["labels"].items()
        if "NetworkPolicy" in kinds:
            policy = one(parts, "NetworkPolicy")["spec"]
            assert policy["podSelector"]["matchLabels"].items() <= labels, name
            assert (policy["policyTypes"], policy.get("ingress", [])) == (["Ingress"], []), name
        for found in (each for each in objects if each not in parts):
            selector = {"Service": "selector", "NetworkPolicy": "podSelector"}.get(found["kind"])
            chosen = found["spec"][selector] if selector else {"nobody": ""}
            assert not chosen.get("matchLabels", chosen).items() <= labels, name
    assert seen > 10


def test_the_jobs_rights(newest: Renderer) -> None:
    """It creates Secrets and reads none; it reads one ConfigMap, and only where the mode was not chosen."""
    create = {"apiGroups": [""], "resources": ["secrets"], "verbs": ["create"]}
    look = {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": [NAME], "verbs": ["get"]}
    for values, rules in (
        ({}, [create, look]),
        (ENFORCE, [create]),
        ({"identity": {"existingSecret": "ours"}}, [look]),
    ):
        assert one(newest.objects(values), "Role")["rules"] == rules
    assert job(newest.objects({"identity": {"mode": "enforce", "existingSecret": "ours"}})) == []


async def ended(*command: str, **variables: str) -> tuple[int | None, str]:
    """Run a Python command of a pod; return its exit status and what it printed."""
    python, *arguments = command
    assert python == "python"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        env=os.environ | variables,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(PATIENCE_S):
        printed, _ = await process.communicate()
    return process.returncode, printed.decode()


async def run_job(objects: list[Object], server: FakeServer, folder: Path) -> tuple[int | None, str]:
    """Run the Job's command as its pod would."""
    return await ended(
        *job(objects), KUBECONFIG=str(write_kubeconfig(folder / "kubeconfig", server.address, NAMESPACE))
    )


async def test_from_the_job_to_the_answer(newest: Renderer, tmp_path: Path) -> None:
    """The pod takes the keys that the Job has made, refuses who has none, and lets operators in the pod in.

    `helm test` sees all of it, and a key that is not good.
    """
    async with EngineProcess("--compute", "none") as engine:
        objects = newest.objects({"backends": [{"url": f"triton://{engine.grpc_address}"}]})
        async with fake_server() as server:
            code, printed = await run_job(objects, server, tmp_path)
            assert code == 0, printed
            volume = mounted_keys(objects)
            assert volume is not None
            secret = server.objects.get(("", NAMESPACE, "secrets"), volume["secretName"])
        assert secret["metadata"]["labels"]["app.kubernetes.io/instance"] == RELEASE
        [item] = volume["items"]
        (tmp_path / item["path"]).write_text(secret["stringData"][item["key"]])
        random = Random()
        address, ports = f"127.{random.randint(2, 250)}.{random.randint(2, 250)}.1", str(random.randint(2000, 2999))
        text = configuration(objects).replace(FOLDER, str(tmp_path))
        pod = Pod(one(objects, "Deployment")["spec"]["template"], text, address, ports, tmp_path / "pod")
        try:
            await pod.start()
            admin = yaml.safe_load((tmp_path / "pod" / "config.yaml").read_text())["listeners"]["admin"]["address"]
            listed = await ended("python", "-m", "sidecar", "adapters", "list", LORA_SIDECAR_ADMIN=admin)
            tested = {}
            for name in ("application", "operator", "nobody's"):
                (tmp_path / "application").write_text(secret["stringData"].get(name, f"lsk_{'0' * 12}_{'0' * 64}"))
                tested[name] = await ended(*helm_test(objects, pod.at(HTTP), tmp_path))
            (tmp_path / "application").unlink()
            tested["none"] = await ended(*helm_test(objects, pod.at(HTTP), tmp_path))
        finally:
            await pod.kill()
    assert listed[0] == 0, listed[1]
    assert {name: code for name, (code, _) in tested.items()} == {
        "application": 0, "operator": 0, "nobody's": 1, "none": 0
    }, tested  # fmt: skip
    assert "with the key: 401" in tested["nobody's"][1]


def helm_test(objects: list[Object], address: str, keys: Path) -> list[str]:
    """Return the command of the pod of `helm test`, which asks an address and has its key in a folder."""
    pod = one(objects, "Pod")["spec"]
    [container] = pod["containers"]
    assert container["volumeMounts"] == [{"name": "key", "mountPath": "/etc/key", "readOnly": True}]
    assert pod["volumes"][0]["secret"] == {
        "secretName": KEYS,
        "defaultMode": 0o440,
        "optional": True,
        "items": [{"key": "application", "path": "application"}],
    }
    *python, script = container["command"]
    return [*python, script.replace(f"{NAME}.{NAMESPACE}.svc:9002", address).replace("/etc/key", str(keys))]


async def test_what_only_renders_does_not_enforce_by_surprise(newest: Renderer, tmp_path: Path) -> None:
    """Argo CD renders an upgrade as an installation: the Job sees the ConfigMap of the release before, and fails."""
    before = newest.objects({"identity": {"mode": "observe"}})
    async with fake_server() as server:
        server.objects.create(("", NAMESPACE, "configmaps"), one(before, "ConfigMap"))
        default = await run_job(newest.objects({}), server, tmp_path)
        assert ("", NAMESPACE, "secrets") not in server.objects.held
        chosen = await run_job(newest.objects(ENFORCE), server, tmp_path)
    assert (default[0], chosen[0]) == (1, 0)
    assert "set identity.mode to observe" in default[1]


def test_other_credentials_need_no_keys(newest: Renderer) -> None:
    """Where no keys are taken there is no Secret and no Job for one."""
    issuer = {"issuer": "https://id.example.org", "audience": "lora", "jwks": "https://id.example.org/keys"}
    objects = newest.objects(ENFORCE, {"config": {"identity": {"keys": False, "issuers": [issuer]}}})
    assert identity(objects) == {"mode": "enforce", "keys": False, "issuers": [issuer]}
    assert mounted_keys(objects) is None
    assert job(objects) == []


def test_operators_in_the_pod(newest: Renderer) -> None:
    """`kubectl exec … sidecar adapters list` needs no credential: the admin listener is the pod's own."""
    objects = newest.objects({})
    assert yaml.safe_load(configuration(objects))["listeners"]["admin"] == {"address": "127.0.0.1:9001"}
    assert identity(objects).get("local_admin", True)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"redis": {"url": "redis://r:6379/0"}},
        "name a Secret with tls.crt, tls.key and ca.crt in tls.replicas.secretName",
    ),
    ({"config": {"identity": ISTIO}}, "set config.identity.local_admin: false"),
    ({"identity": {"mode": "off", "existingSecret": "a"}}, "set identity.mode to observe or enforce"),
    (
        {"identity": {"existingSecret": "a"}, "config": {"identity": {"keys": False}}},
        "take config.identity.keys: false out",
    ),
    ({"rbac": {"create": False}}, "name a Secret with keys.yaml in identity.existingSecret"),
    (
        {"rbac": {"create": False}, "identity": {"existingSecret": "a"}},
        "no Job may look whether this installation runs already: set identity.mode",
    ),
]


@pytest.mark.parametrize(("values", "said"), REFUSED, ids=lambda part: part if isinstance(part, str) else "")
def test_contradictions(helm: Renderer, values: dict[str, Any], said: str) -> None:
    """Values that do not go together are refused with the way out."""
    with pytest.raises(Refused) as refused:
        helm.objects(values)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "values",
    [
        {"redis": {"url": "redis://r:6379/0"}, "tls": {"replicas": {"secretName": "a"}}},
        {"redis": {"url": "redis://r:6379/0"}, "identity": {"mode": "observe"}},
        {"config": {"identity": {**ISTIO, "local_admin": False}}},
        {"rbac": {"create": False}, "identity": {"mode": "enforce", "existingSecret": "a"}},
        {"rbac": {"create": False}, "identity": {"mode": "off"}},
    ],
)
def test_the_ways_out(helm: Renderer, values: dict[str, Any]) -> None:
    """What those messages say to do is accepted."""
    assert identity(helm.objects(values))["mode"]
