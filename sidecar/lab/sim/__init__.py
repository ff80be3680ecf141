"""The product in virtual time: the core of production, the emulated engine, loads, and the bounds to judge them by."""
