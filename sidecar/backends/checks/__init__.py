"""What is asked of a live engine before it is trusted: one small function a check, in files by subject."""
