"""The environments that hold the tools, one for each file of `requirements`, and how a tool is run from one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL
from typing import ClassVar

from tests.e2e.installed import Installed, NotInstalled, NotToBeHad
from tests.e2e.processes import signal_group

RUN_S = 240.0
_TAIL = 3000
_QUIET = {"DO_NOT_TRACK": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Tools(Installed):
    """One environment; `DISTRIBUTION` is the first of its tools."""

    DISTRIBUTION: ClassVar[str]

    async def run(self, folder: Path, *command: str | Path) -> str:
        """Run a program of this environment in a folder, which is its home, and return what it printed."""
        process = await asyncio.create_subprocess_exec(
            self.venv / "bin" / command[0], *command[1:],
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            cwd=folder, env=self.environment(HOME=str(folder), **_QUIET), process_group=0,
        )  # fmt: skip
        try:
            async with asyncio.timeout(RUN_S):
                out, err = await process.communicate()
        finally:
            signal_group(process.pid, SIGKILL)  # tools have processes of their own
            await process.wait()
        __tracebackhide__ = True
        said = f"{err.decode(errors='replace')[-_TAIL:]}\n{out.decode(errors='replace')[-_TAIL:]}"
        assert process.returncode == 0, f"{command[0]} ended with {process.returncode}:\n{said}"
        return out.decode()

    def _check(self) -> None:
        reason = self.venv / "missing"
        if reason.exists():
            raise NotToBeHad(reason.read_text().strip())
        if not self.versions(self.DISTRIBUTION):
            raise NotInstalled(f"no {self.DISTRIBUTION} in {self.venv}: make {self.FOLDER}, or set {self.VARIABLE}")


class Short(Tools):
    """The OpenAI SDK and schemathesis."""

    FOLDER, VARIABLE, DISTRIBUTION = ".venv-tools/short", "TOOLS_SHORT_VENV", "openai"


class Apps(Tools):
    """LangChain, LlamaIndex and litellm."""

    FOLDER, VARIABLE, DISTRIBUTION = ".venv-tools/apps", "TOOLS_APPS_VENV", "litellm"


class Load(Tools):
    """aiperf, genai-perf and perf_analyzer."""

    FOLDER, VARIABLE, DISTRIBUTION = ".venv-tools/load", "TOOLS_LOAD_VENV", "aiperf"


class GuideLlm(Tools):
    """guidellm, which needs torch."""

    FOLDER, VARIABLE, DISTRIBUTION = ".venv-tools/guidellm", "TOOLS_GUIDELLM_VENV", "guidellm"


class InferencePerf(Tools):
    """inference-perf, which needs Python 3.12."""

    FOLDER, VARIABLE, DISTRIBUTION = ".venv-tools/inference-perf", "TOOLS_INFERENCE_PERF_VENV", "inference_perf"
