"""Who owns which backend: `Ownership.step(event, now_ns) -> effects`, pure like the core.

A backend's queue lives in one member, its owner, under a lease with an epoch in Redis. A *member* is one life of one
process: a restart is another member under the same name. The owner counts its lease by its own clock, from when it
asked, so that a pause ends it without any event.

Redis may go away, forget, or come back older than it was. Four rules keep a backend from having two owners then:

* **Pledges.** An owner that does not reach Redis goes on only while all witnesses pledge: not to acquire the backend,
  nor to pledge it to another, for the length of a lease.
* **Witnesses.** A lease records whom its owner would ask. Once it has ended, whoever takes it over is a witness that
  has pledged nothing, or has the word of one: all of a set and one of a set always meet. Where no witness answers it
  waits until `grace_ns` after the last renewal, and for a lease after anybody answered to own or to have pledged it.
* **Generations.** A Redis that restarted, failed over or was emptied is another generation. What earlier ones say
  counts only for epochs; owners claim their leases anew, and nobody else acquires for `grace_ns`.
* **Epochs.** Who hears of a newer epoch than its own, from Redis or from any member, dispatches nothing more and gives
  up, even if Redis has forgotten whose it was. Only who has claimed waits for the answer: it may be that very epoch.

An owner goes on for `alone_ns`, a day, so that a Redis that is away costs nothing; a taker waits for `grace_ns`, little
more than a lease, so that a first install and a fleet that died are served soon. **The price is one known hole**: while
old members go on on pledges, a replica that joins through a Redis that none of them has reached for a lease owns what
they own too. It cannot ask them: Redis names only members that live. Nor would asking close it. To a newcomer that does
not reach them a fleet that goes on is as one that died, to that fleet a Redis that it does not reach is as one that is
away; only a wait as long as an owner goes on would tell them apart. The hole ends with the first newer epoch that is
heard of: when an old owner reaches Redis, or asks a witness that does or that has seen it, and after `alone_ns` at the
latest. Ownership is for efficiency: two queues feed one engine meanwhile, and a client gets the tokens of one run.

The scripts that these rules need of Redis are spelled out, runnable, in `tests/sim/ownership/redis.py`.
"""
