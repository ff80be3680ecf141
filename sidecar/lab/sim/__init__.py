"""The product in virtual time: the production core, the emulated engine, loads, and bounds to judge results by."""
