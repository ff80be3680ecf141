"""The checks of a live Triton server: one small function each, in files by subject."""
