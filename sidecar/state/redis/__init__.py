"""The state that several replicas share in Redis or Valkey, standalone, behind Sentinels or in a cluster.

    link      the connection: clients, credentials, scripts
    scripts   the registry's Lua scripts, each of which Redis runs atomically
    entries   one name as Redis stores it
    copy      one replica's copy in memory, and the rule for which of two entries wins
    history   detect that Redis lost data that this replica has read, and restore it
    feed      follow the stream of changes
    kept      a copy of the registry on disk; the registry writes it
    registry  the registry on top of these
    times     times by name, of which the latest stays
    contents  read or write a whole registry
    members   members and leases; their scripts are in member_scripts

All keys carry one hash tag, so they lie in one slot of a cluster and a script may use all of them. Commands are those
of Redis 6.2.
"""
