"""The wiring of one serving process, from its configuration to its listeners and a clean exit."""
