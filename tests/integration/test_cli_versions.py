"""Versions from the command line: stage, compare, promote, roll back, refresh; each command's words and JSON."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from sidecar.cli.generating import first_difference
from sidecar.lab.demo.model import ADAPTERS, SEED
from tests.kit.emulated import running_engine
from tests.kit.forked import python
from tests.kit.serving import Serving, serving


async def sidecar(served: Serving, *arguments: str) -> tuple[int, str, str]:
    """Run a command against the served sidecar."""
    listener = served.sidecar.data_address if arguments[0] == "generate" else served.sidecar.admin_address
    option = "--server" if arguments[0] == "generate" else "--admin"
    process = await python(
        "-m", "sidecar", *arguments, option, listener,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, error = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), error.decode()


async def test_a_names_life_through_its_versions(tmp_path: Path) -> None:
    """What an operator does with a new fine-tune, and takes back."""
    prompt = "Who buys the most here?"
    async with running_engine(seed=SEED) as engine, serving([engine], roots=[ADAPTERS]) as served:
        for words in (("pirate",), ("chef", "--stage", "--label", "run=7")):
            code, _, error = await sidecar(
                served, "adapters", "register", "voice", str(ADAPTERS / words[0]), *words[1:]
            )
            assert code == 0, error
        code, out, _ = await sidecar(served, "generate", "voice", prompt)
        assert (code, out) == (0, "Arr, Long Meg! She pays in doubloons!\n")
        code, out, _ = await sidecar(served, "generate", "--compare", "voice@v1,voice@v2,base", prompt, "--json")
        answers = json.loads(out)["answers"]
        assert answers["voice@v2"] == {"text": "Table nine: she orders the duck twice.", "first_difference": 0}
        assert answers["voice@v1"]["first_difference"] is None
        code, out, _ = await sidecar(served, "generate", "--compare", "voice@v1,voice@v2", prompt)
        assert "»T«able nine" in out
        code, out, _ = await sidecar(served, "adapters", "promote", "voice@v2", "--weight", "10")
        assert out == "10 % of voice go to v2, the rest to v1\n"
        code, out, _ = await sidecar(served, "adapters", "promote", "voice@v2")
        assert out == "voice stands for v2\n"
        code, out, _ = await sidecar(served, "adapters", "show", "voice")
        assert "run=7" in out
        assert "previous" in out
        code, out, _ = await sidecar(served, "adapters", "rollback", "voice")
        assert out == "voice stands for v1\n"
        assert roles(await sidecar(served, "adapters", "show", "voice", "--json")) == ["current", "withdrawn"]
        code, _, error = await sidecar(served, "adapters", "rollback", "voice", "--to", "")
        assert (code, error.strip()) == (2, "error: --to names no version; leave it out to go back to the previous one")
        code, _, error = await sidecar(served, "generate", "voice@", prompt)
        assert code == 1
        assert '"voice@" names no version after the "@"; name one, as in "voice@v2", or leave the "@" out' in error
        code, _, error = await sidecar(served, "adapters", "rollback", "voice")
        assert code == 1
        assert "voice was rolled back to v1 already, from v2; its versions are v1 (current), v2 (withdrawn); " in error
        assert "sidecar adapters rollback voice --to v2" in error
        code, out, error = await sidecar(served, "adapters", "rollback", "voice", "--to", "v2")
        assert (code, out) == (0, "voice stands for v2\n")
        assert error == "warning: v2 of voice was itself rolled back from\n"
        code, out, error = await sidecar(served, "adapters", "rollback", "voice", "--to", "voice@v1")
        assert (code, out) == (0, "voice stands for v1\n")
        code, out, _ = await sidecar(served, "adapters", "register", "voice", str(ADAPTERS / "chef"))
        assert out.splitlines()[1] == "warning: a rollback had left v2; it is current again"
        await sidecar(served, "adapters", "rollback", "voice")
        code, out, error = await sidecar(served, "adapters", "promote", "voice@v2")
        assert (out, error) == ("voice stands for v2\n", "warning: voice@v2 had been rolled back from\n")
        await sidecar(served, "adapters", "rollback", "voice")
        code, out, _ = await sidecar(served, "adapters", "refresh", "voice", "--json")
        assert json.loads(out)["versions"][0]["generation"] == 1
        code, out, error = await sidecar(served, "adapters", "promote", "voice@v9")
        assert code == 1
        assert 'adapter "voice" has no version v9; it has v1, v2' in error
        code, out, error = await sidecar(served, "adapters", "rollback", "voice", "--hold", "soon")
        assert code == 2
        assert "--hold wants a duration" in error


def roles(ended: tuple[int, str, str]) -> list[str]:
    return [version["role"] for version in json.loads(ended[1])["versions"]]


def test_the_first_difference_is_found() -> None:
    """Equal answers have none; one that ends early differs where it ends."""
    assert first_difference(["a", "b"], ["a", "b"]) is None
    assert first_difference(["a", "b"], ["a", "c"]) == 1
    assert first_difference(["a", "b"], ["a"]) == 1
