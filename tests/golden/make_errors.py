"""Write what clients are told of each error that a request can end with, at each front.

    python -m tests.golden.make_errors

Ids that are drawn, times and addresses are masked.
"""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sidecar.proto import admin_pb2 as pb
from tests.golden.make_commands import masked
from tests.kit.front_house import ASKED, FRONTS, SPENT, Asked, House, house
from tests.kit.peft_files import write_adapter
from tests.kit.serving import until

RECORDED = Path(__file__).parent / "errors.json"
LATER = re.compile("^(retryDelay|retry-after(-ms)?|grpc-retry-pushback-ms|x-ratelimit-reset-.*)$")
"""When to come again is told of what is left of a day."""
KEY = {"authorization": "Bearer nonsense"}
MORE = {
    "not allowed": Asked("law"),
    "paused": Asked("paused"),
    "no time": Asked(headers={"lora-deadline-ms": "0", "x-lora-deadline-ms": "0"}),
    "another class": Asked(headers={"lora-class": "gold", "x-lora-class": "gold"}),
}
"""Errors beside those of `ASKED`, at a sidecar as `prepared`."""
UNPROVEN = {"no credential": Asked(), "a wrong credential": Asked(headers=KEY)}
"""Where identity is enforced."""
DRAINED = {"drained": Asked(), "drained, the base": Asked("")}
"""When the only engine takes nothing new."""


async def prepared(running: House, folder: Path) -> None:
    """Spend what a tenant may ask for, and register names that are not for everybody."""
    served = running.served
    await served.ask("a00", tenant=SPENT)
    for name, allow in (("law", ["beta"]), ("paused", [])):
        path = str(write_adapter(folder / "more" / name))
        await served.adapters.Register(pb.RegisterRequest(name=name, path=path, allow=allow))
    await served.adapters.Pause(pb.PauseRequest(name="paused"))


async def told(folder: Path) -> dict[str, Any]:
    """Return what each front tells of each error, by the error."""
    found: dict[str, Any] = {}

    async def take(running: House, errors: dict[str, Asked]) -> None:
        for name, asked in errors.items():
            for front, ask in FRONTS.items():
                found.setdefault(name, {})[front] = masked(await ask(running, asked), folder, LATER)

    limits = {"limits": [{"tenant": SPENT, "requests_per_day": 1}]}
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(house(folder / "open", access=limits, roots=[folder]))
        await prepared(running, folder)
        await take(running, ASKED | MORE)
        await running.served.backends.Drain(pb.BackendRequest(backend="trt-0"))
        await until(lambda: not any(each.takes_requests for each in running.served.state.backends.values()))
        await take(running, DRAINED)
    async with house(folder / "enforced", identity={"mode": "enforce"}) as running:
        await take(running, UNPROVEN | {"unknown, unproven": replace(ASKED["unknown"], headers=KEY)})
    return found


def main() -> None:
    with TemporaryDirectory() as folder:
        found = asyncio.run(told(Path(folder)))
    RECORDED.write_text(json.dumps(found, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
