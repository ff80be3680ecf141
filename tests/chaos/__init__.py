"""Several sidecars, their Redis and their engines as processes that are killed, stopped and cut off under load."""
