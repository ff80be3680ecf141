"""The bundled Redis has a password, which upgrades keep."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, RedisError

from sidecar.config.redis_address import parse_address
from sidecar.state.redis.link import PasswordFile
from tests.e2e.helm.api import api_server
from tests.e2e.helm.rendering import NAMESPACE, RELEASE, Object, Renderer, configuration, containers, one
from tests.kit.ports import free_port
from tests.kit.redis_servers import PATIENCE_S, program

BUNDLED: dict[str, Any] = {
    "replicaCount": 2, "redis": {"bundled": {"enabled": True}}, "identity": {"mode": "observe"}
}  # fmt: skip
NAME = f"{RELEASE}-lora-sidecar-redis"
PATH = f"/api/v1/namespaces/{NAMESPACE}/secrets/{NAME}"
PASSWORD = 'it\'s "quoted" #1 \\ ünd $HOME'


def bundled(**redis: Any) -> dict[str, Any]:
    return {**BUNDLED, "redis": {"bundled": {"enabled": True, **redis.pop("bundled", {})}, **redis}}


def password_of(objects: list[Object]) -> str:
    return base64.b64decode(one(objects, "Secret", "-redis")["data"]["password"]).decode()


def secrets_of(objects: list[Object], kind: str, name: str) -> dict[str, str]:
    """Return the Secrets that the containers of a workload see, by folder."""
    pod = next(each for each in objects if each["kind"] == kind and each["metadata"]["name"].endswith(name))
    spec = pod["spec"]["template"]
    mounted = {mount["name"]: mount["mountPath"] for each in containers(spec) for mount in each["volumeMounts"]}
    volumes = {each["name"]: each["secret"]["secretName"] for each in spec["spec"]["volumes"] if "secret" in each}
    return {mounted[volume]: secret for volume, secret in volumes.items()}


def test_redis_and_replicas_have_the_same(newest: Renderer) -> None:
    """A long one that is nobody else's, in a Secret that both mount; or in that which the values name."""
    objects = newest.objects(BUNDLED)
    password = password_of(objects)
    assert len(password) == 32
    assert password != password_of(newest.objects(BUNDLED))
    for values, secret, key in (
        (BUNDLED, NAME, "password"),
        (bundled(passwordSecret={"name": "ours", "key": "pass"}), "ours", "pass"),
    ):
        objects = newest.objects(values)
        assert secrets_of(objects, "Deployment", "-redis") == {"/etc/redis-password": secret}
        assert secrets_of(objects, "Deployment", "lora-sidecar") == {
            "/etc/lora-sidecar/redis-password": secret,
            "/etc/lora-sidecar/identity-keys": f"{RELEASE}-lora-sidecar-keys",
        }
        state = yaml.safe_load(configuration(objects))["state"]
        assert state["password_file"] == f"/etc/lora-sidecar/redis-password/{key}"
        assert (
            f"/etc/redis-password/{key})"
            in one(objects, "Deployment", "-redis")["spec"]["template"]["spec"]["containers"][0]["args"][0]
        )
    assert not [found for found in objects if found["kind"] == "Secret"]


def test_an_upgrade_keeps_it(helm: Renderer, tmp_path: Path) -> None:
    """What is in the cluster stays."""
    there = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": NAME, "namespace": NAMESPACE}}
    data = {"password": base64.b64encode(b"made-before").decode()}
    live = ("--is-upgrade", "--dry-run=server", "--disable-openapi-validation")
    with api_server(tmp_path, {PATH: {**there, "data": data}}) as kubeconfig:
        objects = helm.objects(BUNDLED, options=live, KUBECONFIG=kubeconfig)
    assert password_of(objects) == "made-before"


@asynccontextmanager
async def running(objects: list[Object], folder: Path) -> AsyncIterator[int]:
    """Run the container's own command, with other paths and another port; give the port."""
    [container] = one(objects, "Deployment", "-redis")["spec"]["template"]["spec"]["containers"]
    script = container["args"][0].replace("/tmp", str(folder)).replace("/etc/redis-password", str(folder))
    port = free_port()
    script = script.replace("exec redis-server", f"exec {program('redis-server')}").rstrip() + f" --port {port}\n"
    process = await asyncio.create_subprocess_exec(
        *container["command"], script, cwd=folder, stdout=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                assert process.returncode is None, "it ended by itself"
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.01)
                else:
                    writer.close()
                    break
        yield port
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def answers(port: int, **credentials: Any) -> bool:
    async with Redis(host="127.0.0.1", port=port, **credentials) as client:
        try:
            await client.set("key", "value")
        except (AuthenticationError, RedisError):
            return False
        return bool(await client.get("key") == b"value")


async def test_who_is_let_in(newest: Renderer, tmp_path: Path) -> None:
    """Who has the password, and nobody else."""
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    objects = newest.objects(bundled())
    user = parse_address(yaml.safe_load(configuration(objects))["state"]["url"]).user
    ours = PasswordFile(user, tmp_path / "password")
    async with running(objects, tmp_path) as port:
        assert await answers(port, credential_provider=ours)
        assert not await answers(port)
        assert not await answers(port, username="default", password="wrong")
    assert (tmp_path / "redis.conf").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("content", [None, "\n"])
async def test_without_a_password_it_does_not_start(newest: Renderer, tmp_path: Path, content: str | None) -> None:
    """Rather than with one that all know."""
    if content is not None:
        (tmp_path / "password").write_text(content)
    with pytest.raises(AssertionError, match="it ended by itself"):
        async with running(newest.objects(BUNDLED), tmp_path):
            pass
