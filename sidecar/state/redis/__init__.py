"""The state that several replicas share in a Redis, a Valkey, behind Sentinels or in a cluster.

    address   what the configuration says about where it is, and nothing secret
    link      the connection: clients, credentials, scripts run once and only once
    scripts   what happens inside Redis, each script in one step that nothing comes between
    entries   one name as it is written down there
    copy      what one replica holds of it in memory, and which of two entries wins
    history   asking Redis whether it still has what this replica has read, and putting back what it lost
    registry  the registry over all of it
    contents  a whole registry, read or put there
    members   who is there, and who holds which lease; their scripts are in member_scripts

All keys carry one hash tag, so they lie in one slot of a cluster and a script may touch them together. Commands are
those of Redis 6.2.
"""
