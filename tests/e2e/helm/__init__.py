"""The chart, by the programs that will read it: both Helms, validators, linters, promtool, `config check`."""
