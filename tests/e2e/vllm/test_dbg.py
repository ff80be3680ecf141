import asyncio
from time import monotonic
from tests.e2e.vllm.test_grouping import *


class Obs:
    def __init__(s):
        s.log = []

    def observed(s, event, effects, now_ns):
        s.log.append((now_ns, event, list(effects)))


import pytest


@pytest.mark.parametrize("pages", [2, 3, 4])
async def test_steps(server, toy, tmp_path, pages):
    order = [(NAMES[number % len(NAMES)], prompt(number, PROMPT)) for number in range(REQUESTS)]
    async with http_client(server.http_address) as direct:
        async with in_front(
            server, toy.adapters, tmp_path, backend={"engine": {"device_pages": pages, "host_pages": max(4, pages)}}
        ) as front:
            await at_once(SEATS, [partial(ask, front.client, name, prompt(0, PROMPT), 1) for name in NAMES])
            async with measured(direct) as ours:
                told = await at_once(
                    REQUESTS, [partial(ask, front.client, name, asked, TOKENS) for name, asked in order]
                )
            print("PAGES", pages, ours)
