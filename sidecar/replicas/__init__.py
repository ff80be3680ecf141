"""Several replicas of one pool: who owns which backend, and requests that go to another's."""
