"""What never runs in a pod: the emulated engine, simulation, plans, calibration, the demo."""
