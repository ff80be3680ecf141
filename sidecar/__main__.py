"""`python -m sidecar`: the command line."""

from sidecar.cli import main

main()
