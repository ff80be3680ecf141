"""Write what each command prints with --json, before a sidecar that has been through one day of an operator.

    python -m tests.golden.make_commands

What differs from run to run is masked: times, ages, addresses, folders, ids that are drawn. What a script reads is not:
keys, their order, kinds of values, names, states, reasons, counts.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sidecar.cli import run
from tests.kit.emulated import running_engine
from tests.kit.peft_files import write_adapter
from tests.kit.serving import Serving, serving, until

RECORDED = Path(__file__).parent / "commands.json"

DRAWN = re.compile(r"(_s|_ns|_ms|_share|_at|_utc|_seconds|output_tokens)$|^(s|ns|at|age|mean|p\d+)$")
"""Keys whose numbers differ from run to run, of what was asked of a sidecar."""
CLOCKED = re.compile(r"^(core_us_per_request|wall_s)$")
"""Those of what was simulated: the rest depends on the seed."""
TEXTS = (
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|\+00:00)?"), "<time>"),
    (re.compile(r"\b\d{4}-\d\d-\d\d\b"), "<day>"),
    (re.compile(r"127\.0\.0\.1:\d+"), "<address>"),
    (re.compile(r"\b[0-9a-f]{32}\b"), "<drawn>"),
    (re.compile(r"\b(lsk_)?[0-9a-f]{12}(_[0-9a-f]{64})?\b"), "<drawn>"),
    (re.compile(r"\b\d+(\.\d+)? (ns|µs|ms|s|min|h)\b"), "<time>"),
    (re.compile(r"not reached yet|<address> does not answer: .*Connection refused( \(\d+\))?"), "<not up>"),
)


def masked(value: Any, folder: Path, drawn: re.Pattern[str], key: str = "") -> Any:
    """Return a JSON value without what differs from run to run."""
    if isinstance(value, dict):
        return {
            masked_text(name, folder): masked(each, folder, drawn, key if drawn.search(key) else name)
            for name, each in value.items()
        }
    if isinstance(value, list):
        return [masked(each, folder, drawn, key) for each in value]
    if isinstance(value, int | float | str) and not isinstance(value, bool) and drawn.search(key):
        return f"<{type(value).__name__}>"
    return masked_text(value, folder) if isinstance(value, str) else value


def masked_text(text: str, folder: Path) -> str:
    text = text.replace(str(folder), "<folder>")
    for pattern, word in TEXTS:
        text = pattern.sub(word, text)
    return text


def ran(arguments: Sequence[str]) -> tuple[int, str, str]:
    """Run a command in this process; return its exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run(arguments)
    return code, out.getvalue(), err.getvalue()


def shown(arguments: Sequence[str], folder: Path, drawn: re.Pattern[str]) -> dict[str, Any]:
    """Run a command with --json; return what a script sees of it."""
    code, out, err = ran([*arguments, "--json"])
    lines = [line for line in out.splitlines() if line]
    try:
        values = [json.loads(out)] if out else []
    except ValueError:
        values = [json.loads(line) for line in lines]
    return {"exit": code, "out": masked(values, folder, drawn), "err": masked_text(err, folder).splitlines()}


ADMIN = (
    "whoami", "adapters register sql {adapters}/sql", "adapters register sql {adapters}/sql",
    "adapters register sql {adapters}/newer", "adapters register law {adapters}/law --allow acme",
    "adapters register lost {adapters}/none", "adapters list", "adapters show sql", "adapters show nobody",
    "adapters promote sql@v1", "adapters promote sql@v2 --weight 20", "adapters rollback sql",
    "adapters refresh sql@v2",
    "adapters pin sql", "adapters unpin sql", "adapters prefetch sql", "adapters prefetch sql --backend trt-0",
    "adapters verify sql", "adapters release sql", "adapters pause law --for 1h", "adapters resume law",
    "access check law --as acme", "access check law --as beta",
    "backends list", "backends show trt-0", "backends show nobody", "backends check",
    "backends add spare --address triton://127.0.0.1:9", "backends remove spare", "config show",
    "keys create --tenant acme --role operator", "keys list", "keys revoke nobody",
    "limits set acme --requests-per-day 100", "limits list", "limits list --tenant acme", "limits remove acme",
    "replicas list", "usage",
)  # fmt: skip
"""Before any request."""
HELD = (
    "queue", "queue --adapter sql", "queue --limit 1", "requests list", "requests list --tenant acme",
    "requests show one", "requests show waiting", "backends show trt-0", "adapters show sql",
    "requests cancel waiting", "requests cancel nobody", "backends drain trt-0", "queue", "backends undrain trt-0",
    "requests cancel --adapter sql",
)  # fmt: skip
"""While a request runs at the only seat and another waits for it."""
LATER = (
    "requests show waiting", "usage", "adapters evict sql", "adapters unregister law", "adapters list", "limits list",
    "config reload",
)  # fmt: skip
OFFLINE = (
    "adapters inspect {adapters}/sql", "adapters inspect {adapters}/none", "config check {file}",
    "config check {adapters}/none", "envoy config {file}", "policies check lru", "policies check nobody",
    "simulate --adapters 8 --requests 64 --in-flight 16 --seed 1",
    "plan --adapters 8 --rate 2 --requests 200 --seeds 1",
    "calibrate",
)  # fmt: skip
ONE_SEAT = {"engine": {"seats": 1}}


@asynccontextmanager
async def day(folder: Path) -> AsyncIterator[Serving]:
    """Serve one engine with one seat; its steps take a while, so that a request runs until it is cancelled."""
    for seed, name in enumerate(("sql", "newer", "law")):
        write_adapter(folder / "adapters" / name, seed=seed)
    async with (
        running_engine(compute="none", shape="tiny", time_scale=1.0, seats=1) as engine,
        serving(
            [engine], roots=[folder / "adapters"], file=folder / "sidecar.yaml", backend={"engine": {"seats": 1}}
        ) as served,
    ):
        yield served


async def told(folder: Path) -> dict[str, Any]:
    """Return what each command prints with --json, by its line."""
    found: dict[str, Any] = {}
    names = {"adapters": str(folder / "adapters"), "file": str(folder / "sidecar.yaml")}

    async def take(when: str, lines: Sequence[str], *options: str) -> None:
        drawn = DRAWN if options else CLOCKED
        for number, line in enumerate(lines):
            arguments = [*line.format(**names).split(), *options]
            found[f"{when} {number:02} {line}"] = await asyncio.to_thread(shown, arguments, folder, drawn)

    async with day(folder) as served:
        admin = ("--admin", served.sidecar.admin_address)
        await take("before", ADMIN, *admin)
        calls, requests = [], served.state.requests
        for count, request_id in enumerate(("one", "waiting"), 1):
            calls.append(asyncio.create_task(served.ask("sql", 4000, request_id=request_id)))
            await until(lambda count=count: len(requests) == count and any(r.first_token for r in requests.values()))
        await take("held", HELD, *admin)
        await asyncio.gather(*calls, return_exceptions=True)
        await take("later", LATER, *admin)
        await take("offline", OFFLINE)
    return found


def main() -> None:
    with TemporaryDirectory() as folder:
        found = asyncio.run(told(Path(folder)))
    RECORDED.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
