"""`python -m tools.docs check|generate|run|pictures`; see the package."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from tools.docs import checks, generate, pictures
from tools.docs.run import run


def main(arguments: list[str]) -> int:
    action, *rest = arguments or [""]
    if action == "check":
        found = [*generate.outdated(), *checks.problems(), *pictures.outdated()]
        print(*found, sep="\n", file=sys.stderr, end="\n" if found else "")
        return 1 if found else 0
    if action == "generate":
        generate.generate()
        return 0
    if action == "run":
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what was started is ended
        return run([Path(name).resolve() for name in rest])
    if action == "pictures":
        pictures.draw()
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
