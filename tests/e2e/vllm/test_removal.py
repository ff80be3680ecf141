"""Adapters that leave a real vLLM through the sidecar: the name first, the files last, whatever the front end says."""

from __future__ import annotations

import shutil
from pathlib import Path

from sidecar.proto import admin_pb2
from tests.e2e.vllm.direct import http_client, load, registered, unload
from tests.e2e.vllm.fronted import ask, in_front
from tests.e2e.vllm.server import VllmServer
from tests.e2e.vllm.toy import NAMES, Toy, prompt
from tests.kit.serving import until

PROMPT, TOKENS = prompt(6, 9), 6
REFUSED = "engine rejected removal of LoRA adapter `"


def _is_there(folder: str) -> bool:
    return Path(folder).is_dir()


async def test_evicted_ones_are_unloaded_and_their_files_go_last(either: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """More than the engine keeps in memory, so that the Rust front end refuses to forget the first ones.

    At no time has the server a name without files, and afterwards it answers by each of them again.
    """
    names = NAMES[: 2 * either.max_cpu_loras]
    async with in_front(either, toy.adapters, tmp_path) as front, http_client(either.http_address) as direct:
        for name in names:
            assert (await ask(front.client, name, PROMPT, TOKENS)).tokens == toy.greedy(
                toy.adapters / name, PROMPT, TOKENS
            )
        assert len(await registered(direct)) == len(names)
        if either.is_rust:
            (first, _), *_ = (await registered(direct)).items()
            refused = await unload(direct, first)
            assert (refused.status_code, refused.json()["error"]["message"][: len(REFUSED)]) == (500, REFUSED)
        for name in names:
            folder = front.staged(name)
            await front.served.adapters.Evict(admin_pb2.AdapterRequest(name=name))
            await until(lambda folder=folder: not folder.exists())  # type: ignore[misc]
            assert str(folder.resolve()) not in (await registered(direct)).values()
            assert all(map(_is_there, (await registered(direct)).values()))
        assert await registered(direct) == {}
        for name in names[:3]:
            assert (await ask(front.client, name, PROMPT, TOKENS)).tokens == toy.greedy(
                toy.adapters / name, PROMPT, TOKENS
            )
    async with http_client(either.http_address) as direct:
        assert await registered(direct) == {}


async def test_what_a_life_before_left(either: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """Its files have gone, and it is unloaded, though the shared folder is a link: the Rust front end says to what."""
    (tmp_path / "place").mkdir()
    (tmp_path / "shared").symlink_to(tmp_path / "place")
    name, key = "old@0123456789ab", "0123456789ab.files.p1.g0"
    shutil.copytree(toy.adapters / "a00", tmp_path / "place" / key)
    async with http_client(either.http_address) as direct:
        (await load(direct, name, tmp_path / "shared" / key)).raise_for_status()
        root = tmp_path / ("place" if either.is_rust else "shared") / key
        assert await registered(direct) == {name: str(root)}
        shutil.rmtree(root)
        async with in_front(either, toy.adapters, tmp_path) as front:
            assert name not in await registered(direct)
            right = toy.greedy(toy.adapters / NAMES[0], PROMPT, TOKENS)
            assert (await ask(front.client, NAMES[0], PROMPT, TOKENS)).tokens == right
