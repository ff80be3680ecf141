"""Start a Redis, two emulated engines and three replicas; kill a replica that owns an engine's queue, and watch.

Clients keep asking the replicas that live, by adapter names only; an answer that fails is counted.
"""

import argparse
import asyncio
import json
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import httpx

ADAPTERS = Path(__file__).parents[2] / "sidecar" / "lab" / "demo" / "data" / "adapters"
NAMES = sorted(path.name for path in ADAPTERS.iterdir() if path.is_dir())
SIDECAR = (sys.executable, "-m", "sidecar")
QUIET = asyncio.subprocess.DEVNULL


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Pool:
    """The processes, and how to reach the replicas."""

    def __init__(self, lease_s):
        self.lease_s = lease_s
        self.engines = free_ports(2)
        self.redis = free_ports(1)[0]
        self.replicas = {f"r{number}": free_ports(4) for number in range(3)}
        self.processes = {}

    async def start(self):
        redis = shutil.which("redis-server") or shutil.which("valkey-server")
        if redis is None:
            sys.exit("neither redis-server nor valkey-server is on PATH; apt-get install redis-server")
        folder = tempfile.mkdtemp(prefix="replicas-")
        await self.run("redis", redis, "--port", str(self.redis), "--save", "", "--dir", folder)
        for port in self.engines:
            await self.run(f"engine-{port}", *SIDECAR, "emulate", "--seed", "20", "--grpc-port", str(port))
        for name in self.replicas:
            await self.run(name, *SIDECAR, "serve", "--adapters", str(ADAPTERS), *self.settings(name))

    async def run(self, name, *command):
        self.processes[name] = await asyncio.create_subprocess_exec(*command, stdout=QUIET, stderr=QUIET)

    def settings(self, name):
        data, admin, http, peers = self.replicas[name]
        backends = ", ".join(f"{{url: 'triton://127.0.0.1:{port}'}}" for port in self.engines)
        for setting in (
            f"listeners.data.address=127.0.0.1:{data}",
            f"listeners.admin.address=127.0.0.1:{admin}",
            f"listeners.http.address=127.0.0.1:{http}",
            f"backends=[{backends}]",
            f"state.url=redis://127.0.0.1:{self.redis}",
            f"replicas={{address: '127.0.0.1:{peers}', name: {name}, lease_s: {self.lease_s}}}",
        ):
            yield from ("--set", setting)

    async def owns(self, name):
        """Return what each replica owns, as one of them tells; nothing while it cannot be asked."""
        admin = f"127.0.0.1:{self.replicas[name][1]}"
        command = (*SIDECAR, "replicas", "list", "--json", "--admin", admin)
        listing = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=QUIET)
        told, _ = await listing.communicate()
        if listing.returncode:
            return {}
        return {each["name"]: [one["backend"] for one in each.get("owns", ())] for each in json.loads(told)}

    async def stop(self):
        for process in self.processes.values():
            if process.returncode is None:
                process.send_signal(signal.SIGKILL)
        await asyncio.gather(*(process.wait() for process in self.processes.values()))


class Asking:
    """Clients that ask the replicas in turn, those that were killed left out."""

    def __init__(self, pool):
        self.pool = pool
        self.gone = set()
        self.answered = self.failed = 0
        self.slowest_s = 0.0

    async def ask_on(self, number):
        async with httpx.AsyncClient(timeout=60) as client:
            while True:
                live = [name for name in self.pool.replicas if name not in self.gone]
                port = self.pool.replicas[live[number % len(live)]][2]
                began = time.monotonic()
                try:
                    body = {"model": NAMES[number % len(NAMES)], "prompt": "Who buys the most?", "max_tokens": 16}
                    reply = await client.post(f"http://127.0.0.1:{port}/v1/completions", json=body)
                    self.answered += reply.status_code == httpx.codes.OK
                    self.failed += reply.status_code != httpx.codes.OK
                except httpx.HTTPError:
                    self.failed += 1
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                number += 1


async def main(seconds, lease_s):
    pool = Pool(lease_s)
    await pool.start()
    try:
        return await watch(pool, seconds)
    finally:
        await pool.stop()


async def watch(pool, seconds):
    while sum(map(len, (owns := await pool.owns("r0")).values())) < len(pool.engines):
        await asyncio.sleep(0.2)
    asking = Asking(pool)
    clients = [asyncio.create_task(asking.ask_on(number)) for number in range(4)]
    victim = next(name for name, held in owns.items() if held)
    witness = next(name for name in pool.replicas if name != victim)
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        if passed > seconds / 3 and victim not in asking.gone:
            asking.gone.add(victim)
            pool.processes[victim].kill()
            print(f"{passed:5.1f} s  kill -9 {victim}")
        owns = await pool.owns(witness)
        shown = "  ".join(f"{name}: {', '.join(held) or '-'}" for name, held in sorted(owns.items()))
        print(f"{passed:5.1f} s  {asking.answered} answered, {asking.failed} failed   {shown}", flush=True)
        await asyncio.sleep(0.5)
    for client in clients:
        client.cancel()
    print(f"the slowest answer took {asking.slowest_s:.1f} s; a lease lasts {pool.lease_s:g} s")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--lease", type=float, default=3.0, help="seconds after which what a lost replica owned moves")
    arguments = parser.parse_args()
    sys.exit(asyncio.run(main(arguments.seconds, arguments.lease)))
