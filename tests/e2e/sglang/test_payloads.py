"""What weights are sent as: SGLang's own unpickler takes it, and finds in it what the independent reader finds."""

from __future__ import annotations

import json
import subprocess
from base64 import b64decode
from pathlib import Path

import numpy as np

from sidecar.lab.engine.openai.pickled import read_pickle
from tests.e2e.sglang.installed import SglangInstalled
from tests.fuzz.sglang import run

CASES = 3000
TYPES = {"torch.float16": np.float16, "torch.bfloat16": np.uint16}


def test_its_unpickler_reads_what_is_sent(tmp_path: Path) -> None:
    """Payloads of random adapters, of both types, are read to the bit."""
    (tmp_path / "payloads").mkdir()
    run(range(CASES), 1, tmp_path, tmp_path / "payloads")
    installed = SglangInstalled.find()
    script = installed.script("read_payloads.py", str(tmp_path / "payloads"))
    subprocess.run(script, env=installed.environment(), check=True)
    payloads = sorted((tmp_path / "payloads").glob("*.payload"))
    assert len(payloads) > 100
    for payload in payloads:
        read = json.loads(payload.with_suffix(".read").read_text())
        assert isinstance(read, dict), read
        ours = read_pickle(payload.read_text())
        assert list(read) == list(ours)
        for name, (dtype, shape, data) in read.items():
            theirs = np.frombuffer(b64decode(data), TYPES[dtype]).reshape(shape)
            assert theirs.dtype == ours[name].dtype
            assert theirs.tobytes() == ours[name].tobytes(), (payload, name)
