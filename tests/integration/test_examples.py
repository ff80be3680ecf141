"""The examples run as their READMEs say."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
import yaml

from sidecar.backends import registry
from sidecar.backends.openai.dialect import Dialect
from sidecar.backends.registry import entries_of
from sidecar.config import parse
from sidecar.core.facts import EngineFacts
from sidecar.errors import Misused
from sidecar.lab.demo.model import ADAPTERS, SEED
from sidecar.lab.demo.run import LEARNED, PROMPTS
from sidecar.serve.pool import facts_of
from tests.golden.engine_wires import Wire, proxied
from tests.kit.emulated import running_engine
from tests.kit.peft_files import BASE_MODEL
from tests.kit.quill import Quill, QuillEntry
from tests.kit.serving import serving, write_adapters
from tests.kit.sglang_emulated import running_sglang
from tests.kit.trtllm_emulated import running_trtllm
from tests.kit.vllm_emulated import expected, running_vllm

EXAMPLES = Path(__file__).parents[2] / "examples"


class OfVllm(QuillEntry):
    SCHEMES: ClassVar = {"vllm": False}


class OfTriton(QuillEntry):
    SCHEMES: ClassVar = {"triton_llmapi": False}


class TakesScheme(Quill):
    model = replace(Quill.model, name="vllm")
    section = OfVllm


class TakesModel(Quill):
    model = replace(Quill.model, name="triton_llmapi")
    section = OfTriton


class Carries(Quill):
    carries = True


class Fails(Quill):
    def declare(self, entry: Any, declared: EngineFacts) -> EngineFacts:
        raise KeyError("boom")


class Misspelt(Quill):
    count_steps = False


class LoadsNothing(Quill):
    model = replace(Quill.model, reads_files=False)


MISSPELT, LOADS_NOTHING = Misspelt(), LoadsNothing()
TAKES_A_SCHEME, TAKES_A_MODEL, CARRIES, FAILS = TakesScheme(), TakesModel(), Carries(), Fails()
LACKS_ALL = Dialect()


async def run(*command: str, **environment: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | environment,
    )
    out, error = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), error.decode()


@pytest.mark.parametrize("script", ["quickstart/ask.py", "triton-client/stream.py"])
async def test_clients_get_the_named_adapters_words(script: str) -> None:
    """Right words for a known name; a clear error and exit 1 for an unknown one."""
    async with running_engine(seed=SEED) as engine, serving([engine], ADAPTERS) as served:
        server = ("--server", served.sidecar.data_address)
        code, out, _ = await run(str(EXAMPLES / script), *server, "pirate", "Who buys the most here?")
        assert code == 0
        assert out.startswith("Arr, Long Meg! She pays in doubloons!")
        code, _, error = await run(str(EXAMPLES / script), *server, "pirates", "Who buys the most here?")
        assert code == 1
        assert 'unknown adapter "pirates"; did you mean pirate?' in error


async def test_the_first_engine_of_the_readme_answers_chats(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the configuration that its first walk names, as its curl asks, and as a chat program goes on."""
    first = (EXAMPLES.parent / "README.md").read_text().split("## First answer by name")[1].split("```")[1]
    (file,) = re.findall(r"--config (\S+)", first)
    (path, asked) = re.findall(r"(/v1/chat/completions).*-d '(.*?)'", first, re.DOTALL)[0]
    (backend,) = yaml.safe_load((EXAMPLES.parent / file).read_text())["backends"]
    del backend["url"]
    monkeypatch.chdir(EXAMPLES.parent)
    async with (
        running_engine(seed=SEED) as engine,
        serving([engine], ADAPTERS, backend=backend) as served,
        httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}", trust_env=False) as http,
    ):

        async def said(body: dict[str, Any]) -> str:
            answer = await http.post(path, json=body)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["message"]["content"])

        body = json.loads(asked)
        question, answer = PROMPTS.index(body["messages"][-1]["content"]), await said(body)
        assert answer == LEARNED[body["model"]][question]
        body["messages"] += [{"role": "assistant", "content": answer}, {"role": "user", "content": PROMPTS[3]}]
        assert await said(body) == LEARNED[body["model"]][3]


async def test_one_gateway_in_front_of_four_kinds_of_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the example's own configuration, but for addresses: all answer by name, and with the same words."""
    pool = yaml.safe_load((EXAMPLES / "mixed-pool" / "pool.yaml").read_text())
    monkeypatch.chdir(EXAMPLES.parent)
    slots = {"max_loras": 4, "max_cpu_loras": 8}
    async with (
        running_engine(seed=SEED, seats=4) as triton,
        running_vllm(seed=SEED, seats=4, compute="llama", served_model_name=(BASE_MODEL,), **slots) as (vllm, _),
        running_sglang(seed=SEED, seats=4, compute="llama", served_model_name=(BASE_MODEL,), **slots) as sglang,
        running_trtllm(seed=SEED, seats=4, compute="llama", served_model_name=(BASE_MODEL,), **slots) as (trtllm, _),
    ):
        addresses = (triton.grpc_address, vllm.http_address, sglang.http_address, trtllm.http_address)
        for backend, address in zip(pool["backends"], addresses, strict=True):
            backend["url"] = f"{backend['id']}://{address}"
        del pool["backends"][0]["metrics"]
        for backend in pool["backends"]:
            if "adapters_dir" in backend:
                backend["adapters_dir"] = str(tmp_path)
        async with serving([], ADAPTERS, **pool) as served:
            command = (str(EXAMPLES / "mixed-pool" / "ask.py"), "--server", served.sidecar.http_address)
            names = sorted(path.name for path in ADAPTERS.iterdir())
            code, out, error = await run(*command, "Who buys the most here?", *names)
            assert code == 0, error
            answers = {
                name: (engine, words) for engine, name, words in (line.split(maxsplit=2) for line in out.splitlines())
            }
            assert list(answers) == names
            assert {engine for engine, _ in answers.values()} == {"triton", "vllm", "sglang", "trtllm"}
            known = json.loads((ADAPTERS.parent / "demo.json").read_text())["answers"]
            assert {name: words for name, (_, words) in answers.items()} == {
                name: known[name][0]["text"].rstrip() for name in names
            }
            assert answers["pirate"][1].startswith("Arr, Long Meg! She pays in doubloons!")
            code, _, error = await run(*command, "Who buys the most here?", "pirates")
            assert code == 1
            assert "did you mean pirate?" in error


async def test_a_policy_is_one_file_and_no_line_of_ours() -> None:
    """The example policy passes the conformance suite by its class's name, and serves."""
    command = ("-m", "sidecar", "policies", "check", "largest_first:LargestFirst")
    folder = str(EXAMPLES / "custom-policy")
    code, out, error = await run(*command, PYTHONPATH=folder)
    assert code == 0, out + error


async def test_a_plug_in_policy_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """`store.eviction: package.module:Class` is enough for a store that has to evict."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "custom-policy"))
    store = {"eviction": "largest_first:LargestFirst", "memory_bytes": 150_000}
    async with running_engine(seed=SEED) as engine, serving([engine], ADAPTERS, store=store) as served:
        for name in ("pirate", "sql", "chef", "legal"):
            assert (await served.ask(name)).tokens
        assert type(served.state.store.policy).__name__ == "LargestFirst"
        assert served.state.store.evictions > 0


async def test_a_dialect_is_one_file_and_no_line_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example dialect loads and unloads adapters at its server's own paths; its file has at most 20 lines."""
    folder = EXAMPLES / "custom-dialect"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(registry, "_from_elsewhere", {})
    paths = {"/adapters/load": "/v1/load_lora_adapter", "/adapters/unload": "/v1/unload_lora_adapter"}
    names, wire = write_adapters(tmp_path / "adapters", 2), Wire()
    async with running_vllm(compute="none") as (engine, _), proxied(engine.http_address, wire, paths) as server:
        url = f"acme://{server.http_address}"
        backend = {"kind": "acme:DIALECT", "url": url, "id": "acme-0", "adapters_dir": str(tmp_path / "shared")}
        async with serving([], tmp_path / "adapters", [tmp_path], backends=[backend]) as served:
            for name in names:
                version = f"{name}@{served.state.names[name].digest[:12]}"
                assert (await served.ask(name)).tokens == expected(version, tmp_path / "adapters" / name, 4)
            assert served.state.backends["acme-0"].facts.kind == "acme"
        code, out, error = await run("-m", "sidecar", "backends", "check", url, PYTHONPATH=str(folder))
        assert (code, "acme://" in error) == (2, True), out + error  # a dialect is known by the file that names it
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump({"backends": [backend | {"base_model": "base"}]}))
        code, out, error = await run(
            "-m", "sidecar", "backends", "check", "acme-0", "--config", str(file), PYTHONPATH=str(folder)
        )
        assert code == 0, out + error
    called = {json.loads(line)[1] for line in wire.calls}
    assert called == {"/adapters/load", "/adapters/unload", "/v1/completions"}
    assert len((folder / "acme.py").read_text().splitlines()) <= 20


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("largest_first:LargestFirst", "is not a sidecar.backends.openai.dialect.Dialect"),
        ("tests.integration.test_examples:TAKES_A_SCHEME", 'in common with the kind "vllm"'),
        ("tests.integration.test_examples:TAKES_A_MODEL", 'in common with the kind "triton"'),
        ("tests.integration.test_examples:LACKS_ALL", "it has no model and no section and no start"),
        ("tests.integration.test_examples:CARRIES", "must be a subclass of TrtllmEntry"),
        ("tests.integration.test_examples:FAILS", "has failed in declare: KeyError: 'boom', at "),
        ("tests.integration.test_examples:MISSPELT", 'did you mean "counts_steps"?'),
        ("tests.integration.test_examples:LOADS_NOTHING", "no adapter can get to its servers"),
        ("tests.kit.quill:Quill", "it is a class; name a value, DIALECT = Quill()"),
        ("no_such_package:DIALECT", "put the folder that has it into PYTHONPATH"),
        ("acme", 'there is no kind of backend "acme"; there are triton, vllm, trtllm'),
    ],
)
def test_what_is_no_dialect_is_refused(target: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "custom-policy"))
    monkeypatch.setattr(registry, "_from_elsewhere", {})
    scheme = {"TAKES_A_SCHEME": "vllm", "TAKES_A_MODEL": "triton_llmapi"}.get(target.partition(":")[2], "quill")
    config = parse({"backends": [{"kind": target, "url": f"{scheme}://127.0.0.1:1"}]}, "the test")
    with pytest.raises(Misused, match=re.escape(why)):
        facts_of(entries_of(config))


def test_every_example_has_a_readme_that_names_its_file() -> None:
    """A folder each, with a README and one runnable file that it names, or files of policies that it names."""
    for folder in sorted(path for path in EXAMPLES.iterdir() if path.is_dir()):
        files = list(folder.glob("*.cedar")) or list(folder.glob("*.py")) or list(folder.glob("envoyfilter.yaml"))
        assert len(files) == 1 or files[0].suffix == ".cedar"
        readme = (folder / "README.md").read_text()
        for file in files:
            assert re.search(rf"`{file.name}`", readme)
