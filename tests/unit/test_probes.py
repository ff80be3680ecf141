"""probe.jsonl as it is read, whether weights can change anything, and when an answer is the expected one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sidecar.adapters.probes import BYTES_MAX, Probe, read_probes
from sidecar.adapters.registration import changes_something
from sidecar.errors import Invalid, Reason
from sidecar.shell.evidence import Answers, Prompt, Reply, difference_position, quoted
from tests.kit.peft_files import read_tensors, write_adapter, write_safetensors

FILE = "probe.jsonl"


def test_lines_are_read(tmp_path: Path) -> None:
    """Empty lines are passed over, other keys are the author's own; no file is no fault."""
    assert read_probes(tmp_path, "sql") is None
    assert read_probes(tmp_path / "gone", "sql") is None
    (tmp_path / FILE).write_text('{"prompt": "Größe?", "expect": "17", "note": 1}\n\n{"expect": "b", "prompt": "a"}')
    assert read_probes(tmp_path, "sql") == [Probe("Größe?", "17"), Probe("a", "b")]
    (tmp_path / FILE).write_text("")
    assert read_probes(tmp_path, "sql") == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "a", "expect": "b"}\nnonsense', "line 2 of probe.jsonl: it is not JSON"),
        (b'{"prompt": "a"}', 'line 1 of probe.jsonl has no text under "expect"'),
        (b'{"prompt": 3, "expect": "b"}', 'line 1 of probe.jsonl has no text under "prompt"'),
        (b'{"prompt": "a", "expect": " "}', 'no text under "expect"'),
        (b'["a", "b"]', "it is not a JSON object"),
        (b'{"prompt": "\xff", "expect": "b"}', "it is not UTF-8"),
        (b" " * (BYTES_MAX + 1), f"probe.jsonl is larger than {BYTES_MAX} bytes"),
    ],
)
def test_what_is_wrong_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    """With the line, and nothing of the file is used."""
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(Invalid, match="adapter 'sql': ") as refused:
        read_probes(tmp_path, "sql")
    assert said in refused.value.message


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    """Nor is a folder of that name read."""
    secret = tmp_path / "secret.jsonl"
    secret.write_text('{"prompt": "a", "expect": "b"}')
    for name in ("linked", "folder"):
        (tmp_path / name).mkdir()
    (tmp_path / "linked" / FILE).symlink_to(secret)
    (tmp_path / "folder" / FILE).mkdir()
    for name in ("linked", "folder"):
        with pytest.raises(Invalid) as refused:
            read_probes(tmp_path / name, "sql")
        assert refused.value.reason is Reason.ORIGIN_UNREADABLE


def test_weights_that_change_nothing(tmp_path: Path) -> None:
    """Every A or every B zero, or a scale of zero; one module with an effect is one."""
    folder = write_adapter(tmp_path / "sql")
    assert changes_something(folder, "sql")
    tensors = {name: np.asarray(values) for name, values in read_tensors(folder).items()}
    for side in ("lora_A", "lora_B"):
        zeros = {name: np.zeros_like(values) if side in name else values for name, values in tensors.items()}
        write_safetensors(folder / "adapter_model.safetensors", zeros)
        assert not changes_something(folder, "sql")
        first = next(name for name in tensors if side in name)
        write_safetensors(folder / "adapter_model.safetensors", zeros | {first: tensors[first]})
        assert changes_something(folder, "sql")
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0}))
    assert not changes_something(folder, "sql")


@pytest.mark.parametrize(
    ("answer", "expect", "tokens_max", "matches"),
    [
        ("select 1;", "select 1;", 24, True),
        (" select 1; -- and more", "select 1;\n", 24, True),
        ("select", "select 1;", 24, False),
        ("select", "select 1;", 6, True),
        ("sElect", "select 1;", 6, False),
        ("", "select 1;", 6, False),
    ],
)
def test_when_an_answer_is_the_expected_one(answer: str, expect: str, tokens_max: int, matches: bool) -> None:
    """It begins with it, blanks aside; an answer that was cut off before it had said that much must lead there."""
    asked = Answers("trt-0", Prompt("?", expect=expect), Reply("x"), Reply(answer), tokens_max)
    assert asked.matches is matches
    failed = Answers("trt-0", Prompt("?", expect=expect), Reply("x"), Reply(error="lost"), tokens_max)
    assert not failed.matches
    assert not failed.expected


def test_how_answers_are_told() -> None:
    """Where two part is counted from 1; texts are one line, and cut."""
    assert difference_position(Reply("abc"), Reply("abd")) == "at character 3"
    assert difference_position(Reply("ab"), Reply("abd")) == "at character 3"
    assert difference_position(Reply(token_ids=(1, 2)), Reply(token_ids=(3,))) == "at token 1"
    assert quoted('two\nlines "') == '"two\\nlines ""'
    assert len(quoted("x" * 500)) == 62
    assert str(Reply(token_ids=(1, 2))) == "[1, 2]"
    assert str(Prompt(token_ids=(1, 2))) == "tokens 1,2"
