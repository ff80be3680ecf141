"""The wiring of one serving process: from a configuration to its listeners and a clean exit."""
