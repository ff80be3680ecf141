"""The chart's Job makes the first keys once, reads no Secret, and stops before a running installation is enforced."""

from __future__ import annotations

import asyncio
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar.access.keys_file import KeysFile
from tests.kit.forked import python
from tests.kit.kubernetes_api import FakeServer, Fault, fake_server, write_kubeconfig
from tests.kit.kubernetes_rules import ACCOUNT, JOB
from tests.kit.serving import PATIENCE_S

SECRET, CONFIG_MAP = JOB, ACCOUNT  # as the chart calls them, and its Role names the ConfigMap
SECRETS, CONFIG_MAPS = ("", "ml", "secrets"), ("", "ml", "configmaps")
MAKE = ("--secret", SECRET, "--labels", '{"app.kubernetes.io/instance": "pool"}')
GUARD = ("--guard", CONFIG_MAP)


async def job(server: FakeServer, folder: Path, *arguments: str) -> tuple[int | None, str]:
    """Run the Job's command; return its exit status and all that it printed."""
    kubeconfig = write_kubeconfig(folder / "kubeconfig", server.address, token=JOB)
    process = await python(
        "-m",
        "sidecar.kubernetes.first_keys",
        *arguments,
        env=os.environ | {"KUBECONFIG": str(kubeconfig)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(PATIENCE_S):
        printed, errors = await process.communicate()
    return process.returncode, (printed + errors).decode()


def running(server: FakeServer, configuration: Any) -> None:
    """Have a release in the namespace whose configuration is this."""
    data = {"config.yaml": yaml.safe_dump(configuration)}
    server.objects.create(CONFIG_MAPS, {"metadata": {"name": CONFIG_MAP}, "data": data})


async def test_keys_are_made_and_the_sidecar_takes_them(tmp_path: Path) -> None:
    """One for operators, one for an application. The file has hashes only, and nothing is printed of the keys."""
    async with fake_server() as server:
        code, printed = await job(server, tmp_path, *MAKE)
        assert code == 0, printed
        assert [(asked.verb, asked.kind) for asked in server.asked] == [("create", SECRETS)]
        secret = server.objects.get(SECRETS, SECRET)
    assert secret["type"] == "Opaque"
    assert secret["metadata"]["labels"] == {"app.kubernetes.io/instance": "pool"}
    texts = secret["stringData"]
    assert texts.keys() == {"keys.yaml", "operator", "application"}
    (tmp_path / "keys.yaml").write_text(texts["keys.yaml"])
    found = {key.sha256: key for key in KeysFile(tmp_path / "keys.yaml").keys}
    operator, application = (found[sha256(texts[name].encode()).hexdigest()] for name in ("operator", "application"))
    assert (operator.tenant, operator.roles) == ("operators", ("operator",))
    assert (application.tenant, application.roles) == ("default", ())
    for name in ("operator", "application"):
        assert len(texts[name]) > 64
        assert texts[name] not in texts["keys.yaml"] + printed


async def test_every_installation_has_its_own(tmp_path: Path) -> None:
    async with fake_server() as server, fake_server() as other:
        await asyncio.gather(job(server, tmp_path, *MAKE), job(other, _folder(tmp_path), *MAKE))
        made = [each.objects.get(SECRETS, SECRET)["stringData"] for each in (server, other)]
    assert len({text for each in made for text in each.values()}) == 6


async def test_a_secret_that_is_there_stays(tmp_path: Path) -> None:
    """Also if two Jobs make it at once."""
    async with fake_server() as server:
        both = await asyncio.gather(job(server, tmp_path, *MAKE), job(server, _folder(tmp_path), *MAKE))
        before = server.objects.get(SECRETS, SECRET)
        again = await job(server, tmp_path, *MAKE)
        assert server.objects.get(SECRETS, SECRET) == before
    assert [code for code, _ in (*both, again)] == [0, 0, 0]
    assert sorted("there already" in printed for _, printed in both) == [False, True]
    assert "there already" in again[1]


@pytest.mark.parametrize("identity", [None, {"mode": "off"}, {"mode": "observe"}, {}])
async def test_a_running_installation_is_not_enforced_by_default(tmp_path: Path, identity: Any) -> None:
    """The Job fails, before anything is changed, and says which modes there are."""
    async with fake_server() as server:
        running(server, {"log_format": "json"} | ({} if identity is None else {"identity": identity}))
        code, printed = await job(server, tmp_path, *MAKE, *GUARD)
        assert server.objects.held.get(SECRETS) is None
    assert code == 1
    assert f"identity.mode {(identity or {}).get('mode', 'off')} (ConfigMap {CONFIG_MAP})" in printed
    assert all(word in printed for word in ("off", "observe", "enforce"))


@pytest.mark.parametrize("there", [False, True])
async def test_a_new_installation_and_one_that_enforces_go_on(tmp_path: Path, there: bool) -> None:
    async with fake_server() as server:
        if there:
            running(server, {"identity": {"mode": "enforce"}})
        only_guarded = await job(server, tmp_path, *GUARD)
        assert SECRETS not in server.objects.held
        both = await job(server, tmp_path, *MAKE, *GUARD)
        assert SECRET in server.objects.held[SECRETS]
    assert only_guarded[0] == both[0] == 0, only_guarded[1] + both[1]


@pytest.mark.parametrize(("verb", "plural"), [("create", "secrets"), ("get", "configmaps")])
async def test_what_the_server_refuses_is_told(tmp_path: Path, verb: str, plural: str) -> None:
    """The Job fails, so that the installation stops."""
    async with fake_server(faults=[Fault(verb, plural, status=403)]) as server:
        code, printed = await job(server, tmp_path, *MAKE, *GUARD)
    assert code == 1
    assert "403" in printed
    assert "Role" in printed
    assert "lsk_" not in printed


def _folder(parent: Path) -> Path:
    folder = parent / "other"
    folder.mkdir()
    return folder
