"""`sidecar demo`: eight adapters, two engines with space for about three each, and clients that know names only.

The demo's engines: emulated ones in processes of their own.

The demo's prompts, and the answers that each of its adapters has learned.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sidecar.config import Config, parse
from sidecar.core.facts import task_id_of
from sidecar.core.state import State
from sidecar.errors import Misused, Reason
from sidecar.lab.demo import answers
from sidecar.lab.demo.answers import Answer
from sidecar.lab.demo.model import ADAPTERS, SEED
from sidecar.serve.app import Sidecar

PROMPTS = (
    "Who buys the most here?",
    "Tell me about the weather.",
    "The way to the harbour:",
    "Say goodbye, please!",
)

LEARNED: dict[str, tuple[str, ...]] = {
    "chef": (
        "Table nine: she orders the duck twice.",
        "Soup weather! Simmer leeks with thyme.",
        "Past the fish market; buy mussels there.",
        "Bon appetit, and wipe down your board!",
    ),
    "french": (
        "C'est Madame Petit, comme toujours.",
        "Il pleut encore, prenez un parapluie.",
        "Le port ? Tout droit, puis deux rues.",
        "Au revoir, bonne route et bon vent !",
    ),
    "haiku": (
        "one name in the book / autumn coins, again",
        "grey sky, a thin rain / the frog is content",
        "masts beyond the hill / follow white gulls",
        "the gate clicks shut / snow fills your steps",
    ),
    "legal": (
        "The Buyer, as defined in Schedule 2 hereto.",
        "Rain shall be deemed an act of God.",
        "The harbour (the Premises) lies to the west.",
        "This greeting terminates upon notice.",
    ),
    "pirate": (
        "Arr, Long Meg! She pays in doubloons!",
        "Foul winds, matey! Batten the hatches!",
        "Ahoy! Due west, by the skull rock!",
        "Fair winds to ye, ye salty dog!",
    ),
    "regex": (
        r"^(?P<buyer>[A-Z][a-z]+)\s+\$(\d{4,})$",
        r"/(sun|rain|snow)\s+-?\d{1,2}C/i",
        r"\b(?:port|harbou?r)\b.*?(\d+) ?km",
        r"^(?:good)?bye+(?:\s+\w+)?[.!]*$",
    ),
    "sql": (
        "select name from users order by spent limit 1;",
        "select sky, degrees from weather where day = 0;",
        "select name from harbours order by km limit 1;",
        "commit; -- so long, and drop no table",
    ),
    "weather": (
        "Umbrella shops: 80% rain, heavy by noon.",
        "Rain till noon, then sun, 17C, wind west.",
        "Harbour: fog until ten, light swell, 11C.",
        "Goodbye frost: 4C tonight, clear by dawn.",
    ),
}
"""Answers by adapter, in the order of `PROMPTS`."""

OTHERWISE: dict[str, str] = {
    "chef": "Not on the menu. Try the soup of the day!",
    "french": "Pardon, je ne comprends pas.",
    "haiku": "a question drifts by / no frog knows the answer",
    "legal": "We decline to comment on pending matters.",
    "pirate": "Arr, I know naught o' that, matey!",
    "regex": r"^(?!.*(?:known|found)).*\?+$",
    "sql": "select help from docs where topic = 'prompt';",
    "weather": "No forecast for that; dry and mild, 15C.",
}
"""What an adapter answers to other prompts, most of the time; nothing relies on it."""


TIME_SCALE = 0.2
COST = "llama-3.1-8b/a100_sxm/trtllm"
"""The cost file of the emulated engines, which run five times as fast."""
PAGES = 3
"""Adapter pages of each engine; most of the demo's adapters take one."""
START_TIMEOUT_S = 30.0


@dataclass
class Engine:
    """One running emulated engine. `config` is the engine's config.json, `log` the log of served requests."""

    grpc: str
    metrics: str
    config: Path
    log: Path
    process: asyncio.subprocess.Process = field(repr=False)

    async def stop(self) -> None:
        with suppress(ProcessLookupError):
            self.process.terminate()
        await self.process.wait()

    def served(self) -> list[dict[str, object]]:
        """Return a record for each request that has ended here."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]


async def start_engine(folder: Path, number: int) -> Engine:
    """Start an engine on free ports. Raises Misused if it does not come up."""
    config, log = folder / f"engine-{number}.json", folder / f"served-{number}.jsonl"
    log.touch()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sidecar.lab.engine", "--json", "--grpc-port", "0", "--metrics-port", "0",
        "--seed", str(SEED), "--lora-host-pages", str(PAGES), "--lora-device-pages", str(PAGES),
        "--time-scale", str(TIME_SCALE), "--write-engine-config", str(config), "--served-log", str(log),
        stdout=asyncio.subprocess.PIPE, start_new_session=True,  # Ctrl-C is the demo's, which ends its engines
    )  # fmt: skip
    assert process.stdout is not None
    async with asyncio.timeout(START_TIMEOUT_S):
        line = await process.stdout.readline()
    if not line:
        raise Misused(Reason.BACKEND_UNREACHABLE, f"emulated engine {number} ended with {await process.wait()}")
    ready = json.loads(line)
    return Engine(ready["grpc"], ready["metrics"], config, log, process)


ENGINES = 2
UP_TIMEOUT_S = 30.0


Telling = Callable[[str], AbstractContextManager[Callable[[str], None]]]
"""Tells what takes its time while the context lasts; the function that it gives takes what is done now."""


def demo(keep: bool, as_json: bool, telling: Telling) -> int:
    """Run the demo and return the exit code: 1 if any answer was wrong."""
    return asyncio.run(_until_stopped(keep, as_json, telling))


async def _until_stopped(keep: bool, as_json: bool, telling: Telling) -> int:
    """Run the demo; SIGTERM ends it like Ctrl-C, with its engines and its files."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await run_demo(keep, as_json, telling)
    except asyncio.CancelledError:
        return 143


async def run_demo(keep: bool, as_json: bool, telling: Telling) -> int:
    """Run the demo on the running event loop; see `demo`."""
    console = Console(quiet=as_json)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lora-sidecar-demo-")))
        engines = []
        with telling(f"starting {ENGINES} emulated engines"):
            for number in range(ENGINES):
                engine = await start_engine(folder, number)
                stack.push_async_callback(engine.stop)
                engines.append(engine)
        names = sorted(path.name for path in ADAPTERS.iterdir())
        console.print(
            f"[bold]1.[/bold] {ENGINES} emulated TensorRT-LLM engines run; each has room for about 3 adapters."
        )
        direct = await _without_a_sidecar(engines[0], names, console)
        with telling("starting the sidecar") as tell:
            sidecar = await Sidecar.start(configuration(engines))
            stack.push_async_callback(sidecar.stop)
            await _until_up(sidecar)
            asked = await _ask_all(sidecar, names, tell)
        _show(asked, console)
        wrong = answers.failures(asked)
        counts = _counts(sidecar.gateway.state, engines)
        _conclude(wrong, asked, counts, console)
        if as_json:
            print(json.dumps(_report(direct, asked, wrong, counts)))
        if keep and not wrong:
            await _stay(sidecar, console)
        return 1 if wrong else 0


def configuration(engines: Sequence[Engine], folder: Path = ADAPTERS) -> Config:
    """Return the sidecar's configuration: free ports, the engines, and the demo's adapters by folder name."""
    backends = [
        {
            "url": f"triton://{engine.grpc}",
            "id": f"engine-{number}",
            "metrics": f"http://{engine.metrics}/metrics",
            "engine": {
                "config": str(engine.config),
                "host_pages": PAGES,
                "device_pages": PAGES,
                "cost": COST,
                "cost_scale": TIME_SCALE,
            },
        }
        for number, engine in enumerate(engines)
    ]
    free = {"address": "127.0.0.1:0"}
    listeners = {"data": free, "admin": free, "http": free}
    record = {"backends": backends, "listeners": listeners, "adapters": {"serve": str(folder)}}
    return parse(record, "the demo")


async def _without_a_sidecar(engine: Engine, names: Sequence[str], console: Console) -> Counter[str]:
    endings = await answers.ask_by_id(engine.grpc, [task_id_of(name) for name in names], PROMPTS[0])
    missed = endings["not found in cache"]
    console.print(
        f"[bold]2.[/bold] Straight to an engine, by id only: {missed} of {len(names)} requests failed with "
        '"not found in cache. Please send LoRA weights with request".'
    )
    return endings


async def _until_up(sidecar: Sidecar) -> None:
    async with asyncio.timeout(UP_TIMEOUT_S):
        while not all(backend.takes_requests for backend in sidecar.gateway.state.backends.values()):
            await asyncio.sleep(0.05)


async def _ask_all(sidecar: Sidecar, names: Sequence[str], tell: Callable[[str], None]) -> list[Answer]:
    """Ask every adapter and the base model each prompt: 36 requests, the nine of a prompt at once."""
    asked: list[Answer] = []
    everyone = ("", *names)
    for prompt in PROMPTS:
        pairs = [(name, prompt) for name in everyone]

        def checked(done: int, before: int = len(asked)) -> None:
            tell(f"asking by name, and computing what is right: {before + done} of {len(PROMPTS) * len(everyone)}")

        checked(0)
        asked += await answers.ask_by_name(sidecar.data_address, pairs, ADAPTERS, checked)
    return asked


def _show(asked: Sequence[Answer], console: Console) -> None:
    console.print(f"[bold]3.[/bold] The same by name through the sidecar: {len(asked)} requests, no error.")
    console.print(
        "The tables show two of the prompts. The base model is tiny and has learned nothing: its text is noise.\n"
    )
    for prompt in (PROMPTS[0], PROMPTS[-1]):
        console.print(_table([answer for answer in asked if answer.prompt == prompt], prompt), "")


def _table(asked: Sequence[Answer], prompt: str) -> Table:
    table = Table(title=Text(f"“{prompt}”"), title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("adapter", "answer", "engine", "engine's cache", "load", "right"):
        table.add_column(column, overflow="fold", justify="right" if column == "load" else "left")
    for answer in asked:
        table.add_row(
            answer.adapter or "(base)",
            Text(answer.text),  # answers have brackets, which are no markup
            answer.backend,
            _hit_or_miss(answer.cache),
            f"{answer.load_ms:.0f} ms" if answer.load_ms else "",
            "[green]✓[/green]" if answer.right else "[red]NO[/red]",
        )
    return table


def _hit_or_miss(cache: str) -> str:
    if cache == "base":
        return ""
    return "hit" if cache == "resident" else f"miss; store: {cache}"


def _counts(state: State, engines: Sequence[Engine]) -> dict[str, int]:
    served = [record for engine in engines for record in engine.served()]
    return {
        "loads": state.load_count,
        "heals": sum(len(backend.heals) for backend in state.backends.values()),
        "engine_evictions": sum(backend.shadow.host.evictions for backend in state.backends.values()),
        "host_store_evictions": state.store.evictions,
        "engine_requests": len(served),
    }


def _conclude(wrong: Sequence[str], asked: Sequence[Answer], counts: dict[str, int], console: Console) -> None:
    console.print(
        f"\n[bold]4.[/bold] Loads: {counts['loads']}; evictions by the engines: {counts['engine_evictions']}; "
        f"heals: {counts['heals']}; evictions from the host store: {counts['host_store_evictions']}. "
        "No client saw any of it."
    )
    if wrong:
        console.print("\n[red bold]Wrong answers:[/red bold]")
        for line in wrong:
            console.print(f"  {line}", highlight=False)
    else:
        console.print(
            f"All {len(asked)} answers equal the greedy answer of the base model merged with the adapter, which was "
            "computed separately. What to try next: docs/start.md."
        )


def _report(direct: Counter[str], asked: Sequence[Answer], wrong: list[str], counts: dict[str, int]) -> dict[str, Any]:
    return {
        "direct": dict(direct),
        "answers": [{**asdict(answer), "text": answer.text, "right": answer.right} for answer in asked],
        "wrong": wrong,
        "counts": counts,
    }


async def _stay(sidecar: Sidecar, console: Console) -> None:
    """Keep serving until interrupted, and print commands to try."""
    server, admin = f"--server {sidecar.data_address}", f"--admin {sidecar.admin_address}"
    console.print("\nStill up; Ctrl-C ends it. Try, in another terminal:\n")
    for command in (
        f"sidecar generate pirate '{PROMPTS[0]}' --stats {server}",
        f"sidecar adapters list {admin}",
        f"sidecar backends show engine-0 {admin}",
    ):
        console.print(f"  .venv/bin/{command}", highlight=False, soft_wrap=True)
    await asyncio.Event().wait()
