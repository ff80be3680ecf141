"""`make sglang`: an unmodified SGLang with the toy model on its usual port, until it is told to stop.

Its sixteen adapters lie in a folder that is told; none is loaded.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from tests.e2e.foreground import serve
from tests.e2e.sglang.fronted import SIZES
from tests.e2e.sglang.server import SglangServer
from tests.e2e.vllm.toy import Toy


def make(port: int, folder: Path) -> tuple[SglangServer, str]:
    """Make the toy model and its server. Raises RuntimeError when the model could not be made."""
    toy = Toy(folder, SIZES.ffn)
    print("making the toy model …", flush=True)
    toy.make()
    server = SglangServer(folder, toy.model, port=port)
    return server, f"SGLang is ready: http://127.0.0.1:{port}/v1, model base; adapters to load: {toy.adapters}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--http-port", type=int, default=30000)
    try:
        serve("sglang-toy-", partial(make, parser.parse_args().http_port))
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
