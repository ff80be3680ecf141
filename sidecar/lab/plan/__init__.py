"""Capacity planning: from a load and the goals of its users to settings of engines and sidecar, with their basis."""
