"""Who owns which backend: `Ownership.step(event, now_ns) -> effects`, pure like the core.

A backend's queue lives in one member, its owner, under a lease with an epoch in Redis. A *member* is one life of one
process: a restart is another member under the same name. The owner counts its lease by its own clock, from when it
asked, so that a pause ends it without any event.

Redis may go away, forget, or come back older than it was. Three rules keep a backend from having two owners then:

* **Pledges.** An owner that does not reach Redis goes on only while all witnesses pledge: not to acquire the backend,
  nor to pledge it to another, for the length of a lease.
* **Witnesses.** A lease records whom its owner would ask. Once it has ended, whoever takes it over is a witness that
  has pledged nothing, or has the word of one; else it waits `alone_ns`, for which an owner goes on at most.
  All of a set and one of a set always meet, so a member that joins through a Redis that no old member reaches waits.
* **Generations.** A Redis that restarted, failed over or was emptied is another generation. What earlier ones say
  counts only for epochs; owners claim their leases anew, and nobody else acquires for `alone_ns`.

The scripts that these rules need of Redis are spelled out, runnable, in `tests/sim/ownership/redis.py`.
"""
