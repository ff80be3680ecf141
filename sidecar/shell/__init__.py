"""The driver: inbox → step → run effects; timers; drain; observers."""
