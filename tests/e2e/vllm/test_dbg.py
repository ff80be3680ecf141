import asyncio
from time import monotonic
from tests.e2e.vllm.test_grouping import *
class Obs:
    def __init__(s): s.log=[]
    def observed(s, event, effects, now_ns):
        s.log.append((now_ns, event, list(effects)))
async def test_steps(server, toy, tmp_path):
    order = [(NAMES[number % len(NAMES)], prompt(number, PROMPT)) for number in range(REQUESTS)]
    async with http_client(server.http_address) as direct:
        async with in_front(server, toy.adapters, tmp_path) as front:
            await at_once(SEATS, [partial(ask, front.client, name, prompt(0, PROMPT), 1) for name in NAMES])
            o=Obs(); front.served.sidecar.gateway.observe(o)
            async with measured(direct) as ours:
                told = await at_once(REQUESTS, [partial(ask, front.client, name, asked, TOKENS) for name, asked in order])
            print(ours)
            t0=o.log[0][0]
            names={r.digest:n for n,r in front.served.state.names.items()}
            last=""
            running={}
            for t,e,effs in o.log:
                k=type(e).__name__
                for f in effs:
                    kk=type(f).__name__
                    if kk=="Load": print(f"{(t-t0)/1e6:8.0f} LOAD {f.name}  running {running}")
                    if kk=="Dispatch":
                        running[f.name]=running.get(f.name,0)+1
                        if running[f.name]==1: print(f"{(t-t0)/1e6:8.0f} FIRST {f.name} running {running}")
                    if kk=="Settle":
                        running[f.name]-=1
                        if not running[f.name]: del running[f.name]; print(f"{(t-t0)/1e6:8.0f} LAST {f.name} running {running}")
                if k=="LoadDone": print(f"{(t-t0)/1e6:8.0f} LOADDONE  running {running}")
