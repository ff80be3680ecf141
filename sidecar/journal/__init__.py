"""The journal: the events of the core in segments on disk, from which its decisions can be replayed."""
