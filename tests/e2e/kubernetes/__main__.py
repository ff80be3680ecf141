"""`make e2e-kubernetes`: the tests that know a real cluster, before a real API server, with what is given to pytest."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from pathlib import Path

from tests.e2e.installed import ROOT, NotInstalled
from tests.e2e.kubernetes.server import api_server
from tests.e2e.server import StartFailed

TESTS = [*sorted((ROOT / "tests/integration").glob("test_kubernetes_*.py")), ROOT / "tests/e2e/kubernetes"]


async def run(arguments: list[str]) -> int:
    """Run the tests to their end and return pytest's exit status."""
    with tempfile.TemporaryDirectory(prefix="kubernetes-") as folder:
        async with api_server(Path(folder)) as server:
            command = ["-m", "pytest", "-m", "real_cluster", "-rs", *map(str, TESTS), *arguments]
            environment = os.environ | {"KUBECONFIG": str(server.kubeconfig)}
            process = await asyncio.create_subprocess_exec(sys.executable, *command, cwd=ROOT, env=environment)
            return await process.wait()


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(run(sys.argv[1:])))
    except (NotInstalled, StartFailed) as error:
        sys.exit(str(error))
