"""Who owns which backend: `Ownership.step(event, now_ns) -> effects`, pure like the core.

A backend's queue lives in one member, its owner, under a lease with an epoch in Redis. A *member* is one life of one
process: after a restart the process is another member under the same name. The owner counts its lease by its own
clock from the moment of its request, so a paused owner loses it without any event.

Redis may become unreachable, lose its data, or return with older data. Four rules keep a backend from having two
owners then:

* **Pledges.** An owner that cannot reach Redis continues only while all witnesses pledge, for the length of a lease,
  neither to acquire the backend nor to pledge it to another member.
* **Witnesses.** A lease records the members that its owner would ask. After it has ended, a member that takes it over
  must be a witness that has pledged nothing, or have the agreement of one: "all of a set" and "one of the same set"
  always intersect. If no witness answers, it waits until `grace_ns` after the last renewal, and for the length of a
  lease after any member answered that it owns the backend or has pledged it.
* **Generations.** A Redis that restarted, failed over or was emptied has a new generation. Data of earlier generations
  counts only for epochs; owners claim their leases anew, and no other member acquires for `grace_ns`.
* **Epochs.** A member that learns of a newer epoch than its own, from Redis or from any member, stops dispatching and
  gives up, even if Redis has forgotten the owner. Only a member with a claim in flight waits for the answer first,
  since the newer epoch may be its own.

An owner continues for `alone_ns`, a day, so that a missing Redis costs nothing. A taker waits for `grace_ns`, little
more than a lease, so that a first install and a fleet that died are served soon. **The price is one known hole**: while
old members continue on pledges, a replica that joins through a Redis that none of them has reached for a lease owns
what they own too. It cannot ask them, since Redis names only live members. Asking would not close the hole either: to
a new member that cannot reach them a fleet that continues looks dead, and to that fleet a Redis that it cannot reach
looks gone; only a wait as long as `alone_ns` would tell the cases apart. The hole ends with the first newer epoch that
an old owner learns of: when it reaches Redis, or asks a witness that does or that has seen the epoch, and after
`alone_ns` at the latest. Ownership is for efficiency: meanwhile two queues feed one engine, and a client still gets
the tokens of one run.

The Redis scripts that these rules need are written out, runnable, in `tests/worlds/ownership/redis.py`.
"""
