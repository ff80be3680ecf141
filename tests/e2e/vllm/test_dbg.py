import asyncio
from tests.e2e.vllm.test_parity import *


async def test_base(server, toy, tmp_path):
    async with in_front(server, toy.adapters, tmp_path) as front:
        b = front.served.state.backends["vllm-0"]
        print(b.facts)
        for n in ("base", "a00", "base"):
            try:
                async with asyncio.timeout(8):
                    t = await ask(front.client, n, SHORT, 4)
                    print(n, t.status, t.error, t.tokens, dict(t.headers))
            except TimeoutError:
                print(n, "timeout", front.served.state.requests, b)
        from sidecar.proto import admin_pb2

        ts = [
            asyncio.create_task(ask(front.client, n, SHORT, 4))
            for n in ("base", "a00", "a01", "base", "a02", "base") * 2
        ]
        await asyncio.sleep(6)
        print([t.done() for t in ts])
        print(front.served.state.requests)
        print(b)
        for e in front.served.recorder.effects[-20:]:
            print(e)
        for t in ts:
            t.cancel()
