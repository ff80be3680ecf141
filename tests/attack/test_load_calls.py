"""What a hostile or clumsy trainer did: links out of the roots, and an adapter that some engines refuse."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.integration.test_load_calls import VLLM, trained
from tests.kit.peft_files import write_adapter
from tests.kit.vllm_emulated import running_vllm


@pytest.mark.parametrize("linked", ["adapter_model.safetensors", "adapter_config.json"])
async def test_a_file_that_is_a_link_out_of_its_folder_is_not_read(linked: str, tmp_path: Path) -> None:
    """Not even its first bytes, which an error could tell."""
    secret = tmp_path / "outside"
    secret.write_text("root:x:0:0")
    async with running_vllm(**VLLM) as (engine, _), trained([engine], tmp_path) as trainer:
        folder = write_adapter(trainer.folder / "step")
        (folder / linked).unlink()
        (folder / linked).symlink_to(secret)
        reply = await trainer.load(folder)
        assert reply.status_code == 500
        assert f"{linked} is a link that leads out of the folder" in reply.text
        assert str(int.from_bytes(b"root:x:0", "little")) not in reply.text


async def test_a_link_inside_the_folder_is_read(tmp_path: Path) -> None:
    async with running_vllm(**VLLM) as (engine, _), trained([engine], tmp_path) as trainer:
        folder = write_adapter(trainer.folder / "step")
        (folder / "adapter_model.safetensors").rename(folder / "weights")
        (folder / "adapter_model.safetensors").symlink_to("weights")
        assert (await trainer.load(folder)).status_code == 200


async def test_what_two_engines_refuse_is_not_loaded_whoever_answers_first(tmp_path: Path) -> None:
    """The third would take it, at once; the other two need longer to say no."""
    async with AsyncExitStack() as stack:
        slow = VLLM | {"max_lora_rank": 8, "load_ms": 200.0}
        engines = [(await stack.enter_async_context(running_vllm(**slow)))[0] for _ in range(2)]
        engines.append((await stack.enter_async_context(running_vllm(**VLLM)))[0])
        trainer = await stack.enter_async_context(trained(engines, tmp_path))
        for step in range(3):
            reply = await trainer.load(trainer.write(step, rank=16))
            assert (reply.status_code, "max_lora_rank" in reply.text) == (500, True)
