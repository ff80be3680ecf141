"""`sidecar access check` against a running sidecar."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_cli_keys import DUMMY, sidecar
from tests.kit.emulated import running_engine
from tests.kit.serving import Serving, serving, write_adapters

BY_ROLE = {"ready": "roles", "roles": {"eve": ["viewer"]}}


def one_key(folder: Path, group: str = "") -> dict[str, Any]:
    """Write a key of acme to the file `key`; return the identity of a configuration that takes it."""
    key = "lsk_000000000001_" + "a" * 64
    (folder / "keys.yaml").write_text(f"- {{tenant: acme, key: {key}, groups: [{group}]}}")
    (folder / "key").write_text(key)
    return {"mode": "enforce", "keys_file": str(folder / "keys.yaml")}


@asynccontextmanager
async def with_cedar(folder: Path, policies: str, group: str) -> AsyncIterator[Serving]:
    """Run a sidecar with these policies, which takes the key of `one_key`, in front of one engine."""
    write_adapters(folder / "adapters", 1)
    (folder / "policies.cedar").write_text(policies)
    async with (
        running_engine(**DUMMY) as engine,
        serving(
            [engine],
            folder / "adapters",
            identity=one_key(folder, group),
            access={"policies": {"cedar": str(folder / "policies.cedar")}},
        ) as served,
    ):
        yield served


async def test_a_running_sidecar_tells_who_may_do_what(tmp_path: Path) -> None:
    write_adapters(tmp_path / "adapters", 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path / "adapters", identity={"mode": "enforce"}, access={"policies": BY_ROLE}) as served,
    ):

        async def ask(*arguments: str) -> tuple[int, str]:
            code, out, error = await sidecar(served, "access", "check", *arguments)
            return code, (out or error).strip()

        assert await ask("--as", "zoe", "--may", "infer", "a00") == (0, "allowed")
        assert await ask("--as", "zoe", "--may", "list", "a00") == (1, "denied")
        why = "allowed by roles: a viewer may see and select what the allow list admits"
        assert await ask("--as", "eve", "--may", "list", "a00", "--explain") == (0, why)
        assert await ask("--as", "zoe", "--role", "viewer", "--may", "list", "a00") == (0, "allowed")
        assert (await ask("--may", "drain", "gpu-0", "--explain"))[1].endswith("an operator may do everything")
        code, out = await ask("--as", "zoe", "a00@v7")
        assert (code, "has no version 'v7'; it has v1" in out) == (1, True)
        assert await ask("--as", "zoe", "a00", "--explain") == (
            0, "allowed by roles: everybody may infer with what the allow list admits; judged: a00@v1",
        )  # fmt: skip
        assert await ask("--as", "zoe", "a01") == (0, "allowed (no such name here)")
        assert await ask("--may", "drain", "gpu-9") == (0, "allowed (no such name here)")
        assert await ask("--as", "zoe", "base") == (0, "allowed")
        assert (await sidecar(served, "adapters", "pause", "a00", "--for", "1h"))[0] == 0
        assert await ask("--as", "zoe", "a00") == (0, "allowed (paused)")
        code, out = await ask("--as", "zoe", "--json", "base")
        assert json.loads(out) == {
            "allowed": True,
            "by": "roles: everybody may use the base model",
            "source": "roles",
            "fault": "",
            "version": "",
            "name_state": "",
        }


async def test_a_policy_file_that_has_become_faulty_is_told(tmp_path: Path) -> None:
    write_adapters(tmp_path / "adapters", 1)
    policies = tmp_path / "policies.cedar"
    operators = 'permit(principal in Role::"operator", action, resource);'
    may = 'principal == Tenant::"zoe", action in Action::"use", resource'
    policies.write_text(f'@id("zoe") permit({may}); {operators}')
    configured = {"policies": {"cedar": str(policies)}}
    key = "lsk_000000000001_" + "a" * 64
    (tmp_path / "keys.yaml").write_text(f"- {{tenant: zoe, key: {key}}}")
    (tmp_path / "key").write_text(key)
    identity = {"mode": "enforce", "keys_file": str(tmp_path / "keys.yaml")}
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path / "adapters", identity=identity, access=configured) as served,
    ):
        asked = ("access", "check", "--as", "zoe", "--may", "infer", "a00", "--explain")
        code, out, _ = await sidecar(served, *asked)
        assert (code, out) == (0, "allowed by cedar: zoe (line 1); judged: a00@v1\n")
        await asyncio.to_thread(policies.write_text, "permit(")
        async with asyncio.timeout(60):
            while not served.sidecar.access.policy.fault:
                await asyncio.sleep(0.05)
        _, page = await served.sidecar.metrics.render()
        assert b"\nlora_sidecar_policy_faulty 1.0\n" in page
        assert b"\nlora_sidecar_policy_epoch 1.0\n" in page
        code, out, _ = await sidecar(served, *asked)
        assert code == 0
        assert out == (
            "allowed by cedar: zoe (line 1); judged: a00@v1\n"
            f"{policies} has changed since and does not decide: line 1: unexpected end of input\n"
        )
        told = await sidecar(served, "access", "check", "a00", "--token-file", str(tmp_path / "key"))
        hint = "cedar has changed since and does not decide: its file has a fault; ask your operator\n"
        assert told[:2] == (0, "allowed\n" + hint), "to a tenant, neither the path nor the text of the fault"


async def test_everybody_may_ask_about_itself_and_learns_of_no_hidden_name(tmp_path: Path) -> None:
    write_adapters(tmp_path / "adapters", 2)
    identity = one_key(tmp_path)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path / "adapters", identity=identity) as served,
    ):
        blue = ("adapters", "register", "secret", str(tmp_path / "adapters" / "a01"), "--allow", "blue")
        assert (await sidecar(served, *blue))[0] == 0

        async def ask(*arguments: str) -> tuple[int, str]:
            code, out, error = await sidecar(
                served, "access", "check", *arguments, "--token-file", str(tmp_path / "key")
            )
            return code, (out or error).strip()

        assert await ask("a00") == (0, "allowed")
        assert await ask("a00", "--as", "acme", "--may", "list") == (0, "allowed")
        assert await ask("a00", "--may", "promote") == (1, "denied")
        hidden, unknown = await ask("secret", "--explain"), await ask("a02", "--explain")
        assert hidden == unknown == (
            1, "denied (no such name here) by visibility: the name or version is not here, or hidden from you",
        )  # fmt: skip
        assert await ask("a00@v9") == await ask("secret@v1") == (1, "denied (no such name here)")
        assert await ask("--may", "drain", "gpu-0") == await ask("--may", "drain", "gpu-9") == (1, "denied")
        for others in (
            ("--as", "blue"),
            ("--role", "operator"),
            ("--group", "ops"),
            ("--as", "acme", "--group", "ops"),
        ):
            code, out = await ask("a00", *others)
            assert (code, "you may ask about yourself only" in out, "NOT_ALLOWED" in out) == (1, True, True), others
        assert served.sidecar.access.access.denials["not_permitted", "false"] == 4


CONTRACTORS = """
permit(principal in Role::"operator", action, resource);
@id("its own") permit(principal, action, resource) when { resource has prefix && resource.prefix == principal };
forbid(principal in Group::"contractors", action, resource) when { resource has name && resource.name == "acme/plans" };
"""


async def test_the_callers_own_tenant_is_the_caller_itself(tmp_path: Path) -> None:
    """A key of a group may not ask what a key of its tenant that is in no group may do."""
    async with with_cedar(tmp_path, CONTRACTORS, "contractors") as served:
        for name in ("acme/plans", "acme/open"):
            command = ("adapters", "register", name, str(tmp_path / "adapters" / "a00"))
            assert (await sidecar(served, *command))[0] == 0

        async def ask(*arguments: str) -> tuple[int, str, str]:
            return await sidecar(
                served, "access", "check", "--explain", *arguments, "--token-file", str(tmp_path / "key")
            )

        for itself in ((), ("--as", "acme")):
            assert (await ask("acme/open", *itself))[1] == "allowed by cedar: its own (line 3); judged: acme/open@v1\n"
            hidden = await ask("acme/plans", *itself)
            assert hidden == await ask("acme/nothing", *itself)
            assert hidden[0] == 1
        operator = await sidecar(served, "access", "check", "--as", "acme", "acme/plans")
        assert operator[1] == "allowed\n", "to operators, --as is a key without groups"


@pytest.mark.parametrize("mode", ["observe", "enforce"])
async def test_in_observe_mode_the_answer_is_that_of_enforce(tmp_path: Path, mode: str) -> None:
    write_adapters(tmp_path / "adapters", 1)
    identity = one_key(tmp_path)
    (tmp_path / "unknown").write_text((tmp_path / "key").read_text().replace("a" * 64, "b" * 64))
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path / "adapters", identity=identity | {"mode": mode}) as served,
    ):

        async def ask(*arguments: str, key: str = "key") -> tuple[int, str, str]:
            return await sidecar(
                served, "access", "check", "--explain", *arguments, "--token-file", str(tmp_path / key)
            )

        infer = "allowed by open: everybody may use what the allow list admits; judged: a00@v1\n"
        for itself in ((), ("--as", "acme")):
            assert (await ask("a00", *itself))[:2] == (0, infer)
            denied = "denied by open: only a publisher may change names\n"
            assert (await ask("a00", "--may", "promote", *itself))[:2] == (1, denied)
            assert (await ask("--may", "manage", *itself))[:2] == (1, "denied by open: only an operator may do this\n")
        code, out, error = await ask("a00", key="unknown")
        assert code == 1
        if mode == "observe":
            assert "denied by the API key is not known here" in out
        else:
            assert "the API key is not known here" in error
        assert (await sidecar(served, "access", "check", "--may", "manage"))[1] == "allowed\n"


SUPPORT = """
permit(principal in Role::"operator", action, resource);
permit(principal in Group::"support", action == Action::"see_queue", resource);
"""


async def test_who_may_see_the_queue_may_not_do_the_rest(tmp_path: Path) -> None:
    """One action that Cedar permits on the sidecar is no other one."""
    async with with_cedar(tmp_path, SUPPORT, "support") as served:
        token = ("--token-file", str(tmp_path / "key"))
        assert (await sidecar(served, "queue", *token))[0] == 0
        assert "a00" in (await sidecar(served, "adapters", "list"))[1]
        assert "a00" not in (await sidecar(served, "adapters", "list", *token))[1]
        for asked in (
            ("backends", "drain", "trt-0"),
            ("adapters", "evict", "a00"),
            ("adapters", "pause", "a00", "--for", "1h"),
            ("keys", "create", "--tenant", "acme", "--role", "operator"),
            ("limits", "set", "acme", "--concurrent", "1"),
            ("audit",),
        ):
            code, out, error = await sidecar(served, *asked, *token)
            refused = "UNKNOWN_ADAPTER" if asked[0] == "adapters" else "NOT_ALLOWED"
            assert (code, out, refused in error) == (1, "", True), (asked, out, error)
