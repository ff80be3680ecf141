"""`make vllm`: an unmodified vLLM with the toy model on its usual port, until it is told to stop.

Its sixteen adapters lie in a folder that is told; none is loaded.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from tests.e2e.foreground import serve
from tests.e2e.vllm.server import VllmServer
from tests.e2e.vllm.toy import Toy


def make(port: int, folder: Path) -> tuple[VllmServer, str]:
    """Make the toy model and its server. Raises RuntimeError when the model could not be made."""
    toy = Toy(folder)
    print("making the toy model …", flush=True)
    toy.make()
    server = VllmServer(folder, toy.model, port=port)
    return server, f"vLLM is ready: {server.url}/v1, model base; adapters to load: {toy.adapters}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--http-port", type=int, default=8000)
    try:
        serve("vllm-toy-", partial(make, parser.parse_args().http_port))
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
