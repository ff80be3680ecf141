"""Where the API server is, and as whom it is asked: as a pod, or by a kubeconfig."""

from __future__ import annotations

import base64
import ssl
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar.errors import Misused
from sidecar.kubernetes.access import Access, find_access, from_kubeconfig
from sidecar.kubernetes.api import Api
from sidecar.kubernetes.failures import ApiError
from tests.kit.authority import NEEDS_OPENSSL, Authority
from tests.kit.kubernetes_api import fake_server
from tests.kit.kubernetes_cluster import Cluster


async def test_a_token_that_is_replaced_is_read_again(tmp_path: Path) -> None:
    """A service account's token is, every hour; a request with the old one would be refused."""
    account = tmp_path / "account"
    account.mkdir()
    (account / "token").write_text("first\n")
    (account / "namespace").write_text("ml")
    async with fake_server(token="first") as server:
        access = from_kubeconfig(_kubeconfig(tmp_path, server.address, {"tokenFile": str(account / "token")}))
        api = Api(access)
        await api.list(_maps())
        (account / "token").write_text("second\n")
        server.token = "second"
        await api.list(_maps())
        await api.close()
        assert [asked.token for asked in server.asked] == ["Bearer first", "Bearer second"]


@NEEDS_OPENSSL
async def test_a_kubeconfig_with_a_client_certificate(tmp_path: Path) -> None:
    """Server and client know each other by the cluster's CA, its files named or inline."""
    authority = Authority(tmp_path)
    await authority.found()
    server_key, server_certificate = await authority.sign("localhost", "IP:127.0.0.1")
    key, certificate = await authority.sign("me")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(authority.ca))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(server_certificate, server_key)
    async with fake_server() as server:
        await server.stop()
        server.tls = context
        await server.start()
        by_name = {"client-certificate": certificate.name, "client-key": key.name}
        inline = {
            f"{name}-data": base64.b64encode((tmp_path / path).read_bytes()).decode() for name, path in by_name.items()
        }
        for user in (by_name, inline):
            path = _kubeconfig(tmp_path, server.address, user, {"certificate-authority": "ca.pem"}, "https")
            api = Api(from_kubeconfig(path))
            assert not (await api.list(_maps())).items
            await api.close()
        stranger = Api(from_kubeconfig(_kubeconfig(tmp_path, server.address, {}, {}, "https")))
        with pytest.raises(ApiError, match="certificate"):
            await stranger.list(_maps())
        await stranger.close()


def test_a_pod_finds_its_cluster(tmp_path: Path) -> None:
    """By the service account that is mounted; without one the way out is named."""
    environment = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}
    with pytest.raises(Misused, match="automountServiceAccountToken"):
        find_access(environment, tmp_path)
    with pytest.raises(Misused, match="KUBECONFIG"):
        find_access({}, tmp_path)
    (tmp_path / "token").write_text("t")
    (tmp_path / "namespace").write_text("ml\n")
    (tmp_path / "ca.crt").write_bytes(Path(ssl.get_default_verify_paths().cafile or "").read_bytes())
    access = find_access(environment, tmp_path)
    assert (access.url, access.namespace, access.token()) == ("https://[fd00::1]:6443", "ml", "t")
    assert "t'" not in repr(access)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("- no", "current-context"),
        ({"current-context": "x"}, "no context called x"),
        ({"current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "k"}}]}, "no cluster called k"),
        ("{", "cannot be read"),
    ],
)
def test_a_kubeconfig_that_cannot_be_used(tmp_path: Path, record: Any, said: str) -> None:
    """It is named with what is missing."""
    path = tmp_path / "config"
    path.write_text(record if isinstance(record, str) else yaml.safe_dump(record))
    with pytest.raises(Misused, match=said):
        find_access({"KUBECONFIG": str(path)})


def test_a_kubeconfig_that_wants_another_program(tmp_path: Path) -> None:
    """No program is run for a credential."""
    with pytest.raises(Misused, match="another program"):
        from_kubeconfig(_kubeconfig(tmp_path, "h:1", {"exec": {"command": "aws"}}))


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _maps() -> Any:
    return Cluster(Access("", "ml"), None).collection("configmaps")  # type: ignore[arg-type]


def _kubeconfig(
    folder: Path, address: str, user: dict[str, Any], cluster: dict[str, Any] | None = None, scheme: str = "http"
) -> Path:
    record = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u", "namespace": "ml"}}],
        "clusters": [{"name": "k", "cluster": {"server": f"{scheme}://{address}"} | (cluster or {})}],
        "users": [{"name": "u", "user": user}],
    }
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(record))
    return path
