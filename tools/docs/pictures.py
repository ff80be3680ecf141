"""Draw the pictures of README and docs from the commands' own output and the simulator's report.

No picture is edited by hand. A terminal's picture is a command's output, exported by rich; its times differ from run to
run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

from tools.docs.pages import ROOT, named

PICTURES = ROOT / "docs" / "pictures"
WIDTH = 108
SIDECAR = (sys.executable, "-m", "sidecar")
ADAPTERS = ROOT / "sidecar" / "lab" / "demo" / "data" / "adapters"
PORTS = {"emulate": 18001, "data": 19000, "admin": 19001, "http": 19002}
LOOKS = 240
# rich's own template fetches a font from the web; the pictures show with any fixed font.
SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" class="rich-terminal">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
 font-size: {char_height}px; line-height: {line_height}px; white-space: pre; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def draw() -> None:
    """Draw all of them."""
    PICTURES.mkdir(exist_ok=True)
    _demo()
    _queue()
    _lanes()


def _demo() -> None:
    _export("demo", "sidecar demo", _shown([*SIDECAR, "demo"]))


def _queue() -> None:
    """More adapters than the engine has slots, and more requests than it has seats."""
    with tempfile.TemporaryDirectory(prefix="pictures-") as folder:
        processes = [_started(folder, "emulate", "--seed", "20", "--grpc-port", str(PORTS["emulate"]), "--metrics-port",
                              "18002", "--seats", "4", "--time-scale", "12")]  # fmt: skip
        listeners = [
            word
            for name in ("data", "admin", "http")
            for word in ("--set", f"listeners.{name}.address=127.0.0.1:{PORTS[name]}")
        ]
        engine = f"{{url: 'triton://127.0.0.1:{PORTS['emulate']}', id: gpu-1, engine: {{device_pages: 2, seats: 4}}}}"
        serve = ("serve", "--adapters", str(ADAPTERS), *listeners, "--set", f"backends=[{engine}]")
        processes.append(_started(folder, *serve))
        admin = ("--admin", f"127.0.0.1:{PORTS['admin']}")
        try:
            _until(lambda: " up " in _shown([*SIDECAR, "backends", "list", *admin]))
            names = sorted(path.name for path in ADAPTERS.iterdir())
            server = ("--server", f"127.0.0.1:{PORTS['data']}", "--max-tokens", "400")
            for number in range(14):
                asked = (names[number % 5], "Who buys the most here?", "--tenant", ("acme", "zeta")[number % 2])
                processes += [_started(folder, "generate", *asked, *server)]
            _until(lambda: _shown([*SIDECAR, "queue", *admin]).count("\n") > 8)
            _export("queue", "sidecar queue", _shown([*SIDECAR, "queue", *admin, "--limit", "8"]))
        finally:
            for process in reversed(processes):
                process.kill()
                process.wait()


def _lanes() -> None:
    for path, picture in _lanes_drawn():
        path.write_text(picture)


def outdated() -> Iterator[str]:
    """Yield the outdated ones among the simulator's pictures, whose every byte follows from the code."""
    for path, picture in _lanes_drawn():
        if not path.is_file() or path.read_text() != picture:
            yield f"{named(path)} is not what the simulator draws: make pictures"


def _lanes_drawn() -> Iterator[tuple[Path, str]]:
    """Yield the slot lanes of the bare engine and of the sidecar over the same time, from the simulator's report."""
    from sidecar.lab.sim.options import Options
    from sidecar.lab.sim.report.timeline import slot_lanes
    from sidecar.lab.sim.runs import runs_of
    from sidecar.lab.sim.simulate import simulate

    options = Options(
        slots=4, adapters=12, in_flight=96, requests=288, input_tokens=256, output_tokens=128, output_cv=0.5, seats=32,
        compare=("none", "soft_gated"),
    )  # fmt: skip
    results = [simulate(run.setup, run.workload, run.label) for run in runs_of(options)]
    for name, picture in zip(("lanes-bare", "lanes"), slot_lanes(results), strict=True):
        yield PICTURES / f"{name}.svg", f"{picture}\n"


def _shown(command: Sequence[str]) -> str:
    """Return a command's output on a terminal of our width, colours included."""
    environment = os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.stdout


def _started(folder: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*SIDECAR, *arguments], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _until(is_so: Callable[[], bool]) -> None:
    for _ in range(LOOKS):
        if is_so():
            return
        time.sleep(0.25)
    raise TimeoutError("the state that the picture shows was not reached")


def _export(name: str, title: str, shown: str) -> None:
    text = Text.from_ansi(shown.strip("\n"))
    width = max(cell_len(line.plain.rstrip()) for line in text.split("\n"))
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=width + 1, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(text)
    svg = console.export_svg(title=title, theme=DIMMED_MONOKAI, code_format=SVG, unique_id=name)
    (PICTURES / f"{name}.svg").write_text(svg)
